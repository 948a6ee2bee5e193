"""PPO's arithmetic over the kernels' ops: pure functions of tensors, and the KL coefficient.

B rows on this rank, R response tokens; masked positions are exactly 0 in every result.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gearshift.engine.config.schema import PPOConfig
from gearshift.kernels import ops


def token_weights(mask: Tensor, aggregation: str, rows: int, tokens: Tensor) -> Tensor:
    """[B, R] float32 weights of the token losses; they sum to 1 over a whole optimizer step.

    rows and tokens (0-dim) count the step's responses and live tokens over all ranks and
    micro-batches, so neither the micro-batch size nor the world size changes the update.
    seq_sum weighs every token 1 / rows: longer responses then count for more.
    """
    live = mask.float()
    if aggregation == "seq_mean_token_mean":
        return live / (live.sum(1, keepdim=True).clamp(min=1) * rows)
    if aggregation == "token_mean":
        return live / tokens
    return live / rows


def shape_scores(scores: Tensor, finished: Tensor, config: PPOConfig) -> Tensor:
    """[B] scores as they enter the reward: affine, missing-EOS rule, then the clip."""
    shaped = (scores - config.score_shift) / config.score_scale
    if config.missing_eos == "replace":
        shaped = torch.where(finished, shaped, -config.missing_eos_value)
    elif config.missing_eos == "subtract":
        shaped = torch.where(finished, shaped, shaped - config.missing_eos_value)
    if config.score_clip is not None:
        shaped = shaped.clamp(-config.score_clip, config.score_clip)
    return shaped


def estimate_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    scores: Tensor,
    *,
    config: PPOConfig,
    kl_coef: float,
    bootstrap_values: Tensor | None = None,
    token_rewards: Tensor | None = None,
    group=None,
) -> ops.Advantages:
    """Rewards, advantages as trained on, returns and per-token KL, all [B, R] float32.

    gae: reward_t = -kl_coef * kl_t + [t last] * score, GAE (Schulman et al. 2016); returns by
    lam_critic, advantages by a lambda of each length with lam_length_alpha (VC-PPO, VAPO).
    reinforce_pp: the same rewards, returns-to-go without a critic (Hu et al. 2025).
    rloo: leave-one-out baseline over the prompt's samples (Ahmadian et al. 2024).
    grpo: (score - mean) / std over the prompt's samples (Shao et al. 2024); without the std with
    policy_loss dr_grpo (Liu et al. 2025).
    token_rewards: [B, R], 0 where masked: parts of the scores that belong to tokens of their own;
    only the rest enters at the last token.
    gae and reinforce_pp are whitened over `group`, the ranks of the whole rollout. The rows of one
    prompt are on one rank, sample-major: row k * prompts + p is sample k of prompt p.
    """
    gae = config.estimator == "gae"
    discounts = {
        "gamma": config.gamma,
        "lam": config.lam if gae else 1.0,
        "lam_critic": config.lam_critic,
        "lam_length_alpha": config.lam_length_alpha,
    }
    result = ops.kl_reward_gae(
        logprobs,
        ref_logprobs,
        values if gae else torch.zeros_like(logprobs),
        mask,
        scores if token_rewards is None else scores - token_rewards.sum(1),
        kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        bootstrap_values=bootstrap_values if gae else None,
        **discounts,
    )
    if token_rewards is not None:
        result = _with_token_rewards(result, token_rewards, mask, discounts)
    advantages = result.advantages
    if config.estimator in ("rloo", "grpo"):
        baselined = _against_group(result.rewards.sum(1), config)
        advantages = torch.where(mask, baselined[:, None], 0.0)
    elif config.whiten_advantages:
        advantages = ops.whiten(advantages, mask, group=group)
    return result._replace(advantages=advantages)


def _with_token_rewards(
    result: ops.Advantages, token_rewards: Tensor, mask: Tensor, discounts: dict
) -> ops.Advantages:
    """Rewards, advantages and returns are linear in what is rewarded: added up, those of the tokens
    alone, which the kernel takes as -kl_coef * (logprobs - ref_logprobs)."""
    none = torch.zeros_like(token_rewards)
    own = ops.kl_reward_gae(token_rewards, none, none, mask, none.sum(1), kl_coef=-1.0, **discounts)
    return result._replace(
        rewards=result.rewards + own.rewards,
        advantages=result.advantages + own.advantages,
        returns=result.returns + own.returns,
    )


def _against_group(totals: Tensor, config: PPOConfig) -> Tensor:
    """[B] sequence rewards against those of the same prompt's other samples."""
    samples = config.samples_per_prompt
    grouped = totals.view(samples, -1)
    if config.estimator == "rloo":
        others = (grouped.sum(0) - grouped) / (samples - 1)
        return (grouped - others).flatten()
    centred = grouped - grouped.mean(0)
    if config.policy_loss == "dr_grpo":
        return centred.flatten()
    std = grouped.std(0)
    # Equal rewards differ by rounding only: dividing by that noise would make a signal of it.
    constant = std < 1e-6 * grouped.abs().amax(0)
    return torch.where(constant, 0.0, centred / (std + 1e-8)).flatten()


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, cap: float = math.inf) -> Tensor:
    """Truncated importance weights min(pi_train / pi_rollout, cap), [B, R] (Yao et al. 2025)."""
    return (logprobs - rollout_logprobs).clamp(-20, 20).exp().clamp(max=cap)


