"""The guards of a run: when an update is dropped, what is said, and when a run is stopped.

The rules over a step's figures are in guard_rules.py. Here are those that act earlier: on the
gradient of an optimizer step, on parameters without one, and on rewards that failed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.batch import Experience
from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import Config
from gearshift.engine.guard_rules import RULES, Figures, View
from gearshift.engine.rewards.text import read_rows

# Where a value that is not finite may enter an update, in the order of the step: what comes first
# is the cause, what comes later may only have caught it.
_ENTRIES = ("scores", "logprobs", "ref_logprobs", "values", "returns", "advantages")
_MOST_NAMES = 5  # of parameters in one line


class GuardStop(RuntimeError):
    """A guard ends the run; one line."""


@dataclass(frozen=True)
class Alarm:
    """What a guard says, in one line. stop: the run should end."""

    guard: str
    text: str
    stop: bool = False


@dataclass(frozen=True)
class Piece:
    """A micro-batch as an update saw it."""

    micro: Experience
    loss: Tensor  # 0-dim
    outputs: Tensor  # [N], of the live tokens: log-probs or values


class Guards:
    """Every rank holds one and all of them decide alike.

    dtype: of the actor's weights.
    """

    def __init__(self, config: Config, tokenizer: Any, dtype: torch.dtype):
        self.config, self.guards = config, config.guards
        self._tokenizer, self._dtype = tokenizer, dtype
        self._first_entropy: float | None = None
        self._streaks: dict[str, int] = {}
        self._alarms: list[Alarm] = []
        self._start_step()

    def _start_step(self) -> None:
        self._dropped = self._failed_rewards = 0
        self.may_update = True  # there are scores to learn from
        self._blamed: set[str] = set()
        self._experience: Experience | None = None

    def state_dict(self) -> dict[str, Any]:
        """What spans steps, as plain values; taken between steps."""
        return {"first_entropy": self._first_entropy, "streaks": dict(self._streaks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict gave."""
        self._first_entropy, self._streaks = state["first_entropy"], dict(state["streaks"])

    def check_rewards(self, failed: int, fault: str, usable: bool) -> None:
        """After scoring; failed: samples without a score over all ranks.

        fault: one of them in words, the same on every rank. usable: whether any has a score; where
        none has, `may_update` turns False and the step's updates count as dropped.
        """
        if not failed:
            return
        self._failed_rewards, self.may_update = failed, usable
        rows, policy = self.config.ppo.rows_per_step, self.guards.failed_reward
        then = {"mean": "given the mean of the others", "drop": "left out of the update"}
        done = then[policy] if usable else "the step's update is dropped"
        count = f"{failed} of {rows} samples have no score, {done}"
        self._say("failed_reward", f"{count}; {fault} (guards.failed_reward={policy})")
        if not usable:
            self._dropped += self.config.ppo.optimizer_steps_per_step

    def take(self, experience: Experience) -> None:
        """What this step's updates read; kept until the step ends, to find a culprit in."""
        self._experience = experience

    def check_reached(self, role: str, unreached: Sequence[str]) -> None:
        """Before an optimizer step; unreached: parameters of the role that got no gradient.

        Raises GuardStop where guards.frozen=stop.
        """
        if not unreached or self.guards.frozen == "ignore":
            return
        shown = ", ".join(unreached[:_MOST_NAMES])
        more = f" and {len(unreached) - _MOST_NAMES} more" if len(unreached) > _MOST_NAMES else ""
        alarm = self._say(
            "frozen",
            f"the {role} has {len(unreached)} trainable parameters without a gradient: {shown}"
            f"{more}; they are not part of its forward, or cut off by a detach or an in-place "
            "change in the model's code; harmless for experts that no token was routed to "
            "(guards.frozen=ignore)",
            stop=self.guards.frozen == "stop",
        )
        if alarm.stop:
            raise GuardStop(alarm.text)

    def check_norm(self, role: str, norm: float, pieces: Sequence[Piece]) -> None:
        """After an optimizer step; a norm that is not finite says that it was dropped.

        Says once per step and role which sample it was: a collective then.
        """
        if math.isfinite(norm):
            return
        self._dropped += 1
        if role in self._blamed:
            return
        self._blamed.add(role)
        culprit = blame(self._experience, pieces, self._tokenizer)
        self._say(
            "nonfinite",
            f"an update of the {role} was dropped, its gradient is not finite: {culprit}; likely "
            "an overflow or a learning rate too high: look at that sample, lower "
            f"{role}.optimizer.lr, or set gradient_clipping in {role}.deepspeed (guards.nonfinite)",
        )

    def watch(self, figures: Figures) -> dict[str, float]:
        """Ends a step: its reduced figures, with what the guards counted, after every rule."""
        counted = {
            "guards/skipped_updates": float(self._dropped),
            "guards/failed_rewards": float(self._failed_rewards),
        }
        figures = {**figures, **counted}
        self._start_step()
        entropy = figures.get("policy/entropy_avg", math.nan)
        if self._first_entropy is None and math.isfinite(entropy):
            self._first_entropy = entropy
        self._count_dropped(figures)
        view = View(config=self.config, dtype=self._dtype, first_entropy=self._first_entropy)
        for rule in RULES:
            action = getattr(self.guards, rule.name)
            found = "" if action == "ignore" else rule.broken(figures, view)
            steps = getattr(self.guards, f"{rule.name}_steps", 1)
            streak = self._streak(rule.name, bool(found))
            if is_due(streak, steps):
                lasting = f" for {streak} steps in a row" if streak > 1 else ""
                text = f"{found}{lasting}; {rule.cause}"
                self._say(rule.name, text, stop=action == "stop")
        return dict(sorted(figures.items()))

    def drain(self) -> list[Alarm]:
        """What was said since the last call."""
        alarms, self._alarms = self._alarms, []
        return alarms

    def _count_dropped(self, figures: Figures) -> None:
        streak = self._streak("nonfinite", figures["guards/skipped_updates"] > 0)
        limit = 1 if self.guards.nonfinite == "stop" else self.guards.nonfinite_steps
        if streak >= limit:
            self._say(
                "nonfinite",
                f"updates were dropped in {streak} PPO steps in a row; the lines before say why "
                f"(guards.nonfinite={self.guards.nonfinite}, guards.nonfinite_steps)",
                stop=True,
            )

    def _streak(self, name: str, broken: bool) -> int:
        self._streaks[name] = self._streaks.get(name, 0) + 1 if broken else 0
        return self._streaks[name]

    def _say(self, guard: str, text: str, *, stop: bool = False) -> Alarm:
        alarm = Alarm(guard, " ".join(f"guard {guard}: {text}".split()), stop)
        self._alarms.append(alarm)
        return alarm


