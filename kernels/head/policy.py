"""The PPO objective of one row, as a function of its log-prob and entropy, and its derivative.

    ratio     = exp(clamp(logp - old, -20, 20))
    surrogate = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)    (Schulman et al. 2017)
    surrogate = max(surrogate, dual_clip A)  where A < 0                    (Ye et al. 2020)
    loss      = w (-surrogate - entropy_coef entropy + kl_loss_coef kl)
    kl        = d (k1), d^2 / 2 (k2), exp(-d) - 1 + d with d clamped to +-20 (k3),  d = logp - ref
    clipped   = the clipped branch of the min is strictly the smaller one (dual clip not counted)

Beyond the clamp the ratio is constant, so its gradient is 0. The loss reaches the logits through
dlogp = dloss/dlogp alone (and the entropy), which is known as soon as the row's log-prob is: that
is what lets the fused head form gradients in the forward pass.
"""

import dataclasses
import math

import torch

from gearshift.kernels import arguments, dispatch
from gearshift.kernels.kl_gae import KL_ESTIMATORS, LOG_RATIO_LIMIT

if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    from gearshift.kernels.kl_gae import k3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The scalars of the loss; raises ValueError naming the one that makes no sense."""

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_estimator: str = "k3"

    def __post_init__(self):
        for name in ("clip_low", "clip_high", "kl_loss_coef"):
            arguments.check_not_negative(name, getattr(self, name))
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef={self.entropy_coef!r}: must be finite")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip={self.dual_clip!r}: must be above 1, or None for none")
        if self.kl_estimator not in KL_ESTIMATORS:
            choices = ", ".join(KL_ESTIMATORS)
            raise ValueError(f"kl_estimator={self.kl_estimator!r}: choose one of {choices}")


@dataclasses.dataclass(frozen=True)
class PolicyRows:
    """What the loss of each row needs besides the head: f32 [N] tensors (ref may be None)."""

    objective: Objective
    weights: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    ref_logprobs: torch.Tensor | None = None

    @property
    def entropy_coef(self) -> float:
        return self.objective.entropy_coef

    def take(self, index: slice | torch.Tensor) -> "PolicyRows":
        """The same objective over a subset of the rows."""
        tensors = (self.weights, self.old_logprobs, self.advantages, self.ref_logprobs)
        return PolicyRows(self.objective, *(None if t is None else t[index] for t in tensors))

    def terms(self, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per row: loss f32, dloss/dlogp at fixed entropy f32, clipped bool."""
        o, advantages = self.objective, self.advantages
        log_ratio = logprobs - self.old_logprobs
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp_()
        plain = ratio * advantages
        bounded = ratio.clamp(1 - o.clip_low, 1 + o.clip_high).mul_(advantages)
        clipped = bounded < plain
        surrogate = torch.minimum(plain, bounded)
        dead = clipped | (log_ratio.abs() > LOG_RATIO_LIMIT)
        if o.dual_clip is not None:
            floor = torch.where(advantages < 0, o.dual_clip * advantages, -math.inf)
            dead |= floor > surrogate
            surrogate = torch.maximum(surrogate, floor)
        loss = -surrogate - o.entropy_coef * entropy
        dlogp = torch.where(dead, 0.0, -plain)
        if o.kl_loss_coef:
            kl, dkl = kl_and_slope(logprobs - self.ref_logprobs, o.kl_estimator)
            loss += o.kl_loss_coef * kl
            dlogp += o.kl_loss_coef * dkl
        return self.weights * loss, self.weights * dlogp, clipped


def kl_and_slope(d: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimate of KL from d = logp - ref, and its derivative in d (Schulman 2020)."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d.square() / 2, d
    near = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    growth = torch.expm1(-near)
    return growth + near, torch.where(d.abs() > LOG_RATIO_LIMIT, 0.0, -growth)


def policy_loss_reference(
    logprobs: torch.Tensor, entropy: torch.Tensor, rows: PolicyRows
) -> torch.Tensor:
    """The loss of each row in plain PyTorch, differentiable in logprobs and entropy."""
    o, advantages = rows.objective, rows.advantages
    log_ratio = logprobs - rows.old_logprobs
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantages
    )
    if o.dual_clip is not None:
        dual = torch.maximum(surrogate, o.dual_clip * advantages)
        surrogate = torch.where(advantages < 0, dual, surrogate)
    loss = -surrogate - o.entropy_coef * entropy
    if o.kl_loss_coef:
        d = logprobs - rows.ref_logprobs
        near = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = {"k1": d, "k2": d**2 / 2, "k3": (-near).exp() - 1 + near}[o.kl_estimator]
        loss = loss + o.kl_loss_coef * kl
    return rows.weights * loss


if dispatch.HAS_TRITON:

    @triton.jit
    def policy_terms(
        logp,
        entropy,
        old,
        advantage,
        weight,
        ref,
        clip_low,
        clip_high,
        dual_clip,
        entropy_coef,
        kl_coef,
        DUAL: tl.constexpr,
        KL: tl.constexpr,
    ):
        """PolicyRows.terms for a block of rows; KL is 0 (off), 1, 2 or 3. NaN comes through."""
        LIMIT: tl.constexpr = 20.0
        NAN: tl.constexpr = tl.PropagateNan.ALL
        log_ratio = logp - old
        ratio = tl.exp(tl.clamp(log_ratio, -LIMIT, LIMIT, NAN))
        plain = ratio * advantage
        bounded = tl.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high, NAN) * advantage
        clipped = bounded < plain
        surrogate = tl.where(clipped, bounded, plain)
        dead = clipped | (tl.abs(log_ratio) > LIMIT)
        if DUAL:
            floor = tl.where(advantage < 0, dual_clip * advantage, float("-inf"))
            dead = dead | (floor > surrogate)
            surrogate = tl.maximum(surrogate, floor, propagate_nan=NAN)
        loss = -surrogate - entropy_coef * entropy
        dlogp = tl.where(dead, 0.0, -plain)
        if KL > 0:
            d = logp - ref
            if KL == 1:
                kl = d
                dkl = tl.full(d.shape, 1.0, tl.float32)
            elif KL == 2:
                kl = 0.5 * d * d
                dkl = d
            else:
                near = tl.clamp(d, -LIMIT, LIMIT, NAN)
                kl = k3(near)
                dkl = tl.where(tl.abs(d) > LIMIT, 0.0, 1.0 - tl.exp(-near))
            loss += kl_coef * kl
            dlogp += kl_coef * dkl
        return weight * loss, weight * dlogp, clipped