class Correction(NamedTuple):
    """Of the difference between the sampler and the training path.

    factors: [B, R] float32, of the weights of the policy's token losses. tokens, responses: what
    each rule changed or removed, [B, R] and [B] bool, by the name of its figure.
    """

    factors: Tensor
    tokens: dict[str, Tensor]
    responses: dict[str, Tensor]


def correct_rollout(
    logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: PPOConfig
) -> Correction:
    """The off-policy corrections that are on, each by itself; w = pi_train / pi_rollout per token.

    rollout_is_cap: the factor is min(w, cap) (Yao et al. 2025).
    rollout_is_low, _high: w inside, 0 outside (IcePop, arXiv 2510.18855).
    rollout_seq_low, _high: 0 for responses whose geometric mean of w is outside (NeMo RL's
    seq-mask-tis, verl's geometric rejection).
    rollout_max_error: 0 for responses whose mean |log w| is larger.
    """
    log_ratio = torch.where(mask, logprobs - rollout_logprobs, 0.0)
    weights, lengths = importance_weights(logprobs, rollout_logprobs), mask.sum(1)
    factors, tokens, responses = torch.ones_like(weights), {}, {}
    cap, token_band = config.rollout_is_cap, (config.rollout_is_low, config.rollout_is_high)
    if cap is not None or any(token_band):
        factors = weights.clamp(max=cap or math.inf)
    if cap is not None:
        tokens["is_truncated"] = weights > cap
    if any(token_band):
        tokens["is_masked"] = _outside(weights, *token_band)
    if config.rollout_seq_low or config.rollout_seq_high:
        geometric = (log_ratio.sum(1) / lengths).exp()
        band = config.rollout_seq_low, config.rollout_seq_high
        responses["seq_masked"] = _outside(geometric, *band)
    if config.rollout_max_error is not None:
        error = log_ratio.abs().sum(1) / lengths
        responses["rejected"] = error > config.rollout_max_error
    if "is_masked" in tokens:
        factors = torch.where(tokens["is_masked"], 0.0, factors)
    for removed in responses.values():
        factors = torch.where(removed[:, None], 0.0, factors)
    return Correction(factors, tokens, responses)


def _outside(values: Tensor, low: float | None, high: float | None) -> Tensor:
    return (values < (low or 0.0)) | (values > (high or math.inf))


class KLController:
    """The KL coefficient. `adapt` is Ziegler et al. 2019, section 2.2; fixed leaves it alone."""

    def __init__(self, config: PPOConfig):
        self.config, self.coef = config, config.kl_coef

    def adapt(self, kl: float, responses: int) -> None:
        """After a step: `kl` is the mean over responses of the KL summed over tokens, in nats.

        A KL that is not finite, of a step whose update was dropped, leaves the coefficient alone.
        """
        if self.config.kl_controller == "adaptive" and math.isfinite(kl):
            error = min(max(kl / self.config.kl_target - 1, -0.2), 0.2)
            self.coef *= 1 + error * responses / self.config.kl_horizon
