"""A run whose critic learns alone, before its policy does: `run.task: critic`.

Value pretraining of VC-PPO (arXiv 2503.01491, section 4.1): the policy stays as it is, the critic
fits the sum of the rewards (lambda 1) of its fresh responses.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gearshift.engine.config.load import Resolved
from gearshift.engine.config.schema import CriticConfig

ORIGIN = "run.task=critic"


def settle(resolved: Resolved) -> Resolved:
    """The configuration with what the task decides, whatever it said before.

    A policy that stays is its own reference, unless another is named: there is no KL, and no
    reference is loaded. Nor is it evaluated. Prompts whose samples score alike teach a critic as
    much as any, so none are replaced.
    """
    config = resolved.config
    forced: dict[str, Any] = {"lam_critic": 1.0, "kl_controller": "fixed", "ptx_coef": 0.0}
    forced |= {"dynamic_sampling": 0, "dynamic_sampling_by": None}
    if config.reference.path is None:
        forced["kl_coef"] = 0.0
    decided = [*(f"ppo.{key}" for key in forced), "eval.sources", "eval.best_by"]
    origin = resolved.origin | dict.fromkeys(decided, ORIGIN)
    evaluation = replace(config.eval, sources=[], best_by=None)
    return Resolved(replace(config, ppo=replace(config.ppo, **forced), eval=evaluation), origin)


class Patience:
    """Ends the run once explained variance, of responses not yet learned from, has stopped rising.

    A step whose returns are all the same has none, and does not count.
    """

    def __init__(self, config: CriticConfig):
        self.config = config
        self.best, self.waited = -math.inf, 0

    def see(self, figures: Mapping[str, float]) -> None:
        """The figures of a step, the same on every rank."""
        found = figures["critic/vf_explained_var"]
        if found > self.best + self.config.least_rise:
            self.best, self.waited = found, 0
        elif not math.isnan(found):
            self.waited += 1

    @property
    def over(self) -> bool:
        return self.waited >= self.config.patience

    def __str__(self) -> str:
        share, steps = self.config.least_rise, self.config.patience
        return (
            f"explained variance did not rise by {share:g} above {self.best:.3f} in {steps} steps"
        )

    def state_dict(self) -> dict[str, Any]:
        best = None if math.isinf(self.best) else self.best
        return {"best": best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = -math.inf if state["best"] is None else state["best"]
        self.waited = state["waited"]
