"""`gearshift demo`: its launch line, and the whole of it on the real model (slow)."""

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gearshift.engine.config import assets
from gearshift.engine.config import load as config_load
from gearshift.launch import cli, train
from gearshift.launch.commands import demo, fetch
from tests.tiny import job as tiny_job


def split(command: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's arguments and those of the job."""
    at = command.index(str(tiny_job.TRAIN))
    return command[:at], command[at + 1 :]


@pytest.fixture
def launched(monkeypatch):
    """What `gearshift demo` would have run: a list of (command, environment)."""
    calls = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch, "fetch", lambda name, cache: False)
    return calls


def test_the_launch_line(launched):
    assert cli.main(["demo", "--run.steps", "5", "--ranks", "1", "--run.dir=there"]) == 3
    ((command, _),) = launched
    assert Path(command[0]).name == "deepspeed"
    launcher, job = split(command)
    assert "--num_gpus" in launcher or not torch.cuda.is_available()
    assert launcher[-1] == "1"
    path, overrides, _ = train.parse(job)
    config = config_load.load(path, overrides).config
    assert (config.run.steps, config.run.dir, config.actor.path) == (5, "there", "asset:smollm2")
    assert config.rollout.tp == 1
    port = int(command[command.index("--master_port") + 1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_deepspeed_is_told_of_the_device(launched, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo"]) == 3
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert cli.main(["demo"]) == 3
    assert [env["DS_ACCELERATOR"] for _, env in launched] == ["cpu", "xpu"]


def test_help_names_the_overrides(capsys):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert "--section.key VALUE" in parser.format_help()


@pytest.mark.slow
def test_the_demo(tmp_path):
    """Two steps of the real model on one rank, to an exported model that writes."""
    if not all((assets.cache_dir() / name).is_dir() for name in demo.ASSETS):
        pytest.skip("run: gearshift fetch smollm2 movie-prompts")
    gearshift = [sys.executable, "-m", "gearshift.launch.cli"]
    small = ["--ppo.prompts_per_step=4", "--ppo.minibatch_size=4", "--run.steps=2"]
    arguments = ["demo", "--ranks", "1", f"--run.dir={tmp_path / 'run'}", *small]
    done = subprocess.run(
        [*gearshift, *arguments],
        env=tiny_job.environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kinds = ("prompts from", "first prompt", "step 1/2", "step 2/2", "exported", "report")
    for line, kind in zip(done.stdout.splitlines(), kinds, strict=True):
        assert line.startswith(kind)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(-1 <= json.loads(line)["objective/scores"] <= 1 for line in metrics)
    assert json.loads(metrics[0])["rollout/ratio_first_max"] < 1e-3
    actor = ["--model", str(tmp_path / "run" / "export" / "actor")]
    said = subprocess.run(
        [*gearshift, "generate", *actor, "--max-new-tokens", "8", "The film is"],
        env=tiny_job.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert said.returncode == 0 and said.stderr == ""
    assert said.stdout.startswith("The film is -> ")
