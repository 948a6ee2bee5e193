"""What a guard calls broken in a step's reduced figures, its likely cause, and the knob to turn.

The bounds and the number of steps in a row are in the run's `guards:` section; docs/guards.md
gives their reasons.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gearshift.engine.config.schema import Config

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
