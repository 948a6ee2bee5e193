"""What happens to a chunk of logits between its GEMM and the two gradient GEMMs.

Per row i, with loss_i a function of logp_i and the entropy h_i (policy_terms.py), p = softmax(x),
d = dloss/dlogp, b = weight * entropy_coef:

    dloss/dx_j = d [j = tok] + p_j (b (ln p_j + h) - d)

Two passes compute that as it stands: scores first, then the gradient. Without an entropy bonus and
a soft cap, one pass is enough, because the old log-prob is an input of PPO. Let
c = x_tok - old, the log-sum-exp the row had under the old policy (the anchor):

    E_j = exp(x_j - c)    S = sum_j E_j    t = sum_j E_j (x_j - c)
    logp = old - ln S     h = ln S - t / S     dloss/dx = -d/S (E - S onehot(tok))

so E can replace the logits before the loss is known; only a row factor and the target column
depend on it. S = exp(old - logp) is 1 on-policy. Where it leaves ANCHOR_RANGE (an old log-prob
more than about 40 nats off) the chunk is done again in two passes.
"""

from typing import NamedTuple

import torch

from gearshift.kernels import dispatch
from gearshift.kernels.linear_head import Head, LogitGradient
from gearshift.kernels.logprob import (
    LogitMap,
    Scores,
    blocks,
    launch_shape,
    score_torch_,
    score_triton,
)
from gearshift.kernels.policy_terms import KL_ESTIMATORS, PolicyRows

if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    from gearshift.kernels.logprob import tanh
    from gearshift.kernels.policy_terms import policy_terms

ANCHOR_RANGE = (2.0**-60, 2.0**100)
PROGRAMS = 1024  # enough to fill any GPU: fewer rows than this are split over the vocabulary


class RowResults(NamedTuple):
    """Per row [C]: f32, f32, f32, bool."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    loss: torch.Tensor
    clipped: torch.Tensor


class _Slope(NamedTuple):
    """dloss/dx_j = onehot [j = tok] + p_j (base + bonus ln p_j), f32 [C] each."""

    onehot: torch.Tensor
    base: torch.Tensor
    bonus: torch.Tensor

    @classmethod
    def of(cls, dlogp: torch.Tensor, entropy: torch.Tensor, rows) -> "_Slope":
        bonus = rows.weights * rows.entropy_coef
        return cls(dlogp, bonus * entropy - dlogp, bonus)

    def live(self) -> torch.Tensor:
        """1 for rows that have a gradient, 0 for those that have none."""
        return ((self.onehot != 0) | (self.base != 0) | (self.bonus != 0)).float()


def finish_torch_(
    logits: torch.Tensor, token_ids: torch.Tensor, rows, head: Head, *, gradient: bool
) -> tuple[RowResults, LogitGradient | None]:
    """Scores a chunk of fp32 logits [C,V] and turns it into its gradient, in place.

    `rows` (PolicyRows or any object with `weights`, `entropy_coef` and `terms`) gives the loss.
    """
    scores = score_torch_(logits, token_ids, head.logit_map)
    loss, dlogp, clipped = rows.terms(scores.logprobs, scores.entropy)
    results = RowResults(scores.logprobs, scores.entropy, loss, clipped)
    if not gradient:
        return results, None
    target = token_ids.long()[:, None]
    if rows.entropy_coef == 0 and head.logit_map.bound is None:
        total = scores.log_sum.exp()
        logits.scatter_add_(1, target, -total[:, None])
        scale = dlogp.div(total).mul_(-head.logit_map.gain)
    else:
        slope = _Slope.of(dlogp, scores.entropy, rows)
        _general_gradient_(logits, target, scores, slope, head.logit_map)
        scale = slope.live()
    matrix = logits if head.gemm_dtype == torch.float32 else logits.to(head.gemm_dtype)
    return results, LogitGradient(matrix, scale)


def _general_gradient_(
    e: torch.Tensor, target: torch.Tensor, scores: Scores, slope: _Slope, logit_map: LogitMap
) -> None:
    """exp(x - peak) [C,V] becomes dloss/dy, y being the head's output."""
    log_p_target = scores.logprobs[:, None]
    onehot = slope.onehot[:, None] * _derivative(log_p_target, scores, slice(None), logit_map)
    scratch = torch.empty_like(e[: blocks(e)[0].stop])
    for rows in blocks(e):
        block = e[rows]
        log_p = torch.log(block, out=scratch[: len(block)]).sub_(scores.log_sum[rows, None])
        derivative = _derivative(log_p, scores, rows, logit_map)
        block.mul_(torch.exp(-scores.log_sum[rows, None])).mul_(derivative)
        block.mul_(log_p.mul_(slope.bonus[rows, None]).add_(slope.base[rows, None]))
        block.scatter_add_(1, target[rows], onehot[rows])


