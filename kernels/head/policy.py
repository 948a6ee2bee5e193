"""The policy's objective of one row, as a function of its log-prob and entropy, and its derivative.

    ratio   = exp(clamp(logp - old, -20, 20))
    clip(r) = r kept in [1 - clip_low, 1 + clip_high]
    loss    = w (-surrogate - entropy_coef entropy + kl_loss_coef kl)
    kl      = d (k1), d^2 / 2 (k2), exp(-d) - 1 + d with d clamped to +-20 (k3),  d = logp - ref

    policy_loss  surrogate; stop() is a constant to the derivative
    ppo          min(ratio A, clip(ratio) A), at A < 0 at least dual_clip A
                 (Schulman et al. 2017; Ye et al. 2020)
    gspo         the same with ratio = s exp(logp - stop(logp)), where log s is stop(mean of
                 logp - old over the sequence) (GSPO-token, arXiv 2507.18071, section 4.3)
    cispo        stop(clip(ratio)) A logp (MiniMax-M1, arXiv 2506.13585)
    sapo         4 / tau sigmoid(tau (ratio - 1)) A, tau by the sign of A (arXiv 2511.20347)
    dis          ratio A inside the clip's range, 0 outside, either sign of A (arXiv 2607.07508)

`clipped` tells rows whose ratio the clip holds: for ppo and gspo where its branch of the min is
strictly the smaller one (dual clip not counted), for cispo and dis outside the range, sapo none.
Beyond +-20 the ratio is constant, so its gradient is 0. The loss reaches the logits through
dlogp = dloss/dlogp alone (and the entropy), which is known as soon as the row's log-prob is: that
is what lets the fused head form gradients in the forward pass.
"""

import dataclasses
import math

import torch

from gearshift.kernels import arguments, dispatch
from gearshift.kernels.kl_gae import KL_ESTIMATORS, LOG_RATIO_LIMIT

