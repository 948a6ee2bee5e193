"""`gearshift bench step`: its table, its JSON, mistakes, and a peer that is missing."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from gearshift.launch import cli
from gearshift.launch.bench import step as bench_step
from gearshift.launch.bench import versus as bench_versus
from gearshift.launch.bench.versus import Task
from gearshift.launch.commands import bench

ROOT = Path(__file__).resolve().parents[3]
TASK = Task(
    vocab=64,
    rows=4,
    prompt_tokens=3,
    response_tokens=5,
    micro_batch=2,
    score_batch=2,
    steps=2,
    hidden=16,
    layers=1,
)
PHASES = ["generate", "rewards", "logprobs", "ref", "values", "update_actor", "update_critic"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A written task."""
    made = tmp_path_factory.mktemp("task")
    bench_versus.write_task(TASK, made)
    return made


@pytest.fixture(scope="module")
def measured(folder) -> tuple[str, dict]:
    """What a process prints, and its JSON."""
    out = folder / "out.json"
    command = [sys.executable, "-m", "gearshift.launch.cli", "bench", "step", "--steps", "2"]
    command += ["--config", str(folder / "recipe.yaml"), "--json", str(out), "--ppo.epochs", "2"]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment = alone | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, json.loads(out.read_text())


def test_json_has_every_phase_and_the_work_done(measured):
    result = measured[1]
    assert list(result["phases"]) == PHASES
    step = result["step"]
    assert step["generated_tokens"] == TASK.rows * TASK.response_tokens
    assert step["tokens"] == TASK.rows * (TASK.prompt_tokens + TASK.response_tokens)
    assert len(step["cpu_seconds_of_each"]) == result["steps"] == 2
    assert result["overrides"] == ["--ppo.epochs", "2"]
    assert result["environment"]["ranks"] == 1


def test_the_phases_are_parts_of_the_step(measured):
    result = measured[1]
    phases = result["phases"].values()
    # Medians of two are means, so that parts still add up.
    for name in ("seconds", "cpu_seconds"):
        assert all(phase[name] > 0 for phase in phases)
        assert sum(phase[name] for phase in phases) <= result["step"][name]
    assert result["step"]["peak_gb"] >= max(phase["peak_gb"] for phase in phases)
    for phase in [*phases, result["step"]]:
        assert phase["growth_gb"] == pytest.approx(phase["peak_gb"] - result["built_gb"])
    assert 0.05 < result["built_gb"] < 5


def test_the_table_has_a_row_per_phase(measured):
    printed, result = measured
    found = [line.split() for line in printed.splitlines()]
    cells = {words[0]: words[1:] for words in found if words and words[0] in (*PHASES, "step")}
    assert list(cells) == [*PHASES, "step"]
    step = result["step"]
    assert cells["step"] == [
        f"{step['seconds']:.2f}",
        f"{step['cpu_seconds']:.2f}",
        "100%",
        f"{step['peak_gb']:.3f}",
        f"{step['growth_gb']:+.3f}",
    ]
    assert "One PPO step of recipe.yaml" in printed
    assert "ranks 1, median of 2 steps after a warm-up" in printed


def test_the_run_folder_is_gone_and_nothing_is_left_behind(measured, folder):
    left = {path.name for path in folder.iterdir()}
    assert left == {"policy", "reward", "prompts.jsonl", "recipe.yaml", "task.json", "out.json"}


