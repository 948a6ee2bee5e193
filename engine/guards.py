"""The guards of a run: when an update is dropped, what is said, and when a run is stopped.

RULES look at a step's reduced figures: what each calls broken, its likely cause, and the knob to
turn. Others act earlier: on the gradient of an optimizer step, on parameters without one, and on
rewards that failed. The bounds are in the run's `guards:` section, their reasons in docs/guards.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.batch import Experience
from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import Config
from gearshift.engine.rewards.text import read_rows

# Where a value that is not finite may enter an update, in the order of the step: what comes first
# is the cause, what comes later may only have caught it.
_ENTRIES = ("scores", "logprobs", "ref_logprobs", "values", "returns", "advantages")
_MOST_NAMES = 5  # of parameters in one line

Figures = Mapping[str, float]
# Of |ratio - 1| before any update. In float32 SmolLM2-135M has 2.5e-5; in bf16 two passes over
# differently padded batches differ by up to 0.3 nats among 300 of its tokens.
RATIO_LIMITS = {torch.float32: 0.01, torch.bfloat16: 1.0}
_KL_ROUNDING = 0.01  # nats per response: no mean KL this close to 0 is called negative
_CONSTANT = 1e-6  # standard deviation over mean, above the rounding of float32 scores


@dataclass(frozen=True, kw_only=True)
class View:
    """What a rule knows beside the figures of the step."""

    config: Config
    dtype: torch.dtype  # of the actor's weights
    first_entropy: float | None  # nats per token, of the run's first step that trained the actor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One guard. `name` is its key in `guards:`; broken says what is wrong, "" if nothing is."""

    name: str
    broken: Callable[[Figures, View], str]
    cause: str


def ratio(figures: Figures, view: View) -> str:
    limit = view.config.guards.ratio_limit or RATIO_LIMITS[view.dtype]
    found = figures.get("rollout/ratio_first_max", 0.0)
    if not limit < found < math.inf:
        return ""
    return f"a ratio is {found:.3g} away from 1 before any update (guards.ratio_limit {limit:g})"


def negative_kl(figures: Figures, view: View) -> str:
    rows = view.config.ppo.rows_per_step
    kl, std = figures["objective/kl"], figures.get("objective/kl_std", math.nan)
    error = std / math.sqrt(rows)
    bound = max(view.config.guards.negative_kl_errors * error, _KL_ROUNDING)
    if not kl < -bound or math.isnan(error):
        return ""
    return f"the mean KL to the reference is {kl:.3g} nats (standard error {error:.2g})"


def entropy(figures: Figures, view: View) -> str:
    found, share = figures.get("policy/entropy_avg", math.nan), view.config.guards.entropy_share
    if view.first_entropy is None or not found < share * view.first_entropy:
        return ""
    return f"the entropy is {found:.3g} nats per token, {view.first_entropy:.3g} at the first step"


def explained_variance(figures: Figures, view: View) -> str:
    found = figures.get("critic/vf_explained_var", math.nan)
    if figures["step"] <= view.config.guards.explained_variance_after or not found < 0:
        return ""
    return f"the critic's explained variance is {found:.3g}"


def no_eos(figures: Figures, view: View) -> str:
    if figures["response/finished_fraction"] > 0:
        return ""
    limit = view.config.sampling.max_new_tokens
    return f"no response ended by itself within sampling.max_new_tokens {limit}"


def constant_reward(figures: Figures, view: View) -> str:
    mean, std = figures["objective/scores"], figures["objective/scores_std"]
    if view.config.ppo.rows_per_step < 2 or not std <= _CONSTANT * abs(mean):
        return ""
    return f"every score is {mean:.6g}"


RULES = (
    Rule(
        name="ratio",
        broken=ratio,
        cause="training and scoring see different inputs or weights: dropout in the model's code, "
        "another temperature, or ppo.old_logprobs=rollout with a sampler that differs (use train)",
    ),
    Rule(
        name="negative_kl",
        broken=negative_kl,
        cause="responses are not samples of the policy that is scored: sampling.top_k or top_p "
        "truncate it, or sampler and training path disagree (rollout/logprob_error_mean)",
    ),
    Rule(
        name="entropy",
        broken=entropy,
        cause="the policy collapses to a few responses: lower actor.optimizer.lr, raise "
        "ppo.kl_coef or ppo.entropy_coef, and read samples.jsonl for a hacked reward",
    ),
    Rule(
        name="explained_variance",
        broken=explained_variance,
        cause="the critic does not learn or is too fast: change critic.optimizer.lr, give it "
        "ppo.critic_warmup_steps, or bound the scores with ppo.score_clip",
    ),
    Rule(
        name="no_eos",
        broken=no_eos,
        cause="the end token is never sampled: a chat model without its template "
        "(data.chat_template), an end token the model was not trained on, or a limit too low; "
        "ppo.missing_eos rewards ending; guards.no_eos=ignore if it is meant",
    ),
    Rule(
        name="constant_reward",
        broken=constant_reward,
        cause="the reward does not tell responses apart, so nothing can be learned: look at "
        "rewards/<name>/mean, and at what rewards.N reads",
    ),
)


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
            self._dropped += self.config.ppo.updates("actor")

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
    for order, name in enumerate(_ENTRIES):
        if experience is None:
            break
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