def _derivative(
    log_p: torch.Tensor, scores: Scores, rows: slice, logit_map: LogitMap
) -> torch.Tensor | float:
    """dx/dy: tanh' = 1 - tanh^2 with tanh = x / bound, and x = ln p + ln S + peak."""
    gain, bound = logit_map
    if bound is None:
        return gain
    x = log_p + (scores.log_sum[rows] + scores.peak[rows])[:, None]
    return x.div_(bound).square_().neg_().add_(1).mul_(bound * gain)


if dispatch.HAS_TRITON:

    @triton.jit
    def _anchored_kernel(
        logits,
        target_logits,
        anchors,
        out,
        sums,
        moments,
        logits_stride,
        out_stride,
        vocab,
        slope,
        BLOCK: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        """out = E, and this program's part of S and of t / ln 2: one read, one write. `out` may be
        `logits`: a program reads each element before it writes it, and nobody else's."""
        row = tl.program_id(0).to(tl.int64)
        split = tl.program_id(1)
        target = tl.load(target_logits + row)
        anchor = tl.load(anchors + row) * 1.4426950408889634
        logits += row * logits_stride
        out += row * out_stride
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for start in range(split * BLOCK, vocab, SPLITS * BLOCK):
            columns = start + lanes
            inside = columns < vocab
            z = tl.load(logits + columns, inside, other=float("-inf")).to(tl.float32)
            # Subtracting the target first keeps the bits that matter of large logits. The clamps
            # keep every term finite: exp2(-1000) is 0, and so is 0 * -1000.
            x = tl.minimum(tl.maximum((z - target) * slope + anchor, -1000.0), 120.0)
            e = tl.exp2(x)
            total += e
            moment += e * x
            tl.store(out + columns, e.to(out.dtype.element_ty), inside)
        tl.store(sums + row * SPLITS + split, tl.sum(total, 0))
        tl.store(moments + row * SPLITS + split, tl.sum(moment, 0))

    @triton.jit
    def _finalize_kernel(
        out,
        token_ids,
        weights,
        olds,
        advantages,
        refs,
        sums,
        moments,
        logprobs,
        entropies,
        losses,
        clips,
        scales,
        out_stride,
        count,
        gain,
        low,
        high,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        DUAL: tl.constexpr,
        KL: tl.constexpr,
        SPLITS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """From S and t to the row's loss; E[tok] -= S; scale = -gain dloss/dlogp / S, NaN where the
        anchor was too far off."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = rows < count
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for split in range(SPLITS):
            total += tl.load(sums + rows * SPLITS + split, inside, other=1.0)
            moment += tl.load(moments + rows * SPLITS + split, inside, other=0.0)
        old = tl.load(olds + rows, inside, other=0.0)
        advantage = tl.load(advantages + rows, inside, other=0.0)
        weight = tl.load(weights + rows, inside, other=0.0)
        ref = old
        if KL > 0:
            ref = tl.load(refs + rows, inside, other=0.0)
        log_sum = tl.log(total)
        logp = old - log_sum
        entropy = log_sum - 0.6931471805599453 * moment / total
        loss, dlogp, clipped = policy_terms(
            logp,
            entropy,
            old,
            advantage,
            weight,
            ref,
            clip_low,
            clip_high,
            dual_clip,
            0.0,
            kl_coef,
            DUAL=DUAL,
            KL=KL,
        )
        tl.store(logprobs + rows, logp, inside)
        tl.store(entropies + rows, entropy, inside)
        tl.store(losses + rows, loss, inside)
        tl.store(clips + rows, clipped.to(tl.int8), inside)
        exact = (total >= low) & (total <= high)
        scale = tl.where(exact, -gain * dlogp / total, float("nan"))
        tl.store(scales + rows, scale, inside)
        token = tl.load(token_ids + rows, inside, other=0).to(tl.int64)
        corrected = tl.exp(old) - total
        tl.store(out + rows * out_stride + token, corrected.to(out.dtype.element_ty), inside)

    @triton.jit
    def _gradient_kernel(
        logits,
        token_ids,
        peaks,
        log_sums,
        onehots,
        bases,
        bonuses,
        out,
        logits_stride,
        out_stride,
        vocab,
        gain,
        bound,
        CAPPED: tl.constexpr,
        BONUS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """out = dloss/dy of a scored chunk: one read, one write; `out` may be `logits`."""
        row = tl.program_id(0).to(tl.int64)
        token = tl.load(token_ids + row)
        peak = tl.load(peaks + row)
        log_sum = tl.load(log_sums + row)
        onehot = tl.load(onehots + row)
        base = tl.load(bases + row)
        bonus = tl.load(bonuses + row)
        logits += row * logits_stride
        out += row * out_stride
        lanes = tl.arange(0, BLOCK)
        for start in range(0, vocab, BLOCK):
            columns = start + lanes
            inside = columns < vocab
            x = tl.load(logits + columns, inside, other=0.0).to(tl.float32) * gain
            derivative = gain
            if CAPPED:
                x = tanh(x)
                derivative = bound * gain * (1.0 - x * x)
                x *= bound
            log_p = tl.maximum(x - peak - log_sum, -1000.0)
            slope = base
            if BONUS:
                slope += bonus * log_p
            g = tl.exp2(log_p * 1.4426950408889634) * slope
            g = (g + tl.where(columns == token, onehot, 0.0)) * derivative
            tl.store(out + columns, g.to(out.dtype.element_ty), inside)


def finish_triton(
    logits: torch.Tensor, token_ids: torch.Tensor, rows, head: Head, *, out: torch.Tensor | None
) -> tuple[RowResults, LogitGradient | None]:
    """Scores a chunk of fp32 logits [C,V]; its gradient goes to `out`, which may be `logits`.

    Returns None for the gradient where `out` is None. Returns scale NaN in rows whose anchor was
    too far off: the caller then scores the chunk again with `finish_two_pass`.
    """
    anchored = isinstance(rows, PolicyRows) and rows.entropy_coef == 0
    if out is None or not anchored or head.logit_map.bound is not None:
        return finish_two_pass(logits, token_ids, rows, head, out=out)
    count, vocab = logits.shape
    shape = launch_shape(vocab)
    splits = min(triton.cdiv(vocab, shape["BLOCK"]), max(1, PROGRAMS // count))
    sums, moments = torch.empty(2, count, splits, dtype=torch.float32, device=logits.device)
    target = logits.gather(1, token_ids.long()[:, None])[:, 0]
    _anchored_kernel[(count, splits)](
        logits,
        target,
        rows.old_logprobs,
        out,
        sums,
        moments,
        logits.stride(0),
        out.stride(0),
        vocab,
        head.logit_map.gain * 1.4426950408889634,
        SPLITS=splits,
        **shape,
    )
    return _finalize(out, token_ids, rows, (sums, moments), head.logit_map.gain)


def _finalize(out, token_ids, rows: PolicyRows, partials, gain: float):
    """Launches `_finalize_kernel` over `out` = E."""
    count, splits = partials[0].shape
    logprobs, entropy, loss, scale = torch.empty(4, count, dtype=torch.float32, device=out.device)
    clipped = torch.empty(count, dtype=torch.int8, device=out.device)
    o, block = rows.objective, 128
    with_kl = o.kl_loss_coef != 0
    _finalize_kernel[(triton.cdiv(count, block),)](
        out,
        token_ids,
        rows.weights,
        rows.old_logprobs,
        rows.advantages,
        rows.ref_logprobs if with_kl else rows.old_logprobs,
        *partials,
        logprobs,
        entropy,
        loss,
        clipped,
        scale,
        out.stride(0),
        count,
        gain,
        *ANCHOR_RANGE,
        o.clip_low,
        o.clip_high,
        o.dual_clip or 0.0,
        o.kl_loss_coef,
        DUAL=o.dual_clip is not None,
        KL=KL_ESTIMATORS.index(o.kl_estimator) + 1 if with_kl else 0,
        SPLITS=splits,
        BLOCK=block,
        num_warps=4,
    )
    return RowResults(logprobs, entropy, loss, clipped.bool()), LogitGradient(out, scale)


def finish_two_pass(
    logits: torch.Tensor, token_ids: torch.Tensor, rows, head: Head, *, out: torch.Tensor | None
) -> tuple[RowResults, LogitGradient | None]:
    """As finish_triton, for any row loss and head; never NaN for finite logits."""
    scores = score_triton(logits, token_ids, head.logit_map)
    loss, dlogp, clipped = rows.terms(scores.logprobs, scores.entropy)
    results = RowResults(scores.logprobs, scores.entropy, loss, clipped)
    if out is None:
        return results, None
    slope = _Slope.of(dlogp, scores.entropy, rows)
    bound = head.logit_map.bound
    _gradient_kernel[(len(logits),)](
        logits,
        token_ids,
        scores.peak,
        scores.log_sum,
        *slope,
        out,
        logits.stride(0),
        out.stride(0),
        logits.shape[1],
        head.logit_map.gain,
        bound or 0.0,
        CAPPED=bound is not None,
        BONUS=rows.entropy_coef != 0,
        **launch_shape(logits.shape[1]),
    )
    return results, LogitGradient(out, slope.live())
