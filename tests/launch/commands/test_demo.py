"""`gearshift demo`: its launch line, and the whole of it on the real model (slow)."""

import argparse
import json
import os
import signal
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
    """What `gearshift demo` would have run: a list of (command, environment, run folder)."""
    calls = []

    def see_through(command: list[str], folder: Path) -> int:
        calls.append((command, demo.environment(), folder))
        return 3

    monkeypatch.setattr(demo, "see_through", see_through)
    monkeypatch.setattr(fetch, "fetch", lambda name, cache: False)
    return calls


def test_the_launch_line(launched):
    assert cli.main(["demo", "--run.steps", "5", "--ranks", "1", "--run.dir=there"]) == 3
    ((command, _, folder),) = launched
    assert Path(command[0]).name == "deepspeed"
    launcher, job = split(command)
    assert "--num_gpus" in launcher or not torch.cuda.is_available()
    assert launcher[-1] == "1"
    path, overrides, _ = train.parse(job)
    config = config_load.load(path, overrides).config
    assert (config.run.steps, config.run.dir, config.actor.path) == (5, "there", "asset:smollm2")
    assert config.rollout.tp == 1 and folder == Path("there")
    port = int(command[command.index("--master_port") + 1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_deepspeed_is_told_of_the_device(launched, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo"]) == 3
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert cli.main(["demo"]) == 3
    assert [env["DS_ACCELERATOR"] for _, env, _ in launched] == ["cpu", "xpu"]


JOB = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal's Ctrl-C must not reach it
print("up", flush=True)
while not pathlib.Path(sys.argv[1], "stop").exists():
    time.sleep(0.05)
print("saving", flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(5)
"""


@pytest.mark.parametrize(("signals", "seconds", "status"), [(1, 1, 5), (2, 600, -signal.SIGKILL)])
def test_a_signal_lets_the_job_save_and_a_second_ends_it(tmp_path, signals, seconds, status):
    """As in a terminal, which sends SIGINT to the whole process group."""
    (tmp_path / "job.py").write_text(JOB)
    call = f"""
from pathlib import Path
from gearshift.launch.commands import demo
command = [{sys.executable!r}, {str(tmp_path / "job.py")!r}, {str(tmp_path)!r}, "{seconds}"]
print(demo.see_through(command, Path({str(tmp_path)!r})))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "up\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    if signals == 2:
        os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == f"{int(status)}\n"
    assert not (tmp_path / "stop").exists()


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
