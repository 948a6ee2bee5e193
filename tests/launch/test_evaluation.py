"""Evaluation in the loop: it changes nothing, is resumed exactly, and is the same on any ranks."""

import hashlib
import json
from pathlib import Path

import pytest

from gearshift.engine.checkpoint import store
from gearshift.launch import train
from gearshift.launch.report.page import render
from tests.tiny import job as tiny_job
from tests.tiny import on_ranks

# Draws from every global generator, as a careless reward function may.
JUDGE = """
import os, random, signal
import numpy, torch

calls = 0

def score(prompts, completions, gold, **columns):
    global calls
    calls += 1
    if os.environ.get("DIE_AT") == str(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    noise = random.random() + numpy.random.rand() + float(torch.rand(()))
    return [len(text.split()) >= 3 and noise >= 0 for text in completions]

def rising_then_falling(completions, **columns):
    global calls
    calls += 1
    return [[0.1, 0.2, 0.9, 0.3, 0.4][calls - 1]] * len(completions)
"""


def write(folder: Path, **changes: dict) -> Path:
    """A job of four steps that evaluates every second one: three prompts, four samples of each, of
    one of which the tokens are too many. Two evaluation sets."""
    folder.mkdir(exist_ok=True)
    (folder / "judge.py").write_text(JUDGE)
    rows = [{"prompt": " ".join(["w9"] * n), "gold": n} for n in (1, 2, 20, 3)]
    tiny_job.write_rows(folder / "held.jsonl", rows)
    tiny_job.write_rows(folder / "more.jsonl", [{"prompt": "w5", "gold": 0}] * 2)
    evaluation = {
        "every": 2,
        "sources": [{"path": str(folder / "held.jsonl")}, {"path": str(folder / "more.jsonl")}],
        "rewards": [{"name": "long", "function": f"{folder / 'judge.py'}:score"}],
        "sampling": {"max_new_tokens": 4},
        "pass_at": [1, 4],
    }
    run = {"steps": 4, "save_every": 1, "seed": 3}
    actor = {"optimizer": {"lr": 0.01, "schedule": "constant", "warmup": 0}} | changes.pop(
        "actor", {}
    )
    sections = {
        "actor": actor,
        "run": run | changes.pop("run", {}),
        "eval": evaluation | changes.pop("eval", {}),
    }
    return tiny_job.write(folder, **sections, **changes)


