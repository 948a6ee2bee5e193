"""Log-probability of one token per row, and the entropy of the row, from logits.

    x = gain z                    (gain = logit_scale / temperature)
    x = bound tanh(gain z)        (Gemma's soft cap c: gain = scale / c, bound = c / temperature)
    logp = x_tok - max x - ln S,        S = sum_j exp(x_j - max x)
    entropy = ln S - 1/S sum_j exp(x_j - max x) (x_j - max x)

All sums are fp32, whatever the logits are; nothing of the logits' size is allocated. The log-probs
are those of the distribution that is sampled at this temperature.
"""

from typing import NamedTuple

import torch

from gearshift.kernels import arguments, dispatch

# exp(-80) = 2e-35 is nothing beside the row's largest term, 1, and still a normal fp32 number:
# -inf logits stay out of 0 * inf, and no denormals slow the CPU down.
FLOOR = -80.0
# Elements of one element-wise pass, and of its fp32 scratch. Smaller blocks would stay in a CPU's
# cache, but gain less by that than two threads lose by meeting after every op.
CPU_BLOCK = 1 << 23
CUDA_BLOCK = 1 << 26


class LogitMap(NamedTuple):
    """How a head's output becomes the logits of the softmax; see the top of this file."""

    gain: float
    bound: float | None = None

    @classmethod
    def of(cls, temperature: float, softcap: float | None = None, scale: float = 1.0) -> "LogitMap":
        """Raises ValueError unless each is a finite number above 0 (softcap may be None)."""
        arguments.check_positive("temperature", temperature)
        arguments.check_positive("logit_softcap", softcap)
        arguments.check_positive("logit_scale", scale)
        if softcap is None:
            return cls(scale / temperature)
        return cls(scale / softcap, softcap / temperature)


