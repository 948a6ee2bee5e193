"""A loss over the rows of a language-model head whose gradients are formed in the forward pass.

Chunk by chunk: one GEMM for the logits, one epilogue (epilogue.py), two GEMMs for the gradients:
three in all, where saving log-probs for a later backward needs a fourth to make the logits again.
Backward only multiplies by the upstream factor, and returns the gradients as autograd expects them:
tied weights, accumulation and ZeRO's hooks see an ordinary op.

Memory besides the inputs: the chunk's buffers (max_logits_bytes), the gradient of hidden, and that
of the weight (fp32 while several chunks are summed, then the weight's dtype). Where the gradients
of all logits in 16 bits fit into the same memory they are kept, and the weight's is one product.
"""

from typing import NamedTuple

import torch

from gearshift.kernels import arguments
from gearshift.kernels.head import anchored
from gearshift.kernels.head.epilogue import RowResults, finish_torch_, finish_two_pass
from gearshift.kernels.head.projection import Head, HeadGradients, LogitGradient


class PolicyLoss(NamedTuple):
    """loss: f32 scalar with gradient. Detached [N]: logprobs f32, entropy f32 in nats, clipped bool
    (the clipped branch is strictly the worse one). Rows of weight 0 read 0, 0 and False."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    clipped: torch.Tensor


def linear_loss(hidden: torch.Tensor, token_ids: torch.Tensor, head: Head, rows) -> PolicyLoss:
    """The sum of the rows' losses; `rows` is as epilogue.py wants it, checked by the caller.

    Raises ValueError for float16 with gradients, and for ids outside the vocabulary in live rows.
    """
    inputs = (hidden, head.weight, head.bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not wanted:
        return _forward(hidden, token_ids, head, rows, (False, False, False))[0]
    if hidden.dtype == torch.float16:
        raise ValueError(
            "hidden is torch.float16: its gradients are formed before any loss scale is applied "
            "and would underflow; train in bfloat16 or float32"
        )
    return PolicyLoss(*_LinearLoss.apply(*inputs, token_ids, head, rows))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, head, rows):
        wanted = tuple(ctx.needs_input_grad[:3])
        result, ctx.gradients = _forward(hidden, token_ids, head, rows, wanted)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    def backward(ctx, upstream, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss were handed over by its first backward; "
                "call the loss again instead of backward twice"
            )
        # Scaled in place and let go: a second copy of the weight's gradient may not fit.
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(upstream) for g in gradients), None, None, None


@torch.no_grad()
def _forward(hidden, token_ids, head, rows, wanted):
    """(PolicyLoss, gradients of hidden, weight and bias where wanted)."""
    live = rows.weights.nonzero()[:, 0]
    arguments.check_token_ids(token_ids[live], len(live), hidden.device, vocab=len(head.weight))
    zeros = torch.zeros(3, len(hidden), dtype=torch.float32, device=hidden.device)
    clipped = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    results = RowResults(zeros[0], zeros[1], zeros[2], clipped)
    kept, gradients = None, None
    beside = head.beside(len(live)) if wanted[1] else 0
    chunks = head.chunks(len(live), beside)
    if any(wanted):
        at_once = bool(beside) or len(chunks) <= 1
        gradients = HeadGradients(head, hidden, wanted, at_once=at_once)
        kept = head.buffer(len(live), head.gemm_dtype) if beside else None
    for part, index in _passes(hidden, token_ids, head, rows, live, chunks, gradients, kept):
        for whole, piece in zip(results, part, strict=True):
            whole[index] = piece
    logprobs, entropy, loss, clipped = results
    formed = None if gradients is None else gradients.finish()
    return PolicyLoss(loss.sum(), logprobs, entropy, clipped), formed


def _passes(hidden, token_ids, head, rows, live, chunks, gradients, kept):
    """Yields (RowResults, index of its rows) per chunk, having added its part of the gradients.

    kept: None, or where the gradients of all logits [live, V] stay, to be used at the end.
    """
    if not chunks:
        return
    logits = head.buffer(chunks[0].stop, torch.float32)
    out = None
    formed: list[LogitGradient] = []
    if gradients is not None and head.backend == "triton" and kept is None:
        in_place = head.gemm_dtype == torch.float32
        out = logits if in_place else head.buffer(len(logits), head.gemm_dtype)
    for chunk in chunks:
        index = live[chunk]
        x = head.operand(hidden[index])
        z = logits[: len(x)]
        head.logits_into(x, z)
        taken = token_ids[index], rows.take(index)
        if head.backend == "torch":
            part, gradient = finish_torch_(z, *taken, head, gradient=gradients is not None)
        else:
            part, gradient = _finish_triton(
                x, z, *taken, head, out if kept is None else kept[chunk]
            )
        if gradient is not None and kept is not None:
            formed.append(gradient)
        elif gradient is not None:
            gradients.add(index, x, gradient)
        yield part, index
    if kept is not None:
        del logits, z
        scale = torch.cat([part.scale for part in formed])
        counts = [part.live for part in formed if part.live is not None]
        count = sum(counts) if len(counts) == len(formed) else None
        gradients.add(live, head.operand(hidden[live]), LogitGradient(kept, scale, count))


def _finish_triton(x, z, token_ids, rows, head, out) -> tuple[RowResults, LogitGradient | None]:
    if out is None:
        return finish_two_pass(z, token_ids, rows, head, out=None)
    out = out[: len(z)]
    if anchored.applies(rows, head):
        part, gradient = anchored.finish_anchored(z, token_ids, rows, head, out=out)
        scale = gradient.scale
        # One read-back for both questions: the device is idle while the host waits.
        broken, live = torch.stack([scale.isnan().sum(), (scale != 0).sum()]).tolist()
        if not broken:
            return part, gradient._replace(live=live)
        if out.data_ptr() == z.data_ptr():
            head.logits_into(x, z)  # the pass has written over them
    return finish_two_pass(z, token_ids, rows, head, out=out)