def start(path: Path, *overrides: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.alone(patch)
        return train.main(["--config", str(path), *map(str, overrides)])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluated(folder: Path) -> dict[int, dict]:
    """The figures of evaluations, by step."""
    found = {
        line["step"]: {k: v for k, v in line.items() if k.startswith("eval/")}
        for line in tiny_job.learned(folder / "run")
    }
    return {step: figures for step, figures in found.items() if figures}


def trained(folder: Path) -> tuple[list[dict], dict[str, str]]:
    """What training left: its figures, and digests of weights, moments and random generators."""
    steps = [
        {k: v for k, v in line.items() if not k.startswith("eval/")}
        for line in tiny_job.learned(folder / "run")
        if line["step"]
    ]
    last = folder / "run" / "checkpoints" / "step_000004"
    files = [*last.glob("*.safetensors"), *last.glob("random.*")]
    assert len(files) == 3
    return steps, {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The job, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "job"
    assert start(write(folder)) == 0
    return folder


@pytest.mark.bits
def test_training_is_the_same_to_the_bit_without_evaluation(whole, tmp_path):
    assert start(write(tmp_path / "job"), "--eval.sources", "[]") == 0
    assert evaluated(tmp_path / "job") == {}
    assert trained(tmp_path / "job") == trained(whole)


def test_what_an_evaluation_tells(whole):
    """Before the first step, every second one, after the last; figures from the samples' text."""
    found = evaluated(whole)
    assert sorted(found) == [0, 2, 4]
    for name in ("held", "more"):
        ends = ["scores", "response_length/mean", "response/finished_fraction"]
        ends += [f"rewards/long/{end}" for end in ("mean", "pass_at_1", "pass_at_4")]
        assert {k for k in found[0] if k.startswith(f"eval/{name}/")} == {
            f"eval/{name}/{end}" for end in ends
        }
    for figures in found.values():
        for name in ("held", "more"):
            own = {k.removeprefix(f"eval/{name}/"): v for k, v in figures.items()}
            # One of one passes as often as the mean of scores that are 0 or 1.
            assert own["rewards/long/pass_at_1"] == pytest.approx(own["rewards/long/mean"])
            assert own["scores"] == own["rewards/long/mean"]
            assert own["rewards/long/pass_at_1"] <= own["rewards/long/pass_at_4"] <= 1
            assert 1 <= own["response_length/mean"] <= 4
    assert found[0] != found[4], "the policy has moved"
    rows = [row for row in lines(whole / "run" / "samples.jsonl") if "eval" in row]
    assert [row["step"] for row in rows] == [0] * 5 + [2] * 5 + [4] * 5
    assert [row["prompt"] for row in rows[:3]] == ["w9", "w9 w9", "w9 w9 w9"], "without the long"


def test_the_report_shows_them(whole):
    page = (whole / "run" / "report.html").read_text()
    assert "held: score" in page and "held: pass@k" in page and "more: score" in page
    assert "Held-out samples: held" in page and "step 0 and step 4" in page


@pytest.mark.bits
@pytest.mark.parametrize("call", [2, 3, 5], ids=["step 0", "step 2", "step 4"])
def test_a_kill_in_an_evaluation_repeats_and_skips_none(whole, tmp_path, call):
    """Calls of the judge come in pairs, one for each set."""
    path = write(tmp_path / "job")
    script = "launch/train_on_ranks.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIE_AT", str(call))
        with pytest.raises(AssertionError, match="statuses"):
            on_ranks.launch(script, "--config", path, ranks=1)
    done = [line["step"] for line in lines(tmp_path / "job" / "run" / "metrics.jsonl")]
    assert done == {2: [], 3: [0, 1], 5: [0, 1, 2, 3]}[call]
    on_ranks.launch(script, "--config", path, ranks=1)
    assert [line["step"] for line in tiny_job.learned(tmp_path / "job" / "run")] == [0, 1, 2, 3, 4]
    assert evaluated(tmp_path / "job") == evaluated(whole)
    assert trained(tmp_path / "job") == trained(whole)
    samples = (tmp_path / "job" / "run" / "samples.jsonl").read_bytes()
    assert samples == (whole / "run" / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks_share_three_prompts(whole, tmp_path, tp):
    """One rank has a prompt less, and an evaluation set has as many prompts as ranks."""
    zero3 = {role: {"deepspeed": f"{role}_zero3.json"} for role in ("actor", "critic")}
    path = write(tmp_path / "job", **zero3, rollout={"tp": tp}, run={"steps": 2})
    on_ranks.launch("launch/train_on_ranks.py", "--config", path, ranks=2)
    alone, together = evaluated(whole), evaluated(tmp_path / "job")
    assert sorted(together) == [0, 2]
    for step, figures in together.items():
        assert figures == pytest.approx(alone[step], abs=1e-6)


def test_the_best_checkpoint_by_a_figure_stays(tmp_path, capsys):
    """Evaluations before step 1 and after each: 0.1, 0.2, 0.9, 0.3, 0.4."""
    rewards = [{"name": "r", "function": f"{tmp_path / 'judge.py'}:rising_then_falling"}]
    evaluation = {"every": 1, "rewards": rewards, "best_by": "eval/held/rewards/r/mean"}
    path = write(tmp_path, run={"save_every": 0, "keep_checkpoints": 1}, eval=evaluation)
    assert start(path, "--eval.sources", f"[{{path: {tmp_path / 'held.jsonl'}}}]") == 0
    names = [path.name for path in store.steps(tmp_path / "run" / "checkpoints")]
    assert names == ["step_000002", "step_000004"]
    assert "best by eval/held/rewards/r/mean: " in capsys.readouterr().out
    known = store.figures(tmp_path / "run" / "checkpoints", "eval/held/rewards/r/mean")
    assert list(known.values()) == pytest.approx([0.9, 0.4])
    # Those saved for another figure are no better or worse.
    assert set(store.figures(tmp_path / "run" / "checkpoints", store.REWARD).values()) == {None}


def test_a_step_0_alone_makes_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/a/scores": 0.5}\n')
    from gearshift.launch.report.data import load_run

    page = render(load_run(tmp_path))
    assert "0 steps" in page and "a: score" in page