class Scores(NamedTuple):
    """Per row, f32 [N]: the two results, and what a gradient needs: ln S, and the largest logit as
    it came (of a capped head: the largest x)."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    peak: torch.Tensor
    log_sum: torch.Tensor


def logprob_entropy_reference(
    logits: torch.Tensor, token_ids: torch.Tensor, logit_map: LogitMap
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain, differentiable PyTorch and the logits' own precision."""
    x = logits * logit_map.gain
    if logit_map.bound is not None:
        x = x.tanh() * logit_map.bound
    logp = x.log_softmax(dim=-1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(dim=-1)
    return logp.gather(-1, token_ids.long()[:, None])[:, 0], entropy


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def tanh(x):
        # Saturates correctly: exp2 -> inf gives 1, exp2 -> 0 gives -1. Absolute error about 1e-7,
        # which a cap of 30 at temperature 0.1 makes 3e-5 nats: near 0 the Taylor series is better.
        far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # 2 log2(e)
        s = x * x
        near = -0.05396825396825397 + s * 0.021869488536155203  # 17/315, 62/2835
        near = -0.3333333333333333 + s * (0.13333333333333333 + s * near)
        return tl.where(s < 0.0625, x + x * s * near, far)

    @triton.jit
    def _score_kernel(
        logits,
        token_ids,
        logprobs,
        entropy,
        peaks,
        log_sums,
        row_stride,
        column_stride,
        vocab,
        width,
        gain,
        bound,
        CAPPED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per row, one read, online maximum. Sums stay per lane until the end, so the
        only reduction across warps inside the loop is the maximum. See `readable_width`."""
        LN_2: tl.constexpr = 0.6931471805599453
        # Differences are scaled, not logits: a row near 1e4 keeps its last bits.
        slope = 1.4426950408889634 if CAPPED else gain * 1.4426950408889634
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        lanes = tl.arange(0, BLOCK)
        # A finite start: -inf - -inf would be NaN in a row that begins with -inf logits.
        peak = tl.full((), -1e38, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = (start + lanes).to(tl.int64)
            x = tl.load(logits + columns * column_stride, columns < width, other=0.0).to(tl.float32)
            if CAPPED:
                x = bound * tanh(x * gain)
            x = tl.where(columns < vocab, x, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(x, 0))
            # exp2(-1000) is 0, and so is 0 * -1000; NaN must come through.
            step = tl.maximum((peak - new_peak) * slope, -1000.0)
            shrink = tl.exp2(step)
            below = (x - new_peak) * slope
            below = tl.maximum(below, -1000.0, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(below)
            moment = shrink * (moment + step * total) + e * below
            total = shrink * total + e
            peak = new_peak
        sum_of_exp = tl.sum(total, 0)
        log_sum = tl.log2(sum_of_exp)
        token = tl.load(token_ids + row).to(tl.int64)
        target = tl.load(logits + token * column_stride).to(tl.float32)
        if CAPPED:
            target = bound * tanh(target * gain)
        tl.store(logprobs + row, LN_2 * ((target - peak) * slope - log_sum))
        tl.store(entropy + row, LN_2 * (log_sum - tl.sum(moment, 0) / sum_of_exp))
        tl.store(peaks + row, peak)
        tl.store(log_sums + row, LN_2 * log_sum)


def score_triton(logits: torch.Tensor, token_ids: torch.Tensor, logit_map: LogitMap) -> Scores:
    """One launch over logits [N,V] of any strides and float dtype, which it leaves alone."""
    rows, vocab = logits.shape
    scores = Scores(*torch.empty(4, rows, dtype=torch.float32, device=logits.device))
    if rows:
        _score_kernel[(rows,)](
            logits,
            token_ids.contiguous(),
            *scores,
            *logits.stride(),
            vocab,
            readable_width(logits),
            logit_map.gain,
            logit_map.bound or 0.0,
            CAPPED=logit_map.bound is not None,
            **launch_shape(vocab),
        )
    return scores


def readable_width(matrix: torch.Tensor) -> int:
    """Columns a kernel may load in every row: up to the row stride, where memory goes that far.

    A mask of `column < vocab` makes loads narrow unless vocab is divisible by 16; `column < width`
    does not, where rows are padded as a head's buffers are. What lies beyond the vocabulary is
    selected away.
    """
    stride, step = matrix.stride()
    end = (matrix.storage_offset() + len(matrix) * stride) * matrix.element_size()
    inside = step == 1 and matrix.shape[1] <= stride and end <= matrix.untyped_storage().nbytes()
    return stride if inside else matrix.shape[1]


def launch_shape(vocab: int) -> dict[str, int]:
    """16 elements per thread and step: four 128-bit loads of fp32, no spills on sm_80..sm_100."""
    block = min(4096, triton.next_power_of_2(vocab))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def score_torch_(logits: torch.Tensor, token_ids: torch.Tensor, logit_map: LogitMap) -> Scores:
    """Turns fp32 logits [N,V] into exp(x - max x), floored at exp(-80), in place."""
    scores = Scores(*logits.new_empty(4, len(logits)))
    scratch = logits.new_empty(min(len(logits), block_rows(logits)), logits.shape[1])
    for rows in blocks(logits):
        _score_block(logits[rows], scratch, token_ids[rows], logit_map, [s[rows] for s in scores])
    return scores


def blocks(matrix: torch.Tensor) -> list[slice]:
    """The row slices that element-wise passes work through, bounding scratch memory."""
    step = block_rows(matrix)
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def block_rows(matrix: torch.Tensor) -> int:
    budget = CUDA_BLOCK if matrix.is_cuda else CPU_BLOCK
    return max(1, budget // matrix.shape[1])


def _score_block(z, scratch, token_ids, logit_map, out) -> None:
    """z [n,V] becomes exp(x - max x); scratch is overwritten; `out` takes the four row results."""
    logprobs, entropy, peak, log_sum = out
    gain, bound = logit_map
    if bound is not None:
        z.mul_(gain).tanh_().mul_(bound)
        gain = 1.0
    torch.amax(z, dim=1, out=peak)
    x = torch.sub(z, peak[:, None], out=scratch[: len(z)])
    if gain != 1.0:
        x.mul_(gain)
    target = x.gather(1, token_ids.long()[:, None])[:, 0]
    x.clamp_(min=FLOOR)
    total = torch.exp(x, out=z).sum(dim=1)
    torch.log(total, out=log_sum)
    torch.sub(target, log_sum, out=logprobs)
    torch.sub(log_sum, x.mul_(z).sum(dim=1).div_(total), out=entropy)


def logprob_entropy(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `token_ids` [N] under softmax(logits / temperature), and that softmax's entropy.

    logits [N,V] fp32, bf16 or fp16, any strides, unchanged; token_ids int64 or int32. Returns two
    f32 [N] in nats, without gradient. On a GPU a row stride divisible by 16 elements loads 128 bits
    at a time. Raises ValueError for wrong shapes, dtypes or devices, ids outside the vocabulary and
    a temperature that is not above 0.
    """
    arguments.check_matrix("logits", logits, logits.device)
    logit_map = LogitMap.of(temperature)
    rows, vocab = logits.shape
    arguments.check_token_ids(token_ids, rows, logits.device, vocab=vocab)
    logits = logits.detach()
    if dispatch.resolve(backend, logits.device) == "triton":
        scores = score_triton(logits, token_ids, logit_map)
        return scores.logprobs, scores.entropy
    scores = Scores(*torch.empty(4, rows, dtype=torch.float32, device=logits.device))
    for block in blocks(logits):
        part = score_torch_(logits[block].to(torch.float32, copy=True), token_ids[block], logit_map)
        for whole, piece in zip(scores, part, strict=True):
            whole[block] = piece
    return scores.logprobs, scores.entropy
