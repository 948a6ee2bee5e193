"""A task whose optimal policy is known: every short response has a score in a table.

With gamma = 1 and the k1 KL in the reward, PPO maximises E[score] - beta KL(pi || pi_ref), whose
only maximum is pi*(y|x) = pi_ref(y|x) exp(score(x, y) / beta) / Z(x) (Ziegler et al. 2019, eq. 2).
All responses can be listed, so KL(pi || pi*) is exact.
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gearshift.engine.attention import packed
from gearshift.engine.batch import PromptBatch
from gearshift.engine.config.schema import Config, OptimizerConfig, RunConfig
from gearshift.engine.data.streams import left_padded
from gearshift.engine.ppo import PPOTrainer
from tests.tiny import models as tiny
from tests.tiny import run as tiny_run

VOCABULARY, END, LONGEST = 4, 2, 2
PROMPTS = [[1, 0], [0, 1, 1]]

REWARD = """
import json, pathlib
TABLE = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())

def score(prompts, completion_ids, prompt_index, **columns):
    return [TABLE[i][str(ids)] for i, ids in zip(prompt_index, completion_ids)]
"""


def all_responses() -> list[list[int]]:
    """Every response of at most LONGEST tokens that ends at END or at the limit: 13 of them."""
    going = [i for i in range(VOCABULARY) if i != END]
    found = []
    for length in range(LONGEST):
        for start in itertools.product(going, repeat=length):
            found.append([*start, END])
            if length == LONGEST - 1:
                found += [[*start, last] for last in going]
    return found


def write(directory: Path) -> Path:
    """The policy (also the reference) and a table of normal scores."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "initializer_range": 0.2}
    tiny.save_policy(directory / "policy", VOCABULARY, **shape)
    generator = torch.Generator().manual_seed(0)
    table = [
        {str(y): float(torch.randn((), generator=generator)) for y in all_responses()}
        for _ in PROMPTS
    ]
    (directory / "reward.json").write_text(json.dumps(table))
    (directory / "reward.py").write_text(REWARD)
    return directory


def config(directory: Path, steps: int, rows: int, **ppo) -> Config:
    """`rows` responses per PPO step in two minibatches; `ppo` changes the algorithm."""
    settings = {"prompts_per_step": rows, "minibatch_size": rows // 2, "micro_batch_size": rows}
    settings |= {"score_batch_size": rows, "epochs": 2, "kl_coef": 1.0, "value_clip": None}
    base = tiny_run.config(directory, **settings | ppo)
    return replace(
        base,
        run=RunConfig(steps=steps),
        actor=replace(base.actor, optimizer=OptimizerConfig(lr=6e-3)),
        critic=replace(base.critic, optimizer=OptimizerConfig(lr=1.2e-2)),
        sampling=replace(base.sampling, max_new_tokens=LONGEST),
    )


def with_schedule(config: Config, schedule: str) -> Config:
    """The same run with another learning-rate schedule of both models."""
    changed = {
        role: replace(own, optimizer=replace(own.optimizer, schedule=schedule))
        for role, own in (("actor", config.actor), ("critic", config.critic))
    }
    return replace(config, **changed)


def prompt_batch(rows: int, step: int) -> PromptBatch:
    which = [row % len(PROMPTS) for row in range(rows)]
    ids, mask = left_padded([PROMPTS[i] for i in which], pad=0)
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=mask,
        row_ids=torch.arange(rows) + step * rows,
        columns={"prompt_index": which},
    )


@torch.no_grad()
def response_logprobs(lm: torch.nn.Module) -> Tensor:
    """[prompts, responses] float64 log pi(y|x), by the model's own forward and no code of ours."""
    responses = all_responses()
    table = torch.zeros(len(PROMPTS), len(responses), dtype=torch.float64)
    for x, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt + y + [END] * (LONGEST - len(y)) for y in responses])
        with packed.padded(lm):
            logprobs = lm(input_ids=ids).logits.double().log_softmax(-1)
        for i, y in enumerate(responses):
            table[x, i] = sum(logprobs[i, len(prompt) - 1 + t, token] for t, token in enumerate(y))
    return table


@dataclass
class Solution:
    """The exact optimum of a table and how far policies are from it."""

    reference: Tensor  # [prompts, responses] log pi_ref
    scores: Tensor
    beta: float

    @property
    def optimal(self) -> Tensor:
        return (self.reference + self.scores / self.beta).log_softmax(1)

    def gap(self, logprobs: Tensor) -> float:
        """KL(pi || pi*) in nats, mean over the prompts."""
        return divergence(logprobs, self.optimal)


def divergence(first: Tensor, second: Tensor) -> float:
    return float((first.exp() * (first - second)).sum(1).mean())


def solve(directory: Path, lm: torch.nn.Module, beta: float) -> Solution:
    """lm: the policy before training."""
    table = json.loads((directory / "reward.json").read_text())
    scores = torch.tensor([list(row.values()) for row in table], dtype=torch.float64)
    return Solution(response_logprobs(lm), scores, beta)


def train(config: Config, directory: Path) -> tuple[PPOTrainer, Solution, list[dict]]:
    """config.run.steps PPO steps; returns the figures of each."""
    trainer = tiny_run.trainer(config, steps=config.run.steps)
    solution = solve(directory, trainer.actor.lm, config.ppo.kl_coef)
    if trainer.backlog:
        trainer.backlog.fill(prompt_batch(config.ppo.rows_per_step, config.run.steps))
    figures = [
        trainer.step(prompt_batch(config.ppo.rows_per_step, step))[0]
        for step in range(config.run.steps)
    ]
    return trainer, solution, figures
