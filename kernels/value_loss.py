"""Critic loss with an optional value clip (Schulman et al.'s baselines): one pass, loss and slope.

    clipped_i = clip(v_i, old_i - c, old_i + c)
    loss      = sum_i w_i * 0.5 * max((v_i - R_i)^2, (clipped_i - R_i)^2)     (no max without clip)
    dloss/dv  = w_i * (v_i - R_i), and 0 where the clipped branch is strictly the worse one

The weights carry every normalisation (they sum to 1 over the whole optimizer step), so the loss is
a plain sum. A token whose value moved more than c towards its return has zero gradient.
"""

from typing import NamedTuple

import torch

from gearshift.kernels import arguments, dispatch


class ValueLoss(NamedTuple):
    """loss: float32 scalar with a gradient to values; clipped: [N] bool, clipped branch worse."""

    loss: torch.Tensor
    clipped: torch.Tensor


def _terms_reference(values, old_values, returns, weights, clip):
    """Per-token loss, slope and clipped flag, [N] float32, float32, bool."""
    live = weights != 0
    values, old_values, returns, weights = (
        torch.where(live, x.float(), 0) for x in (values, old_values, returns, weights)
    )
    error = values - returns
    square = error.square()
    if clip is None:
        return 0.5 * weights * square, weights * error, torch.zeros_like(live)
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    clipped_square = (bounded - returns).square()
    clipped = clipped_square > square
    loss = 0.5 * weights * torch.maximum(square, clipped_square)
    return loss, torch.where(clipped, 0, weights * error), clipped


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _value_loss_kernel(
        values_ptr,
        old_ptr,
        returns_ptr,
        weights_ptr,
        partial_ptr,
        slope_ptr,
        clipped_ptr,
        N,
        clip,
        CLIP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per block; the loss leaves as one partial sum per block (no atomics)."""
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        # Tokens of weight 0 are loaded too (128-bit loads) and selected away at the stores.
        weight = tl.load(weights_ptr + i, mask=i < N, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + i, mask=i < N, other=0.0).to(tl.float32)
        target = tl.load(returns_ptr + i, mask=i < N, other=0.0).to(tl.float32)
        live = weight != 0.0
        error = value - target
        square = error * error
        clipped = live & False
        if CLIP:
            old = tl.load(old_ptr + i, mask=i < N, other=0.0).to(tl.float32)
            bounded = tl.clamp(value, old - clip, old + clip, tl.PropagateNan.ALL)
            clipped_square = (bounded - target) * (bounded - target)
            clipped = live & (clipped_square > square)
            square = tl.maximum(square, clipped_square, tl.PropagateNan.ALL)
        loss = tl.where(live, 0.5 * weight * square, 0.0)
        tl.store(partial_ptr + tl.program_id(0), tl.sum(loss, 0))
        tl.store(slope_ptr + i, tl.where(live & (clipped == 0), weight * error, 0.0), mask=i < N)
        tl.store(clipped_ptr + i, clipped, mask=i < N)


def _terms_triton(values, old_values, returns, weights, clip):
    """As the reference, but the losses are partial sums, one for each block."""
    N, BLOCK = values.numel(), 1024
    blocks = triton.cdiv(N, BLOCK)
    partial = torch.empty(blocks, device=values.device)
    slope = torch.empty(N, device=values.device)
    clipped = torch.empty(N, dtype=torch.bool, device=values.device)
    if N:
        _value_loss_kernel[(blocks,)](
            values.contiguous(),
            old_values.contiguous(),
            returns.contiguous(),
            weights.contiguous(),
            partial,
            slope,
            clipped,
            N,
            0.0 if clip is None else float(clip),
            CLIP=clip is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return partial, slope, clipped


_TERMS = {"torch": _terms_reference, "triton": _terms_triton}


class _ValueLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, old_values, returns, weights, clip, backend):
        losses, slope, clipped = _TERMS[backend](values, old_values, returns, weights, clip)
        ctx.save_for_backward(slope)
        ctx.dtype = values.dtype
        ctx.mark_non_differentiable(clipped)
        return losses.sum(), clipped

    @staticmethod
    def backward(ctx, grad_loss, _):
        (slope,) = ctx.saved_tensors
        return (grad_loss * slope).to(ctx.dtype), None, None, None, None, None


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip: float | None = None,
    backend: str = "auto",
) -> ValueLoss:
    """Weighted half squared error of the critic; only `loss` has a gradient, and only to `values`.

    Args:
        values, old_values, returns, weights: [N] float, any dtype; arithmetic is float32.
            A token of weight 0 contributes exactly nothing, whatever its other columns hold (NaN).
        clip: half-width of the value clip, in units of the return; None is plain squared error.

    Raises ValueError for unequal or non-flat shapes, non-float dtypes, two devices, or clip <= 0.
    """
    columns = {"old_values": old_values, "returns": returns, "weights": weights}
    arguments.check_tensor("values", values, (values.numel(),), values.device)
    for name, column in columns.items():
        arguments.check_tensor(name, column, values.shape, values.device)
    arguments.check_positive("clip", clip)
    backend = dispatch.resolve(backend, values.device)
    return ValueLoss(*_ValueLossFunction.apply(values, *columns.values(), clip, backend))
