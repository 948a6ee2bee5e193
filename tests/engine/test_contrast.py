"""Dynamic sampling: which groups are replaced, by what, and that ranks and kills change nothing."""

import hashlib
import json

import pytest
import torch

from gearshift.engine.batch import Rollout, joined
from gearshift.engine.config.schema import DataConfig, PPOConfig
from gearshift.engine.contrast import _replaced, flat, with_contrast
from gearshift.engine.data.streams import PromptStream
from gearshift.engine.metrics import StepMetrics
from gearshift.engine.rewards.total import Scores
from tests.tiny import job as tiny_job
from tests.tiny import models as tiny
from tests.tiny import on_ranks

CPU = torch.device("cpu")


def ppo(**changes) -> PPOConfig:
    settings = {"prompts_per_step": 4, "samples_per_prompt": 2, "minibatch_size": 8}
    return PPOConfig(**settings | {"dynamic_sampling": 3} | changes)


def scores(total, **more) -> Scores:
    total = torch.tensor(total, dtype=torch.float32)
    settings = {"by_name": {"a": total}, "teaches": torch.ones(len(total)).bool(), "failed": 0}
    settings |= {"fault": "", "usable": True, "by_token": None}
    return Scores(total=total, **settings | more)


def test_groups_without_contrast():
    """Rows are sample-major; what differs by rounding only is no contrast."""
    judged = scores([1.0, 0.0, 0.3, 5e6, 1.0, 1.0, 0.3 + 1e-8, 5e6 + 1])
    assert flat(judged, ppo()).tolist() == [True, False, True, True]
    own = {"a": judged.total, "b": torch.arange(8.0)}
    by_b = scores(judged.total.tolist(), by_name=own)
    assert not flat(by_b, ppo(dynamic_sampling_by="b")).any()


def stream(tmp_path, **batching) -> PromptStream:
    rows = [{"prompt": " ".join(["w9"] * (1 + i % 3)), "number": i} for i in range(40)]
    path = tiny_job.write_rows(tmp_path / "p.jsonl", rows)
    settings = {"prompts_per_step": 4, "samples_per_prompt": 2, "seed": 1}
    data = DataConfig(sources=[{"path": str(path)}], shuffle=False)
    return PromptStream(data, tiny.tokenizer(), **settings | batching)


def answered(prompts) -> Rollout:
    """Responses as long as the prompt's number says, modulo 4."""
    lengths = torch.tensor([1 + n % 4 for n in prompts.columns["number"]])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.where(mask, 5, 0)
    return Rollout(
        **prompts.tensors(),
        response_ids=ids,
        response_mask=mask,
        rollout_logprobs=torch.zeros(ids.shape),
        finished=torch.ones(len(ids)).bool(),
    )


def judge(rollout: Rollout, teaching: set[int]) -> Scores:
    """Samples of the prompts `teaching` score 1 and 2, all others 1."""
    second = torch.arange(len(rollout)) >= len(rollout) // 2
    good = torch.tensor([n in teaching for n in rollout.columns["number"]])
    return scores((1.0 + (second & good)).tolist())


def run(tmp_path, teaching: set[int], **changes):
    prompts = stream(tmp_path)
    first = answered(prompts.next_batch())
    metrics, asked = StepMetrics(CPU), []

    def sample(batch):
        rollout = answered(batch)
        asked.append(rollout)
        return rollout, judge(rollout, teaching)

    options = {"config": ppo(**changes), "redraw": prompts.redraw, "sample": sample}
    found, judged = with_contrast(first, judge(first, teaching), metrics, **options)
    return first, found, judged, metrics.reduce(), asked, prompts


def test_flat_groups_are_replaced_in_their_place(tmp_path):
    """Prompts 0 and 2 teach; 1 and 3 are replaced by 4 and 5, of which 5 teaches, then by 6."""
    first, found, judged, figures, asked, prompts = run(tmp_path, {0, 2, 5, 6})
    assert found.columns["number"] == [0, 6, 2, 5, 0, 6, 2, 5]
    assert torch.equal(found.row_ids, first.row_ids)
    assert judged.total.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert found.lengths.tolist() == [1 + n % 4 for n in found.columns["number"]]
    assert found.prompt_mask.sum(1).tolist() == [1 + n % 3 for n in found.columns["number"]]
    ids = torch.cat([first.row_ids, *(a.row_ids for a in asked)]).tolist()
    assert len(set(ids)) == len(ids), "no response has the seed of another"
    assert {k.removeprefix("dynamic_sampling/"): v for k, v in figures.items() if "/" in k} == {
        "flat_groups": 2,
        "flat_groups_left": 0,
        "prompts_redrawn": 3,
        "attempts": 2,
    }
    everything = sum(int(a.lengths.sum()) for a in (first, *asked))  # one rank: none fills up
    assert figures["generated_tokens"] == everything - int(found.lengths.sum())
    assert prompts.next_batch().columns["number"][:4] == [7, 8, 9, 10], "drawn is drawn"


