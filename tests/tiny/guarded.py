"""Trainers with guards, what a step of theirs says, and whether an optimizer step wrote."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from gearshift.engine.config.schema import GuardConfig
from gearshift.engine.guards import Alarm
from tests.tiny import run as tiny_run

UPDATES = 4  # of a step: two epochs of two minibatches


def make(models, zero="zero0", guards=None, reward=None, **ppo):
    """A trainer whose guards are `guards`; reward: source of the reward function."""
    config = replace(tiny_run.config(models, zero, **ppo), guards=GuardConfig(**guards or {}))
    if reward:
        file = models / f"reward_{abs(hash(reward)):x}.py"
        file.write_text(reward)
        config = replace(config, rewards=[replace(config.rewards[0], function=f"{file}:score")])
    return tiny_run.trainer(config)


def step(trainer) -> tuple[dict[str, float], list[Alarm]]:
    figures, _ = trainer.step(tiny_run.prompts(trainer.ppo, trainer.steps_done))
    alarms = trainer.guards.drain()
    assert all("\n" not in alarm.text for alarm in alarms)
    return figures, alarms


def state(role) -> Iterator[torch.Tensor]:
    """Everything that an optimizer step writes, on this rank."""
    inner = getattr(role.optimizer, "optimizer", role.optimizer)
    flat = getattr(role.optimizer, "fp32_partitioned_groups_flat", [])
    masters = flat or [p for group in inner.param_groups for p in group["params"]]
    weights = [getattr(p, "ds_tensor", p) for p in role.engine.module.parameters()]
    moments = [v for entry in inner.state.values() for v in entry.values()]
    tensors = [*masters, *weights, *moments, torch.tensor(role.schedule.last_epoch)]
    return (torch.as_tensor(t).detach().clone() for t in tensors)


def same(before: list[torch.Tensor], role) -> bool:
    after = list(state(role))
    return len(before) == len(after) and all(map(torch.equal, before, after))
