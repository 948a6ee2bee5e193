"""KL-shaped rewards and generalised advantages (Schulman et al. 2016), one launch.

For the live tokens of a row (mask true; t+1 means the *next live token*, holes are skipped):

    kl_t     = k1: d      k2: d^2/2      k3: exp(-d) - 1 + d,      d = logprob_t - ref_logprob_t
    reward_t = -kl_coef * kl_t + [t is the last live token] * score
    delta_t  = reward_t + gamma * V_{t+1} - V_t,                   V after the last = bootstrap or 0
    A_t      = delta_t + gamma * lam * A_{t+1}
    return_t = A_t + V_t

With lam_critic the returns have a lambda of their own: return_t = C_t + V_t, where C is A of that
lambda (VC-PPO, arXiv 2503.01491). With lam_length_alpha the lambda of A follows the row's length,
lam = max(0, 1 - 1 / (alpha * live tokens)) (VAPO, arXiv 2504.05118, whose sum is not bounded at 0).

A hole is the identity map of the recurrence, so A_t is a scan over affine maps
(a, b): A -> a*A + b with (gamma*lam, delta) on live tokens and (1, 0) elsewhere.
Masked positions are never read into arithmetic: they are selected away, not multiplied by 0.
"""

from typing import NamedTuple

import torch

from gearshift.kernels import arguments, dispatch

KL_ESTIMATORS = ("k1", "k2", "k3")
SCAN_BLOCK = 1024  # tokens that a program takes at a time
LOG_RATIO_LIMIT = 20.0  # nats; exp(20) = 4.9e8 keeps k3 finite however far the policies drift


class Advantages(NamedTuple):
    """All [B, R] float32 without gradient, exactly 0 at masked positions, not whitened."""

    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    kl: torch.Tensor