def test_attempts_are_bounded_and_what_is_left_is_counted(tmp_path):
    first, found, judged, figures, asked, _ = run(tmp_path, {0, 2}, dynamic_sampling=2)
    assert len(asked) == 2
    assert found.columns["number"] == first.columns["number"], "no better one came"
    assert figures["dynamic_sampling/flat_groups_left"] == 2
    assert flat(judged, ppo()).tolist() == [False, True, False, True]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_is_redrawn_depends_on_no_world_size(tmp_path, world):
    seen, sizes = {}, set()
    for rank in range(world):
        own = stream(tmp_path, rank=rank, world_size=world)
        own.next_batch()
        new = own.redraw([0, 1, 3], 1)
        sizes.add(len(new.prompts))
        half = len(new.prompts) // 2
        for i, slot in enumerate(new.slots):
            ids = new.prompts.row_ids.tolist()
            seen[slot] = (new.prompts.columns["number"][i], ids[i], ids[half + i])
    assert len(sizes) == 1
    assert seen == {s: (4 + i, 2**40 + s, 2**40 + 4 + s) for i, s in enumerate((0, 1, 3))}


def test_token_rewards_and_failures_are_carried_along(tmp_path):
    prompts = stream(tmp_path)
    first = answered(prompts.next_batch())
    fresh = answered(prompts.redraw([1], 1).prompts)
    assert joined(first, fresh).response_ids.shape == (10, 4)
    tokens = torch.ones(2, fresh.response_ids.shape[1])
    judged = scores([1.0] * 8, failed=1, fault="x")
    scored = scores([1.0, 2.0], by_token=tokens, usable=False)
    found, total = _replaced(first, judged, fresh, scored, [(1, 0)], 2)
    assert total.total.tolist() == [1, 1, 1, 1, 1, 2, 1, 1]
    assert total.by_token.shape == found.response_ids.shape
    assert total.by_token.any(1).tolist() == [i in (1, 5) for i in range(8)]
    assert (total.failed, total.fault, total.usable) == (1, "x", False)


# Whole runs

REWARD = """
import os, signal
calls = 0

def score(completions, **columns):
    global calls
    calls += 1
    if os.environ.get("DIE_AT") == str(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(text.split()) >= 5 for text in completions]
"""


def write(folder, **ppo):
    folder.mkdir()
    (folder / "r.py").write_text(REWARD)
    settings = {"samples_per_prompt": 2, "minibatch_size": 4, "dynamic_sampling": 3}
    settings |= {"overlong_filter": True, "estimator": "gae"}
    path = tiny_job.write(
        folder, run={"steps": 3, "save_every": 1, "export": False}, ppo=settings | ppo
    )
    return ["--config", path, "--rewards.0.function", f"{folder / 'r.py'}:score"]


def left(folder) -> tuple:
    last = folder / "run" / "checkpoints" / "step_000003"
    state = json.loads((last / "state.json").read_text())["stateful"]
    digests = {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in last.glob("*.safetensors")
    }
    return tiny_job.learned(folder / "run"), digests, state


@pytest.mark.bits
def test_a_run_killed_between_attempts_goes_on_bit_for_bit(tmp_path):
    script = "launch/train_on_ranks.py"
    on_ranks.launch(script, *write(tmp_path / "whole"), ranks=1)
    steps, digests, state = left(tmp_path / "whole")
    attempts = [int(line["dynamic_sampling/attempts"]) for line in steps]
    assert all(attempts[:2]), "some groups of each step are flat"
    assert state["prompts"]["kept"] == [
        sum(4 + int(line["dynamic_sampling/prompts_redrawn"]) for line in steps)
    ]
    assert all(line["response/finished_fraction"] < 1 for line in steps), "the filter has work"
    arguments = write(tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patch:
        # At the second call of the second step: after its first attempt.
        patch.setenv("DIE_AT", str(1 + attempts[0] + 2))
        with pytest.raises(AssertionError, match="statuses"):
            on_ranks.launch(script, *arguments, ranks=1)
    assert [line["step"] for line in tiny_job.learned(tmp_path / "killed" / "run")] == [1]
    on_ranks.launch(script, *arguments, ranks=1)
    again, digests_again, state_again = left(tmp_path / "killed")
    assert (again, digests_again) == (steps, digests)
    assert state_again["prompts"]["kept"] == state["prompts"]["kept"]


def test_two_ranks_draw_and_learn_the_same(tmp_path):
    """One PPO step: which prompts, and the scores of what was kept."""
    script = "launch/train_on_ranks.py"
    figures = []
    for ranks in (1, 2):
        arguments = [*write(tmp_path / str(ranks)), "--run.steps", 1]
        for role in ("actor", "critic"):
            arguments += [f"--{role}.deepspeed", f"{role}_zero3.json"]
        on_ranks.launch(script, *arguments, ranks=ranks)
        figures += tiny_job.learned(tmp_path / str(ranks) / "run")
    alone, together = figures
    assert alone["dynamic_sampling/prompts_redrawn"] > 0
    for key in alone:
        if key.startswith(("dynamic_sampling/", "objective/", "response", "generated", "loss/")):
            assert together[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), key