POLICY_LOSSES = ("ppo", "gspo", "cispo", "sapo", "dis")  # the kernel knows them by their place
SAPO_TAU = (1.0, 1.05)  # for A > 0 and otherwise, as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The scalars of the loss; raises ValueError naming the one that makes no sense."""

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_estimator: str = "k3"
    policy_loss: str = "ppo"
    sapo_tau: tuple[float, float] = SAPO_TAU

    def __post_init__(self):
        if self.policy_loss not in POLICY_LOSSES:
            choices = ", ".join(POLICY_LOSSES)
            raise ValueError(f"policy_loss={self.policy_loss!r}: choose one of {choices}")
        if self.dual_clip is not None and self.policy_loss not in ("ppo", "gspo"):
            raise ValueError(
                f"dual_clip={self.dual_clip!r}: policy_loss={self.policy_loss} has none"
            )
        if not all(0 < tau < math.inf for tau in self.sapo_tau):
            raise ValueError(f"sapo_tau={self.sapo_tau!r}: both must be above 0")
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
    """What the loss of each row needs besides the head: f32 [N] tensors. ref may be None; sequence,
    the mean of logp - old over the row's sequence, is for gspo alone."""

    objective: Objective
    weights: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    ref_logprobs: torch.Tensor | None = None
    sequence: torch.Tensor | None = None

    @property
    def entropy_coef(self) -> float:
        return self.objective.entropy_coef

    def take(self, index: slice | torch.Tensor) -> "PolicyRows":
        """The same objective over a subset of the rows."""
        tensors = (self.weights, self.old_logprobs, self.advantages, self.ref_logprobs)
        taken = (None if t is None else t[index] for t in (*tensors, self.sequence))
        return PolicyRows(self.objective, *taken)

    def terms(self, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per row: loss f32, dloss/dlogp at fixed entropy f32, clipped bool."""
        o = self.objective
        surrogate, dlogp, clipped = self._surrogate(logprobs)
        loss = -surrogate - o.entropy_coef * entropy
        if o.kl_loss_coef:
            kl, dkl = kl_and_slope(logprobs - self.ref_logprobs, o.kl_estimator)
            loss += o.kl_loss_coef * kl
            dlogp += o.kl_loss_coef * dkl
        return self.weights * loss, self.weights * dlogp, clipped

    def _surrogate(self, logprobs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per row: what policy_loss maximises, the derivative of its negative, clipped."""
        o, advantages = self.objective, self.advantages
        log_ratio = logprobs - self.old_logprobs if self.sequence is None else self.sequence
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp_()
        plain, beyond = ratio * advantages, log_ratio.abs() > LOG_RATIO_LIMIT
        bounded = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
        if o.policy_loss == "sapo":
            tau = _temperatures(advantages, o.sapo_tau)
            x = tau * (ratio - 1)
            gate = torch.sigmoid(x)
            slope = torch.where(beyond, 0.0, -4 * gate * torch.sigmoid(-x) * plain)
            return 4 / tau * gate * advantages, slope, torch.zeros_like(beyond)
        outside = bounded != ratio
        bounded.mul_(advantages)
        if o.policy_loss == "cispo":
            return bounded * logprobs, -bounded, outside
        if o.policy_loss == "dis":
            kept = torch.where(outside, 0.0, plain)
            return kept, torch.where(beyond, 0.0, -kept), outside
        clipped = bounded < plain
        surrogate = torch.minimum(plain, bounded)
        dead = clipped | beyond
        if o.dual_clip is not None:
            floor = torch.where(advantages < 0, o.dual_clip * advantages, -math.inf)
            dead |= floor > surrogate
            surrogate = torch.maximum(surrogate, floor)
        return surrogate, torch.where(dead, 0.0, -plain), clipped


def _temperatures(advantages: torch.Tensor, tau: tuple[float, float]) -> torch.Tensor:
    """SAPO's, of each row."""
    positive, other = (advantages.new_full((), x) for x in tau)
    return torch.where(advantages > 0, positive, other)


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
    o = rows.objective
    loss = -_surrogate_reference(logprobs, rows) - o.entropy_coef * entropy
    if o.kl_loss_coef:
        d = logprobs - rows.ref_logprobs
        near = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = {"k1": d, "k2": d**2 / 2, "k3": (-near).exp() - 1 + near}[o.kl_estimator]
        loss = loss + o.kl_loss_coef * kl
    return rows.weights * loss


def _surrogate_reference(logprobs: torch.Tensor, rows: PolicyRows) -> torch.Tensor:
    """What policy_loss maximises, as its paper writes it."""
    o, advantages = rows.objective, rows.advantages
    log_ratio = logprobs - rows.old_logprobs
    if rows.sequence is not None:
        log_ratio = rows.sequence + logprobs - logprobs.detach()
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low, high = 1 - o.clip_low, 1 + o.clip_high
    if o.policy_loss == "cispo":
        return ratio.clamp(low, high).detach() * advantages * logprobs
    if o.policy_loss == "sapo":
        tau = _temperatures(advantages, o.sapo_tau)
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    if o.policy_loss == "dis":
        return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0) * advantages
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if o.dual_clip is not None:
        dual = torch.maximum(surrogate, o.dual_clip * advantages)
        surrogate = torch.where(advantages < 0, dual, surrogate)
    return surrogate


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    from gearshift.kernels.kl_gae import k3

    @triton.jit
    def policy_terms(
        logp,
        entropy,
        old,
        advantage,
        weight,
        ref,
        sequence,
        clip_low,
        clip_high,
        dual_clip,
        tau_pos,
        tau_neg,
        entropy_coef,
        kl_coef,
        LOSS: tl.constexpr,
        DUAL: tl.constexpr,
        KL: tl.constexpr,
    ):
        """PolicyRows.terms for a block of rows. LOSS is a place in POLICY_LOSSES; KL is 0 (off),
        1, 2 or 3. NaN comes through."""
        LIMIT: tl.constexpr = 20.0
        NAN: tl.constexpr = tl.PropagateNan.ALL
        log_ratio = logp - old
        if LOSS == 1:
            log_ratio = sequence
        ratio = tl.exp(tl.clamp(log_ratio, -LIMIT, LIMIT, NAN))
        plain = ratio * advantage
        beyond = tl.abs(log_ratio) > LIMIT
        inside = tl.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high, NAN)
        if LOSS == 2:
            clipped = inside != ratio
            dlogp = -inside * advantage
            surrogate = inside * advantage * logp
        elif LOSS == 3:
            clipped = beyond & (ratio < 0.0)  # none is
            tau = tl.where(advantage > 0, tau_pos, tau_neg)
            x = tau * (ratio - 1.0)
            gate = 1.0 / (1.0 + tl.exp(-x))
            surrogate = 4.0 / tau * gate * advantage
            dlogp = tl.where(beyond, 0.0, -4.0 * gate / (1.0 + tl.exp(x)) * plain)
        elif LOSS == 4:
            clipped = inside != ratio
            surrogate = tl.where(clipped, 0.0, plain)
            dlogp = tl.where(beyond, 0.0, -surrogate)
        else:
            bounded = inside * advantage
            clipped = bounded < plain
            surrogate = tl.where(clipped, bounded, plain)
            dead = clipped | beyond
            if DUAL:
                floor = tl.where(advantage < 0, dual_clip * advantage, float("-inf"))
                dead = dead | (floor > surrogate)
                surrogate = tl.maximum(surrogate, floor, propagate_nan=NAN)
            dlogp = tl.where(dead, 0.0, -plain)
        loss = -surrogate - entropy_coef * entropy
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