class _Coefficients(NamedTuple):
    kl_coef: float
    estimator: str
    gamma: float
    lam: float
    lam_critic: float | None = None
    lam_length_alpha: float | None = None

    def decays(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """gamma * lambda [B] f32 of the policy, and of the critic where that is another."""
        policy = torch.full(mask.shape[:1], self.gamma * self.lam, device=mask.device)
        if self.lam_length_alpha is not None:
            lengths = mask.sum(1).clamp(min=1).double()
            policy = (self.gamma * (1 - 1 / (self.lam_length_alpha * lengths)).clamp(min=0)).float()
        if self.lam_critic is None:
            return policy, None
        return policy, torch.full_like(policy, self.gamma * self.lam_critic)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens, elementwise, in float32.

    k1, k2, k3 are Schulman's (joschu.net/blog/kl-approx.html). k1 is unclamped; k3 clamps the
    log-ratio to +-20 nats. Differentiable. Raises ValueError for another estimator.
    """
    _check_estimator(estimator)
    log_ratio = logprobs.float() - ref_logprobs.float()
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-log_ratio) + log_ratio


def _kl_reward_gae_reference(logprobs, ref_logprobs, values, mask, scores, bootstrap, coef):
    kl = kl_estimate(
        torch.where(mask, logprobs, 0), torch.where(mask, ref_logprobs, 0), coef.estimator
    )
    values = torch.where(mask, values.float(), 0)
    R = mask.shape[1]
    index = torch.where(mask, torch.arange(R, device=mask.device), R)
    live_from = index.flip(1).cummin(1).values.flip(1)  # first live token at or after t; R if none
    next_live = torch.nn.functional.pad(live_from, (0, 1), value=R)[:, 1:]
    next_values = torch.cat([values, bootstrap[:, None]], 1).gather(1, next_live)

    terminal = torch.where(mask & (next_live == R), scores[:, None], 0)
    rewards = terminal - coef.kl_coef * kl
    delta = torch.where(mask, rewards + coef.gamma * next_values - values, 0)
    advantages, critics = _accumulate(delta, mask, *coef.decays(mask))
    return Advantages(rewards, advantages, critics + values, kl)


def _accumulate(delta, mask, decay, critic_decay):
    """A_t of the policy's lambda and of the critic's, [B, R] each; one loop over time for both."""
    B = len(delta)
    if critic_decay is not None:
        decay = torch.cat([decay, critic_decay])
        delta, mask = delta.repeat(2, 1), mask.repeat(2, 1)
    decay = torch.where(mask, decay[:, None], 1.0)
    # Time-major, so that each of the R steps is one fused multiply-add over a contiguous [B].
    advantages = torch.empty_like(delta.T, memory_format=torch.contiguous_format)
    running = delta.new_zeros(len(delta))
    steps = zip(decay.T.contiguous(), delta.T.contiguous(), advantages, strict=True)
    for a, b, out in reversed(list(steps)):
        running = torch.addcmul(b, a, running, out=out)
    advantages = torch.where(mask, advantages.T, 0)
    return advantages[:B], advantages[-B:] if B else advantages


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _latest(has_a, value_a, has_b, value_b):
        return has_a | has_b, tl.where(has_b != 0, value_b, value_a)

    @triton.jit
    def _compose(a1, b1, a2, b2):
        return a1 * a2, a2 * b1 + b2

    @triton.jit
    def k3(d):
        """exp(-d) - 1 + d; near 0, where that cancels, its series: within 1e-4 of the value."""
        far = tl.exp(-d) - 1.0 + d
        near = d * d * (0.5 - d * (1.0 / 6.0 - d * (1.0 / 24.0)))
        return tl.where(tl.abs(d) < 0.06, near, far)

    @triton.jit
    def _kl_gae_kernel(
        logprobs_ptr,
        ref_ptr,
        values_ptr,
        mask_ptr,
        scores_ptr,
        bootstrap_ptr,
        decays_ptr,
        critic_decays_ptr,
        rewards_ptr,
        advantages_ptr,
        returns_ptr,
        kl_ptr,
        R,
        kl_coef,
        gamma,
        ESTIMATOR: tl.constexpr,
        DECOUPLED: tl.constexpr,
        LIMIT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per row, from the last block to the first, with scalar carries.

        Lane i of a block is time R-1-start-i, so the backward recurrence is a *forward* scan
        (reverse=True has open wrong-result reports on GPUs: triton #4362, #8412).
        """
        row = tl.program_id(0).to(tl.int64) * R
        lane = tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + tl.program_id(0)).to(tl.float32)
        next_value = tl.load(bootstrap_ptr + tl.program_id(0)).to(tl.float32)
        decay = tl.load(decays_ptr + tl.program_id(0))
        advantage = 0.0
        critic_decay = decay
        if DECOUPLED:
            critic_decay = tl.load(critic_decays_ptr + tl.program_id(0))
        critic = 0.0
        live_after = 0
        for start in range(0, R, BLOCK):
            t = R - 1 - start - lane
            live = tl.load(mask_ptr + row + t, mask=t >= 0, other=0) != 0
            logprob = tl.load(logprobs_ptr + row + t, mask=live, other=0.0).to(tl.float32)
            ref = tl.load(ref_ptr + row + t, mask=live, other=0.0).to(tl.float32)
            value = tl.load(values_ptr + row + t, mask=live, other=0.0).to(tl.float32)

            # The data shifted by one token: an inclusive scan of it is the exclusive scan of ours.
            later = (t >= 0) & (t + 1 < R)
            later = tl.load(mask_ptr + row + t + 1, mask=later, other=0) != 0
            later_value = tl.load(values_ptr + row + t + 1, mask=later, other=0.0).to(tl.float32)
            has_next, upcoming = tl.associative_scan((later.to(tl.int32), later_value), 0, _latest)
            upcoming = tl.where(has_next != 0, upcoming, next_value)
            has_next = has_next | live_after

            kl = logprob - ref
            if ESTIMATOR == "k2":
                kl = 0.5 * kl * kl
            if ESTIMATOR == "k3":
                kl = k3(tl.minimum(tl.maximum(kl, -LIMIT), LIMIT))
            reward = tl.where(live & (has_next == 0), score, 0.0) - kl_coef * kl
            delta = tl.where(live, reward + gamma * upcoming - value, 0.0)
            a, b = tl.associative_scan((tl.where(live, decay, 1.0), delta), 0, _compose)
            accumulated = b + a * advantage
            target = accumulated
            if DECOUPLED:
                c, d = tl.associative_scan((tl.where(live, critic_decay, 1.0), delta), 0, _compose)
                target = d + c * critic

            tl.store(rewards_ptr + row + t, tl.where(live, reward, 0.0), mask=t >= 0)
            tl.store(advantages_ptr + row + t, tl.where(live, accumulated, 0.0), mask=t >= 0)
            tl.store(returns_ptr + row + t, tl.where(live, target + value, 0.0), mask=t >= 0)
            tl.store(kl_ptr + row + t, tl.where(live, kl, 0.0), mask=t >= 0)

            # This block's own last token is the first shifted lane of the next block.
            live_after = tl.max(has_next, 0)
            next_value = tl.sum(tl.where(lane == BLOCK - 1, upcoming, 0.0), 0)
            advantage = tl.sum(tl.where(lane == BLOCK - 1, accumulated, 0.0), 0)
            if DECOUPLED:
                critic = tl.sum(tl.where(lane == BLOCK - 1, target, 0.0), 0)