def is_due(streak: int, steps: int) -> bool:
    """After `steps` in a row, and again whenever that has doubled: a lasting fault is few lines."""
    times, rest = divmod(streak, steps)
    return times > 0 and not rest and times & (times - 1) == 0


def blame(experience: Experience | None, pieces: Sequence[Piece], tokenizer: Any) -> str:
    """The sample whose values are not finite, over all ranks; a collective.

    experience: all of this rank's rows, as whitening spreads one row's fault over every minibatch.
    """
    found = distributed.all_gather_objects(_first_culprit(experience, pieces, tokenizer))
    # min: where a value entered earlier in the step, on whichever rank.
    return min(found)[1]


def _first_culprit(
    experience: Experience | None, pieces: Sequence[Piece], tokenizer: Any
) -> tuple[int, str]:
    """(how late in the step, what is said of it)."""
    for order, name in enumerate(_ENTRIES if experience is not None else ()):
        values, live = getattr(experience, name), experience.response_mask
        by_token = values.dim() == 2
        row = _first_bad_row(torch.where(live, values, 0.0) if by_token else values[:, None])
        if row is not None:
            return order, f"the {name} of {_sample(experience, row, tokenizer)}"
    for piece in pieces:
        live = piece.micro.response_mask
        row = _first_bad_row(torch.zeros_like(live.float()).masked_scatter(live, piece.outputs))
        if row is not None:
            where = _sample(piece.micro, row, tokenizer)
            return len(_ENTRIES), f"what the model computes of {where}"
    for piece in pieces:
        if not torch.isfinite(piece.loss):
            rows = ", ".join(map(str, piece.micro.row_ids.tolist()))
            return len(_ENTRIES) + 1, f"the loss of rows {rows}"
    return len(_ENTRIES) + 2, "the loss of every sample is finite, so it is the backward pass"


def _first_bad_row(values: Tensor) -> int | None:
    bad = (~torch.isfinite(values)).any(1).nonzero()
    return int(bad[0]) if len(bad) else None


def _sample(rows: Experience, row: int, tokenizer: Any) -> str:
    alone = rows.rows(torch.tensor([row], device=rows.row_ids.device))
    text = read_rows(alone, tokenizer).row(0)
    return f"row {int(rows.row_ids[row])}, {text}"
