"""Evaluation: held-out prompts through the run's own rollout engine and rewards.

In the loop it leaves no trace in training: weights, optimizers, data positions and random
generators are as they were. Responses have seeds of their own, the same at every evaluation, so
that two evaluations differ by the policy and not by the draw.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gearshift.engine.batch import PromptBatch, Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import Config, SamplingConfig
from gearshift.engine.data.heldout import HeldOut
from gearshift.engine.metrics import StepMetrics
from gearshift.engine.phase import Phase
from gearshift.engine.rewards.total import RewardSum, Scores
from gearshift.engine.zero.residence import Residence


def pass_at_k(passed: Tensor, k: int) -> Tensor:
    """[P] float64: the chance that one of k samples passes, from passed [P, n] bool, n >= k.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), 1 - C(n - c, k) / C(n, k) with c
    of n samples passing, as the product of 1 - k / i over i from n - c + 1 to n.
    """
    n = passed.shape[1]
    i = torch.arange(1, n + 1, dtype=torch.float64, device=passed.device)
    counted = i > n - passed.sum(1, keepdim=True)
    # Below k a factor would be negative, but then i = k is counted too, and makes the product 0.
    return 1 - torch.where(counted, (1 - k / i).clamp(min=0), 1.0).prod(1)


def check_columns(sets: list[HeldOut], rewards: RewardSum) -> None:
    """Raises ConfigError for a dataset without a column that a reward needs."""
    for held in sets:
        try:
            rewards.check(held.columns)
        except ValueError as error:
            raise ConfigError(f"eval.sources.{held.index}", str(error)) from None


class Sampler(Protocol):
    """The policy that answers, as roles.Actor is."""

    tokenizer: Any
    device: torch.device

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, progress: Any) -> Rollout:
        """One response per row."""
        ...


class Evaluation:
    """The evaluations of one run, or of a model that is not trained."""

    def __init__(
        self,
        config: Config,
        actor: Sampler,
        sets: list[HeldOut],
        rewards: RewardSum,
        residence: Residence | None = None,
    ):
        """residence: brings the states of what is trained where a phase wants them."""
        self.config, self.actor, self.sets, self.rewards = config, actor, sets, rewards
        self.residence = residence
        self.sampling = config.eval.sampling_of(config.sampling)

    def due(self, step: int) -> bool:
        """After `step` steps: before the first, every `eval.every`, and after the last."""
        last = step == self.config.run.steps
        return bool(self.sets) and (last or step % self.config.eval.every == 0)

    @torch.no_grad()
    def run(self, progress: Any = None) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Figures over all ranks, and samples of this rank's first prompts. A collective.

        Raises RewardError as a step of training does.
        """
        metrics, rows = StepMetrics(self.actor.device), []
        with _undisturbed(self.config.run.seed), metrics.phase("eval"):
            for held in self.sets:
                rows += self._evaluate(held, metrics, progress)
        return metrics.reduce(), rows

    def _evaluate(self, held: HeldOut, metrics: StepMetrics, progress: Any) -> list[dict[str, Any]]:
        rank, world = distributed.rank(), distributed.world_size()
        samples, tokenizer = self.config.eval.samples, self.actor.tokenizer
        prompts, counts = held.share(samples, rank, world, tokenizer)
        self._enter(Phase.GENERATE)
        rollout = self.actor.generate(prompts.to(self.actor.device), self.sampling, progress)
        self._enter(Phase.REWARDS)
        judged = self.rewards.scores(rollout, tokenizer)
        self._report(held.name, metrics, rollout, judged, counts.to(self.actor.device))
        shown = min(int(counts.sum()), self.config.run.samples)
        return [
            {"eval": held.name} | row
            for row in sample_rows(rollout, judged.total, tokenizer, shown)
        ]

    def _enter(self, phase: Phase) -> None:
        if self.residence:
            self.residence.enter(phase)

    def _report(
        self, name: str, metrics: StepMetrics, rollout: Rollout, judged: Scores, counts: Tensor
    ) -> None:
        """Rows are sample-major; counts [n] bool are of the prompts."""
        evaluation, rows = self.config.eval, counts.repeat(self.config.eval.samples)
        metrics.add_mean(f"eval/{name}/scores", judged.total, rows)
        metrics.add_mean(f"eval/{name}/response_length/mean", rollout.lengths, rows)
        metrics.add_mean(f"eval/{name}/response/finished_fraction", rollout.finished, rows)
        for reward, scores in judged.by_name.items():
            metrics.add_mean(f"eval/{name}/rewards/{reward}/mean", scores, rows)
            passed = (scores >= evaluation.pass_score).view(evaluation.samples, -1).T
            for k in evaluation.pass_at:
                figure = f"eval/{name}/rewards/{reward}/pass_at_{k}"
                metrics.add_mean(figure, pass_at_k(passed, k), counts)


def sample_rows(
    rollout: Rollout, scores: Tensor, tokenizer: Any, count: int
) -> list[dict[str, Any]]:
    """The first `count` rows as text: {"prompt", "response", "score"}."""
    rows = []
    for i in range(min(count, len(rollout))):
        live = rollout.response_ids[i][rollout.response_mask[i]]
        rows.append(
            {
                "prompt": rollout.columns["prompt"][i],
                "response": tokenizer.decode(live),
                "score": float(scores[i]),
            }
        )
    return rows


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """Random generators that begin at `seed` inside, and afterwards are as they were: a reward
    function may draw from them."""
    ours, numpys = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        distributed.seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)