def _kl_reward_gae_triton(logprobs, ref_logprobs, values, mask, scores, bootstrap, coef):
    B, R = mask.shape
    out = Advantages(*(torch.empty(B, R, device=mask.device) for _ in Advantages._fields))
    if out.kl.numel() == 0:
        return out
    decays, critic_decays = coef.decays(mask)
    _kl_gae_kernel[(B,)](
        logprobs.contiguous(),
        ref_logprobs.contiguous(),
        values.contiguous(),
        mask.contiguous(),
        scores.contiguous(),
        bootstrap.contiguous(),
        decays,
        decays if critic_decays is None else critic_decays,
        *out,
        R,
        float(coef.kl_coef),
        float(coef.gamma),
        ESTIMATOR=coef.estimator,
        DECOUPLED=critic_decays is not None,
        LIMIT=LOG_RATIO_LIMIT,
        BLOCK=SCAN_BLOCK,
        num_warps=4,
    )
    return out


@torch.no_grad()
def kl_reward_gae(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scores: torch.Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    lam_critic: float | None = None,
    lam_length_alpha: float | None = None,
    kl_estimator: str = "k1",
    bootstrap_values: torch.Tensor | None = None,
    backend: str = "auto",
) -> Advantages:
    """Shapes rewards and computes advantages and returns: unwhitened, without gradient.

    Args:
        logprobs, ref_logprobs: [B, R] float, of the rollout policy and of the reference, in nats.
        values: [B, R] float; column t is the value of the state before response token t.
        mask: [B, R] bool; true on response tokens. May have holes; rows may be all false (zeros).
        scores: [B] float; lands on the last live token of its row.
        kl_coef: weight of the KL penalty inside the reward; the returned `kl` is unscaled.
        gamma, lam: discount and GAE lambda, per live token, both in [0, 1].
        lam_critic: lambda of the returns, in [0, 1]; None is that of the advantages.
        lam_length_alpha: above 0; the lambda of the advantages is max(0, 1 - 1 / (alpha * length))
            of each row's live tokens, in place of `lam`.
        kl_estimator: "k1", "k2" or "k3"; only k1 makes the KL-regularised policy the optimum.
        bootstrap_values: [B] float, the value after the last live token; None means 0 everywhere.
            Give 0 for finished responses and the critic's value for truncated ones.

    Positions where `mask` is false change nothing, whatever they hold (NaN, inf), and read 0.
    Raises ValueError naming the argument for a wrong shape, dtype, device or range.
    """
    coef = _Coefficients(kl_coef, kl_estimator, gamma, lam, lam_critic, lam_length_alpha)
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask: expected [B, R] bool, got {list(mask.shape)} {mask.dtype}")
    if bootstrap_values is None:
        bootstrap_values = torch.zeros(mask.shape[0], device=mask.device)
    grids = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
    for name, tensor in grids.items():
        arguments.check_tensor(name, tensor, mask.shape, mask.device)
    for name, tensor in (("scores", scores), ("bootstrap_values", bootstrap_values)):
        arguments.check_tensor(name, tensor, mask.shape[:1], mask.device)
    _check_coefficients(coef)
    backends = {"torch": _kl_reward_gae_reference, "triton": _kl_reward_gae_triton}
    run = backends[dispatch.resolve(backend, mask.device)]
    rows = (scores.float(), bootstrap_values.float())
    return run(logprobs, ref_logprobs, values, mask, *rows, coef)


def _check_estimator(estimator):
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")


def _check_coefficients(coef):
    _check_estimator(coef.estimator)
    for name in ("gamma", "lam", "lam_critic"):
        given = getattr(coef, name)
        if given is not None and not 0.0 <= given <= 1.0:
            raise ValueError(f"{name}={given}: give a number in [0, 1]")
    arguments.check_positive("lam_length_alpha", coef.lam_length_alpha)
    if not float("-inf") < coef.kl_coef < float("inf"):
        raise ValueError(f"kl_coef={coef.kl_coef}: give a finite number")
