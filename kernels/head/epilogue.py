"""What happens to a chunk of logits between its GEMM and the two gradient GEMMs.

Per row i, with loss_i a function of logp_i and the entropy h_i (policy.py), p = softmax(x),
d = dloss/dlogp, b = weight * entropy_coef:

    dloss/dx_j = d [j = tok] + p_j (b (ln p_j + h) - d)

Here that is done as it stands, for any row loss and head: scores first, then the gradient. The
one-pass form that PPO without an entropy bonus allows is in anchored.py.
"""

from typing import NamedTuple

import torch

from gearshift.kernels import dispatch
from gearshift.kernels.head.projection import Head, LogitGradient
from gearshift.kernels.head.scores import LogitMap, Scores, blocks, launch_shape, readable_width


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
    scores = head.score_(logits, token_ids)
    loss, dlogp, clipped = rows.terms(scores.logprobs, scores.entropy)
    results = RowResults(scores.logprobs, scores.entropy, loss, clipped)
    if not gradient:
        return results, None
    if rows.entropy_coef == 0 and head.logit_map.bound is None:
        total = scores.log_sum.exp()
        logits.scatter_add_(1, token_ids.long()[:, None], -total[:, None])
        scale = dlogp.div(total).mul_(-head.logit_map.gain)
    else:
        slope = _Slope.of(dlogp, scores.entropy, rows)
        _general_gradient_(logits, token_ids, scores, slope, head.logit_map)
        scale = slope.live()
    matrix = logits if head.gemm_dtype == torch.float32 else logits.to(head.gemm_dtype)
    return results, LogitGradient(matrix, scale)


def _general_gradient_(
    e: torch.Tensor, token_ids: torch.Tensor, scores: Scores, slope: _Slope, logit_map: LogitMap
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
        block.scatter_add_(1, token_ids[rows, None].long(), onehot[rows])


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
    import triton
    import triton.language as tl

    from gearshift.kernels.head.scores import tanh

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
        width,
        gain,
        bound,
        CAPPED: tl.constexpr,
        BONUS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """out = dloss/dy of a scored chunk: one read, one write; `out` may be `logits`. Padding up
        to width is treated as logits, and nobody reads what becomes of it."""
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
        for start in range(0, width, BLOCK):
            columns = start + lanes
            inside = columns < width
            z = tl.load(logits + columns, inside, other=0.0)
            derivative = gain
            if CAPPED:
                x = tanh(z * gain)
                derivative = bound * gain * (1.0 - x * x)
                log_p = bound * x - peak - log_sum
            else:
                log_p = (z - peak) * gain - log_sum
            # exp2(-1000) is 0, and so is 0 * -1000; NaN must come through.
            log_p = tl.maximum(log_p, -1000.0, propagate_nan=tl.PropagateNan.ALL)
            slope = base
            if BONUS:
                slope += bonus * log_p
            g = tl.exp2(log_p * 1.4426950408889634) * slope
            g = (g + tl.where(columns == token, onehot, 0.0)) * derivative
            tl.store(out + columns, g.to(out.dtype.element_ty), inside)


def writable_width(logits: torch.Tensor, out: torch.Tensor) -> int:
    """Columns per row the kernels may load from `logits` and overwrite in `out`: buffers of
    Head.buffer have the same padding, which is theirs to spoil."""
    return min(readable_width(logits), readable_width(out))


def finish_two_pass(
    logits: torch.Tensor, token_ids: torch.Tensor, rows, head: Head, *, out: torch.Tensor | None
) -> tuple[RowResults, LogitGradient | None]:
    """Scores a chunk of fp32 logits [C,V]; its gradient goes to `out`, which may be `logits`.

    `out` is a buffer of Head.buffer, whose padding is overwritten too; None asks for no gradient.
    """
    scores = head.score_(logits, token_ids)
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
        writable_width(logits, out),
        head.logit_map.gain,
        bound or 0.0,
        CAPPED=bound is not None,
        BONUS=rows.entropy_coef != 0,
        **launch_shape(logits.shape[1]),
    )
    return results, LogitGradient(out, slope.live())
