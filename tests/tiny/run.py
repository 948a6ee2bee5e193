"""A whole PPO run of tiny models: its configuration, prompts and roles, for one rank or several."""

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gearshift.engine import assemble
from gearshift.engine.batch import PromptBatch
from gearshift.engine.checkpoint.save import Checkpoints
from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import (
    Config,
    CriticConfig,
    OptimizerConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainedConfig,
)
from gearshift.engine.ppo import PPOTrainer
from tests.tiny import models as tiny

VOCABULARY = 12  # small, so that random policies sample the end token often: ragged responses
STEPS = 100  # of the learning-rate schedule

REWARD = """
def score(prompts, completion_ids, **columns):
    return [sum(i % 5 for i in ids) / 4 - 1.5 for ids in completion_ids]
"""


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process only; leaves the environment as it was."""
    before = dict(os.environ)
    distributed.start(1)
    yield
    os.environ.clear()
    os.environ.update(before)


def write_models(directory: Path) -> Path:
    """A policy, one with tied weights, and the reward function, for `config`."""
    spread = {"initializer_range": 0.2}  # far from uniform: gradients well above rounding
    tiny.save_policy(directory / "policy", VOCABULARY, **spread)
    tiny.save_policy(directory / "tied", VOCABULARY, seed=2, tie_word_embeddings=True, **spread)
    tiny.save_reward(directory / "reward", VOCABULARY, seed=3, **spread)
    (directory / "reward.py").write_text(REWARD)
    for role in ("actor", "critic"):  # ds_configs/ has stage 2 in bf16 only
        settings = ds_config.load(f"{role}_zero0") | {"zero_optimization": {"stage": 2}}
        (directory / f"{role}_zero2.json").write_text(json.dumps(settings))
    return directory


def config(
    directory: Path, zero: str = "zero0", model: str = "policy", lr: float = 1e-3, **ppo
) -> Config:
    """Two epochs of two minibatches of four ragged responses; `ppo` changes the algorithm.

    zero: the end of the names in ds_configs/, or of files in `directory`.
    """
    settings = {"prompts_per_step": 8, "minibatch_size": 4, "micro_batch_size": 2, "epochs": 2}
    # Adam divides by the gradient's size: this keeps rounding of tiny gradients in proportion.
    optimizer = OptimizerConfig(lr=lr, eps=1e-6)
    actor, critic = (_deepspeed(directory, f"{role}_{zero}.json") for role in ("actor", "critic"))
    return Config(
        actor=TrainedConfig(path=str(directory / model), deepspeed=actor, optimizer=optimizer),
        critic=CriticConfig(deepspeed=critic, optimizer=optimizer),
        reference=ReferenceConfig(deepspeed="frozen_zero3.json"),
        rewards=[RewardConfig(function=f"{directory / 'reward.py'}:score")],
        sampling=SamplingConfig(max_new_tokens=8),
        rollout=RolloutConfig(tp=1),
        ppo=PPOConfig(**settings | ppo),
    )


def _deepspeed(directory: Path, name: str) -> str:
    return str(directory / name) if (directory / name).exists() else name


def with_critic(config: Config, model: Path) -> Config:
    """The same run with a critic that starts from `model`."""
    return replace(config, critic=replace(config.critic, path=str(model)))


def trainer(config: Config, pretrain=None, steps: int = STEPS) -> PPOTrainer:
    """Fresh models from disk. steps: length of the learning-rate schedule."""
    blueprint = assemble.draw_up(replace(config, data=replace(config.data, max_prompt_tokens=16)))
    return PPOTrainer(config, assemble.build(blueprint, steps, pretrain))


def prompts(ppo: PPOConfig, step: int) -> PromptBatch:
    """This rank's ragged prompts of a step, dealt as the data stream deals them."""
    rank, world, count = distributed.rank(), distributed.world_size(), ppo.prompts_per_step
    mine = list(range(rank, count, world)) * ppo.samples_per_prompt
    lengths = [1 + (p + step) % 4 for p in mine]
    ids, mask = torch.zeros(len(mine), 4, dtype=torch.long), torch.zeros(len(mine), 4).bool()
    for row, (p, length) in enumerate(zip(mine, lengths, strict=True)):
        draw = random.Random(1000 * step + p)
        ids[row, 4 - length :] = torch.tensor(
            [draw.randrange(3, VOCABULARY) for _ in range(length)]
        )
        mask[row, 4 - length :] = True
    base = step * ppo.rows_per_step
    row_ids = [
        base + k * count + p
        for k in range(ppo.samples_per_prompt)
        for p in range(rank, count, world)
    ]
    return PromptBatch(prompt_ids=ids, prompt_mask=mask, row_ids=torch.tensor(row_ids), columns={})


def save(trainer: PPOTrainer, folder: Path, **settings: Any) -> None:
    """One whole checkpoint in `folder`. settings: as of Checkpoints."""
    checkpoints = Checkpoints(folder, keep=1, background=False, **settings)
    checkpoints.take(trainer, {}, reward=0.0)
    checkpoints.publish()
    checkpoints.settle()


def same_step(one: PPOTrainer, other: PPOTrainer, step: int) -> None:
    """Both make a step, and are then the same to the bit: figures and the actor's state."""
    pair = [trainer.step(prompts(trainer.ppo, step)) for trainer in (one, other)]
    costs = ("timing_s/", "memory_gb/", "states_gb/", "throughput/")
    for key, value in pair[0][0].items():
        assert key.startswith(costs) or pair[1][0][key] == value, key
    states = [trainer.actor.lm.state_dict() for trainer in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
