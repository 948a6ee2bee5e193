"""Rewards that fail, in real trainers of tiny models: what their samples get, and what is said."""

import pytest
import torch

from gearshift.engine.metrics import StepMetrics
from gearshift.engine.rewards.total import RewardError
from tests.tiny import run as tiny_run
from tests.tiny.guarded import UPDATES, make, same, state, step

CPU = torch.device("cpu")
POISONED_REWARD = """
calls = []
def score(prompts, completion_ids, **columns):
    calls.append(len(completion_ids))
    {body}
    return [float(len(ids)) for ids in completion_ids]
"""
POISON = "raise KeyError('gold')"
SHARE = {"failed_reward_share": 0.2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with tiny_run.alone():
        yield tiny_run.write_models(tmp_path_factory.mktemp("models"))


def poisoned_reward(when: str, then: str = POISON) -> str:
    return POISONED_REWARD.format(body=f"if {when}: {then}")


def judged(trainer):
    rollout = trainer.actor.generate(tiny_run.prompts(trainer.ppo, 0), trainer.config.sampling)
    return rollout, trainer.make_experience(rollout, StepMetrics(CPU))


@pytest.fixture(scope="module")
def longest(models):
    """The one longest response of the first step, and all lengths."""
    lengths = judged(make(models))[0].lengths.tolist()
    return lengths.index(max(lengths)), lengths


@pytest.mark.parametrize("policy", ["mean", "drop"])
def test_a_sample_whose_reward_raises(models, longest, policy):
    row, lengths = longest
    poison = tuple(judged(make(models))[0].response_ids[row, : lengths[row]].tolist())
    source = poisoned_reward(f"{poison} in [tuple(ids) for ids in completion_ids]")
    trainer = make(models, guards=SHARE | {"failed_reward": policy}, reward=source)
    _, experience = judged(trainer)
    others = [float(n) for i, n in enumerate(lengths) if i != row]
    expected = torch.tensor([float(n) for n in lengths])
    expected[row] = sum(others) / len(others)
    torch.testing.assert_close(experience.scores, expected)
    (alarm,) = trainer.guards.drain()
    assert alarm.guard == "failed_reward" and not alarm.stop
    assert "1 of 8 samples have no score" in alarm.text
    assert "raised KeyError: 'gold'" in alarm.text and "prompt" in alarm.text
    silent = experience.advantages[row].eq(0).all() and torch.equal(
        experience.returns[row], experience.values[row]
    )
    assert bool(silent) == (policy == "drop")
    assert experience.advantages[(row + 1) % 8].any()
    # The whole batch, each row alone, then the others in one batch.
    calls = trainer.roles.rewards._sources[0]._function.__globals__["calls"]
    assert calls == [8, *[1] * 8, 7]


@pytest.mark.parametrize("value", ["None", "float('nan')", "float('-inf')"])
def test_a_score_that_is_none_or_not_finite(models, longest, value):
    row, lengths = longest
    source = poisoned_reward(
        f"len(completion_ids[{row}]) == {lengths[row]}",
        f"return [{value} if i == {row} else 2.0 for i in range(len(completion_ids))]",
    )
    trainer = make(models, guards=SHARE, reward=source)
    figures, alarms = step(trainer)
    assert figures["guards/failed_rewards"] == 1 and figures["objective/scores"] == 2.0
    assert [alarm.guard for alarm in alarms] == ["failed_reward"]
    assert figures["guards/skipped_updates"] == 0


@pytest.mark.parametrize(
    "guards", [{}, {"failed_reward": "stop", "failed_reward_share": 1.0}], ids=["share", "policy"]
)
def test_a_failed_reward_stops_the_run(models, guards):
    """One of eight is more than a tenth."""
    source = poisoned_reward("True", "return [None] + [1.0] * (len(completion_ids) - 1)")
    trainer = make(models, guards=guards, reward=source)
    with pytest.raises(RewardError, match=r"None, not a number.*prompt.*\(1 of 8 samples; guards"):
        step(trainer)


def test_an_outage_skips_updates_until_it_is_too_long(models):
    guards = {"failed_reward_share": 1.0, "nonfinite_steps": 2}
    trainer = make(models, guards=guards, reward=poisoned_reward("True"))
    before = list(state(trainer.actor))
    figures, alarms = step(trainer)
    assert figures["guards/failed_rewards"] == 8 and figures["guards/skipped_updates"] == UPDATES
    assert same(before, trainer.actor)
    assert len(alarms) == 1 and "8 of 8 samples have no score" in alarms[0].text
    assert "the step's update is dropped" in alarms[0].text
    assert [alarm.stop for alarm in step(trainer)[1]] == [False, True]