def test_special_tokens_are_never_sampled(folder):
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    ids = torch.randint(4, TASK.vocab, (8, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        likely = policy(ids).logits.softmax(-1)
    assert likely[..., :4].sum() == 0
    assert likely.amax() < 0.5  # and the others are still drawn from


def test_medians_are_of_each_figure_and_the_peak_of_a_step_is_its_highest_phase():
    def figures(generate: float, ref: float) -> dict[str, float]:
        names = ("generate", "ref", "step")
        times = {f"{kind}/{n}": 1.0 for kind in ("timing_s", "cpu_s") for n in names}
        memory = {"memory_gb/ref": ref, "memory_gb/generate": generate}
        rates = {"throughput/tokens_per_s": 8.0, "throughput/generated_tokens_per_s": 4.0}
        return times | memory | rates | {"tokens": 8.0, "generated_tokens": 4.0}

    steps = [figures(1.0, 3.0), figures(2.0, 1.5), figures(4.0, 1.0)]
    result = bench_step.summary(steps, built_gb=0.5)
    assert list(result["phases"]) == ["generate", "ref"]
    assert result["phases"]["generate"]["peak_gb"] == 2.0
    assert result["phases"]["ref"]["peak_gb"] == 1.5
    assert result["step"]["peak_gb"] == 3.0  # of 3, 2 and 4: each step's highest phase
    assert result["step"]["growth_gb"] == 2.5


# Against the peer


def test_a_missing_peer_is_one_line(capsys, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho Traceback >&2\necho "NoModule: $2" >&2\nexit 1\n')
    python.chmod(0o755)
    assert cli.main(["bench", "step", "--vs-trl", "--peer-python", str(python)]) == 0
    told = f"skipped: {python}: NoModule: import trl.experimental.ppo; pip install trl==1.12.0\n"
    assert capsys.readouterr().out == told


def test_the_sides_take_turns_and_ratios_are_of_medians(monkeypatch, capsys):
    turns, growth = [], iter([1.0, 10.0, 20.0, 3.0])

    def run(side, task, folder, args):
        assert (folder / "recipe.yaml").exists() and (folder / "task.json").exists()
        turns.append(side)
        return {"growth_gb": next(growth), "cpu_seconds": {"ours": 1.0, "trl": 4.0}[side]}

    monkeypatch.setattr(bench_versus, "run", run)
    entry = bench_versus.compare(TASK, Namespace(repeats=2, overrides=[]))
    assert turns == ["ours", "trl", "trl", "ours"]
    assert entry["ratio"] == pytest.approx({"growth_gb": 2 / 15, "cpu_seconds": 0.25})
    bench_versus.print_table({"peer": "trl", "tasks": [entry]})
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    growth, seconds = (row for row in rows if row[0] == "64")
    assert growth[1:3] == ["growth GB", "2.000 (1.000 to 3.000)"] and growth[-1] == "0.13"
    assert seconds[1] == "CPU s" and seconds[-1] == "0.25"


def test_a_failed_process_is_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        bench_versus.ask([sys.executable, "-c", "1 / 0"])
    mistake = "import sys; sys.exit('gearshift: error: ppo.lam=2: too large') if 0 else None; "
    mistake += "print('gearshift: error: ppo.lam=2: too large', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ValueError, match="^ppo.lam=2: too large$"):
        bench_versus.ask([sys.executable, "-c", mistake])


# Mistakes


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "--config: missing; give the recipe to measure, or --vs-trl"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--config", "x.yaml", "--steps", "0"], "--steps=0: at least 1"),
        (["--vs-trl", "--repeats", "0"], "--repeats=0: at least 1"),
        (["--vs-trl", "--config", "x.yaml"], "--config: --vs-trl brings its own"),
        (["--vs-trl", "--vocab", "5"], "--vocab 5: at least 8"),
        (["--vs-trl", "--peer-batch", "0"], "--peer-batch=0: at least 1"),
        (["--vs-trl", "--peer-python", "/absent/python"], "/absent/python"),
        (["--config", "x.yaml", "--json", "/absent/out.json"], "--json=/absent/out.json: "),
    ],
)
def test_mistakes_are_one_line_and_2(capsys, arguments, told):
    assert cli.main(["bench", "step", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gearshift: error: ") and error.count("\n") == 1
    assert told in error


def test_a_wrong_override_is_told_before_anything_is_loaded(folder, capsys):
    recipe = str(folder / "recipe.yaml")
    assert cli.main(["bench", "step", "--config", recipe, "--ppo.epoch", "2"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_unknown_parts_and_arguments(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "stpe"])
    assert "invalid choice: 'stpe'" in capsys.readouterr().err

    class Strict:
        """Takes no overrides."""

        add_arguments = staticmethod(lambda parser: None)
        main = staticmethod(lambda args: 0)

    monkeypatch.setattr(bench.importlib, "import_module", lambda name: Strict)
    assert bench.main(Namespace(part="step", arguments=[])) == 0
    with pytest.raises(SystemExit, match="2"):
        bench.main(Namespace(part="step", arguments=["--run.steps", "3"]))
    assert "unrecognized arguments: --run.steps 3" in capsys.readouterr().err


def test_help_of_a_part(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "step", "--help"])
    printed = capsys.readouterr().out
    assert "--vs-trl" in printed and "usage: gearshift bench step" in printed
