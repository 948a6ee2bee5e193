"""One pass from logits to gradient, for PPO without an entropy bonus and heads without a soft cap.

The old log-prob is an input of PPO. Let c = x_tok - old, the log-sum-exp that the row had under the
old policy: the anchor. With d = dloss/dlogp of policy.py,

    E_j = exp(x_j - c)    S = sum_j E_j    t = sum_j E_j (x_j - c)
    logp = old - ln S     entropy = ln S - t / S     dloss/dx = -d/S (E - S onehot(tok))

so E can replace the logits before the loss is known: only a row factor and the target column depend
on it, no maximum is needed and nothing is read twice. S = exp(old - logp) is 1 on-policy. Where it
leaves ANCHOR_RANGE (an old log-prob more than about 40 nats off) the rows are reported, and the
caller does the chunk again in two passes (epilogue.py).
"""

import torch

from gearshift.kernels import dispatch
from gearshift.kernels.head.epilogue import RowResults, writable_width
from gearshift.kernels.head.policy import POLICY_LOSSES, PolicyRows
from gearshift.kernels.head.projection import Head, LogitGradient
from gearshift.kernels.head.scores import launch_shape
from gearshift.kernels.kl_gae import KL_ESTIMATORS

ANCHOR_RANGE = (2.0**-60, 2.0**100)
PROGRAMS = 1024  # enough to fill any GPU: fewer rows than this are split over the vocabulary


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    from gearshift.kernels.head.policy import policy_terms

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
        width,
        slope,
        splits,
        BLOCK: tl.constexpr,
    ):
        """out = E, and this program's part of S and of t / ln 2: one read, one write. `out` may be
        `logits`: a program reads each element before it writes it, and nobody else's. Columns from
        vocab to width are padding: read, selected away, written as 0."""
        row = tl.program_id(0).to(tl.int64)
        split = tl.program_id(1)
        target = tl.load(target_logits + row)
        anchor = tl.load(anchors + row) * 1.4426950408889634
        logits += row * logits_stride
        out += row * out_stride
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for start in range(split * BLOCK, vocab, splits * BLOCK):
            columns = start + lanes
            z = tl.load(logits + columns, columns < width, other=0.0)
            z = tl.where(columns < vocab, z, float("-inf"))
            # Subtracting the target first keeps the bits that matter of large logits. The clamps
            # keep every term finite (exp2(-1000) is 0, and so is 0 * -1000), but let NaN through.
            x = (z - target) * slope + anchor
            x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
            x = tl.minimum(x, 120.0, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(x)
            total += e
            moment += e * x
            tl.store(out + columns, e.to(out.dtype.element_ty), columns < width)
        tl.store(sums + row * splits + split, tl.sum(total, 0))
        tl.store(moments + row * splits + split, tl.sum(moment, 0))

    @triton.jit
    def _finalize_kernel(
        out,
        token_ids,
        weights,
        olds,
        advantages,
        refs,
        sequences,
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
        tau_pos,
        tau_neg,
        kl_coef,
        splits,
        LOSS: tl.constexpr,
        DUAL: tl.constexpr,
        KL: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """From S and t to the row's loss; E[tok] -= S; scale = -gain dloss/dlogp / S, NaN
        where the anchor was too far off."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = rows < count
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for split in range(splits):
            total += tl.load(sums + rows * splits + split, inside, other=1.0)
            moment += tl.load(moments + rows * splits + split, inside, other=0.0)
        old = tl.load(olds + rows, inside, other=0.0)
        advantage = tl.load(advantages + rows, inside, other=0.0)
        weight = tl.load(weights + rows, inside, other=0.0)
        ref = old
        if KL > 0:
            ref = tl.load(refs + rows, inside, other=0.0)
        sequence = old
        if LOSS == 1:
            sequence = tl.load(sequences + rows, inside, other=0.0)
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
            sequence,
            clip_low,
            clip_high,
            dual_clip,
            tau_pos,
            tau_neg,
            0.0,
            kl_coef,
            LOSS=LOSS,
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


def applies(rows, head: Head) -> bool:
    """Whether the loss and the head allow one pass."""
    return isinstance(rows, PolicyRows) and rows.entropy_coef == 0 and head.logit_map.bound is None


def finish_anchored(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    rows: PolicyRows,
    head: Head,
    *,
    out: torch.Tensor,
) -> tuple[RowResults, LogitGradient]:
    """Scores a chunk of fp32 logits [C,V]; its gradient goes to `out`, which may be `logits`.

    `out` is a buffer of Head.buffer, whose padding is overwritten too. Scale is NaN in rows whose
    anchor was too far off; none of the results holds for them.
    """
    count, vocab = logits.shape
    shape = launch_shape(vocab)
    splits = min(triton.cdiv(vocab, shape["BLOCK"]), max(1, PROGRAMS // count))
    sums, moments = torch.empty(2, count, splits, dtype=torch.float32, device=logits.device)
    _anchored_kernel[(count, splits)](
        logits,
        logits.gather(1, token_ids.long()[:, None])[:, 0],
        rows.old_logprobs,
        out,
        sums,
        moments,
        logits.stride(0),
        out.stride(0),
        vocab,
        writable_width(logits, out),
        head.logit_map.gain * 1.4426950408889634,
        splits,
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
        rows.old_logprobs if rows.sequence is None else rows.sequence,
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
        *o.sapo_tau,
        o.kl_loss_coef,
        splits,
        LOSS=POLICY_LOSSES.index(o.policy_loss),
        DUAL=o.dual_clip is not None,
        KL=KL_ESTIMATORS.index(o.kl_estimator) + 1 if with_kl else 0,
        BLOCK=block,
        num_warps=4,
    )
    return RowResults(logprobs, entropy, loss, clipped.bool()), LogitGradient(out, scale)
