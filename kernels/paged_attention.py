"""Decoding attention over a paged cache (Kwon et al. 2023), split over keys (flash-decoding).

For sequence s, query head h of key-value head k = h // group, and its live positions
t in [length - window, length):

    score_t = scale * q . K_t          then softcap * tanh(score_t / softcap) where asked
    out     = sum_t exp(score_t) V_t / (sum_t exp(score_t) + exp(sink_h))

Each program takes CHUNK positions of one sequence for *all* query heads of a key-value head, so the
cache is read once; a second kernel merges the chunks by their log-sum-exps, in order. Chunks begin
at multiples of CHUNK whatever the batch, so from the Triton kernels a sequence's output has the
same bits in any batch (the PyTorch backend does not promise that).
Slots outside the live positions and table entries past the end are never used, whatever they hold.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gearshift.kernels import arguments, dispatch

CHUNK = 256  # positions of a program; partial results are 1.6 % of the cache read at group 4
# The load of the block table takes stages of the pipeline as well: of 5, two buffers are left for
# keys and values (72 KiB at D = 128), so that one is filled while the other is read.
STAGES = 5
_GATHER_ELEMENTS = 1 << 20  # of keys copied at a time by the torch backend


class Rules(NamedTuple):
    """How one layer attends, beyond plain causal attention."""

    scale: float
    softcap: float | None  # c * tanh(score / c), Gemma 2
    window: int | None  # a token sees itself and window - 1 before it
    sinks: Tensor | None  # [heads] logits that take probability and give no value, gpt-oss


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Decoding rows of similar length, and what PyTorch needs to attend over their blocks.

    Per row the copy of its keys and values is as long as the group's longest: hence by length.
    """

    rows: slice
    blocks: Tensor  # [rows * blocks of the longest] int64
    lengths: Tensor  # [rows, 1] integers
    clean: bool = True  # every slot of the blocks holds numbers; otherwise dead ones become zeros
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window; made once a step

    def mask(self, width: int, window: int | None) -> Tensor:
        """[rows, 1, 1, width] bool: the keys each row sees."""
        if window not in self.masks:
            position = torch.arange(width, device=self.lengths.device)
            visible = position < self.lengths
            if window is not None:
                visible &= position >= self.lengths - window
            self.masks[window] = visible[:, None, None]
        return self.masks[window]


def attend_gathered(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, gather: Gather, rules: Rules
) -> Tensor:
    """One new token per row: query [rows, HQ, D], caches [NB, BS, HK, D or DV] -> [rows, HQ, DV].

    Computes in query's dtype, whatever that of the caches.
    """
    heads = key_cache.shape[2]
    # The heads of a group share their keys: they are as many queries of one key-value head.
    grouped = query.reshape(len(query), heads, -1, query.shape[-1])
    key, value = _copied(key_cache, gather), _copied(value_cache, gather)
    visible = gather.mask(key.shape[2], rules.window)
    if not gather.clean:
        dead = (~visible).flatten().nonzero()[:, 0]
        for copy in (key, value):
            copy.transpose(1, 2).flatten(0, 1).index_fill_(0, dead, 0)  # 0 * NaN would be NaN
    if key.dtype != query.dtype:
        key, value = key.to(query.dtype), value.to(query.dtype)
    sinks = None if rules.sinks is None else rules.sinks.view(heads, -1)
    return attend_masked(grouped, key, value, visible, rules, sinks).flatten(1, 2)


def _copied(cache: Tensor, gather: Gather) -> Tensor:
    """A copy of a group's blocks, [rows, HK, width, D]."""
    # index_select of whole blocks is a memcpy each: twice as fast as indexing by the table.
    picked = cache.index_select(0, gather.blocks)
    return picked.view(len(gather.lengths), -1, *cache.shape[2:]).transpose(1, 2)


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, rules: Rules, sinks: Tensor | None
) -> Tensor:
    """Attention with an explicit mask, which rules.window is part of.

    query [B, H, n, D], key and value [B, H or 1, t, D or DV], visible: bool, broadcast to
    [B, H, n, t]; sinks: rules.sinks, broadcast to [B, H, n]. Returns [B, H, n, DV]; a row that sees
    no key may be NaN.
    """
    if rules.softcap is None and sinks is None:
        if key.shape[1] == 1 != query.shape[1]:
            key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=rules.scale)
    scores = (query @ key.transpose(-1, -2)).float() * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.float()[..., None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value


def _paged_attention_torch(query, key_cache, value_cache, tables, lengths, rules):
    out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    size = key_cache.shape[1]
    row = max(1, tables.shape[1] * key_cache.shape[1:].numel())
    step = max(1, _GATHER_ELEMENTS // row)
    if rules.softcap is not None or rules.sinks is not None:
        query = query.float()
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        part, longest = lengths[rows, None], int(lengths[rows].max())
        if longest == 0:
            continue
        first = torch.arange(0, longest, size, device=query.device)
        blocks = torch.where(first < part, tables[rows, : len(first)], 0).flatten()
        gather = Gather(rows=rows, blocks=blocks, lengths=part, clean=False)
        found = attend_gathered(query[rows], key_cache, value_cache, gather, rules)
        out[rows] = torch.where(part[..., None] > 0, found, 0).to(out.dtype)
    return out


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _first(length, WINDOW: tl.constexpr):
        if WINDOW > 0:
            return tl.maximum(length - WINDOW, 0)
        return length * 0

    @triton.jit
    def _paged_attention_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        tables_ptr,
        lengths_ptr,
        partial_ptr,
        lse_ptr,
        table_width,
        key_block,
        key_token,
        key_head,
        value_block,
        value_token,
        value_head,
        scale_log2,
        softcap_log2,
        SOFTCAP: tl.constexpr,
        WINDOW: tl.constexpr,
        SIZE: tl.constexpr,
        GROUP: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        D_PAD: tl.constexpr,
        DV_PAD: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
        CHUNK: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """Program (sequence, key-value head, chunk): normalised partial output and log2-sum-exp2.

        Scores are in units of log 2. ROWS pads the group to a tensor-core tile of 16 rows.
        """
        s, k, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        heads, chunks = tl.num_programs(1) * GROUP, tl.num_programs(2)
        length = tl.load(lengths_ptr + s)
        begin = tl.maximum(chunk * CHUNK, _first(length, WINDOW))
        end = tl.minimum((chunk + 1) * CHUNK, length)
        if begin >= end:
            return
        row, d, dv = tl.arange(0, ROWS), tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
        head = s.to(tl.int64) * heads + k * GROUP + row
        query = tl.load(
            query_ptr + head[:, None] * D + d[None, :],
            mask=(row[:, None] < GROUP) & (d[None, :] < D),
            other=0.0,
        )
        if UPCAST:
            query = query.to(tl.float32)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, DV_PAD), tl.float32)
        for start in range(begin, end, TILE):
            t = start + tl.arange(0, TILE)
            live = t < end
            at = s.to(tl.int64) * table_width + t // SIZE
            block = tl.load(tables_ptr + at, mask=live, other=0)
            block, slot = block.to(tl.int64), t % SIZE
            at = block * key_block + slot * key_token + k * key_head
            key = tl.load(
                key_ptr + at[:, None] + d[None, :],
                mask=live[:, None] & (d[None, :] < D),
                other=0.0,
            )
            at = block * value_block + slot * value_token + k * value_head
            value = tl.load(
                value_ptr + at[:, None] + dv[None, :],
                mask=live[:, None] & (dv[None, :] < DV),
                other=0.0,
            )
            if UPCAST:
                key, value = key.to(tl.float32), value.to(tl.float32)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
            if SOFTCAP:
                # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both infinities
                grown = tl.exp2(score * (2.0 * 1.4426950408889634) / softcap_log2)
                score = softcap_log2 * (1.0 - 2.0 / (grown + 1.0))
            score = tl.where(live[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            shrink = tl.exp2(peak - higher)
            weight = tl.exp2(score - higher[:, None])
            total = total * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
            peak = higher
        out = head * chunks + chunk
        tl.store(lse_ptr + out, peak + tl.log2(total), mask=row < GROUP)
        tl.store(
            partial_ptr + out[:, None] * DV + dv[None, :],
            acc / total[:, None],
            mask=(row[:, None] < GROUP) & (dv[None, :] < DV),
        )

    @triton.jit
    def _combine_kernel(
        partial_ptr,
        lse_ptr,
        lengths_ptr,
        sinks_ptr,
        out_ptr,
        chunks,
        SINKS: tl.constexpr,
        WINDOW: tl.constexpr,
        DV: tl.constexpr,
        DV_PAD: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """Program (sequence, query head): merges the chunks that hold a live position, in order."""
        s, h = tl.program_id(0), tl.program_id(1)
        head = s.to(tl.int64) * tl.num_programs(1) + h
        dv = tl.arange(0, DV_PAD)
        length = tl.load(lengths_ptr + s)
        peak = tl.full((), -1e30, tl.float32)
        total = tl.zeros((), tl.float32)
        if SINKS:
            peak = tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
            total = total + 1.0
        acc = tl.zeros((DV_PAD,), tl.float32)
        for chunk in range(_first(length, WINDOW) // CHUNK, tl.cdiv(length, CHUNK)):
            lse = tl.load(lse_ptr + head * chunks + chunk)
            at = partial_ptr + (head * chunks + chunk) * DV + dv
            part = tl.load(at, mask=dv < DV, other=0.0)
            higher = tl.maximum(peak, lse)
            shrink, weight = tl.exp2(peak - higher), tl.exp2(lse - higher)
            total = total * shrink + weight
            acc = acc * shrink + part * weight
            peak = higher
        out = acc / tl.where(total > 0.0, total, 1.0)  # nothing was added for length 0
        tl.store(out_ptr + head * DV + dv, out, mask=dv < DV)


def _paged_attention_triton(query, key_cache, value_cache, tables, lengths, rules):
    S, HQ, D = query.shape
    HK, DV = value_cache.shape[2:]
    chunks = triton.cdiv(tables.shape[1] * key_cache.shape[1], CHUNK)
    out = torch.empty(S, HQ, DV, dtype=query.dtype, device=query.device)
    if out.numel() == 0 or chunks == 0:
        return out.zero_()
    partial = torch.empty(S, HQ, chunks, DV, device=query.device)
    lse = torch.empty(S, HQ, chunks, device=query.device)
    lengths = lengths.contiguous()
    window = rules.window or 0
    widths = dict(DV=DV, DV_PAD=max(16, triton.next_power_of_2(DV)))
    _paged_attention_kernel[(S, HK, chunks)](
        query.contiguous(),
        key_cache,
        value_cache,
        tables.contiguous(),
        lengths,
        partial,
        lse,
        tables.shape[1],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        rules.scale * math.log2(math.e),
        (rules.softcap or 0.0) * math.log2(math.e),
        SOFTCAP=rules.softcap is not None,
        WINDOW=window,
        SIZE=key_cache.shape[1],
        GROUP=HQ // HK,
        D=D,
        D_PAD=max(16, triton.next_power_of_2(D)),
        ROWS=max(16, triton.next_power_of_2(HQ // HK)),
        TILE=_tile(query.dtype, D, DV),
        CHUNK=CHUNK,
        UPCAST=query.device.type != "cuda",  # Triton's interpreter multiplies bf16 bit patterns
        num_warps=4,
        num_stages=STAGES,
        **widths,
    )
    sinks = lse if rules.sinks is None else rules.sinks.contiguous()
    _combine_kernel[(S, HQ)](
        partial, lse, lengths, sinks, out, chunks,
        SINKS=rules.sinks is not None, WINDOW=window, CHUNK=CHUNK, num_warps=1, **widths,
    )  # fmt: skip
    return out


def _tile(dtype: torch.dtype, D: int, DV: int) -> int:
    """Positions loaded at a time: 32 KiB of keys and values; 16 of float32, which else spills."""
    budget = 1 << 14 if dtype == torch.float32 else 1 << 15
    tokens = max(16, budget // ((D + DV) * dtype.itemsize))
    return min(64, 1 << tokens.bit_length() - 1)


@torch.no_grad()
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of one new token per sequence over its cached keys and values; no gradient.

    Args:
        query: [S, HQ, D] float32, bfloat16 or float16.
        key_cache: [NB, BS, HK, D], value_cache: [NB, BS, HK, DV], of query's dtype; HQ is a
            multiple of HK, and query heads h*HQ/HK... share key-value head h. Any strides but the
            last, which is 1: the cache is never copied.
        block_tables: [S, MAXB] int32; entry i of a row is the block of positions i*BS and on.
        lengths: [S] int32, positions in the cache, the current token's included, <= MAXB * BS.
            A row of length 0 gives zeros.
        scale: factor of the scores. softcap: c * tanh(score / c) (Gemma 2). window: only the last
            `window` positions are seen. sinks: [HQ], a logit per head that takes probability and
            gives no value (gpt-oss).

    Returns [S, HQ, DV] in query's dtype; scores and sums are float32. Raises ValueError naming a
    bad argument; lengths are compared with the tables only on CPU (a GPU would have to wait).
    """
    _check_tensors(query, key_cache, value_cache, block_tables, lengths)
    if sinks is not None:
        arguments.check_tensor("sinks", sinks, query.shape[1:2], query.device)
    arguments.check_positive("scale", scale)
    arguments.check_positive("softcap", softcap)
    if window is not None and (window != int(window) or window < 1):
        raise ValueError(f"window={window}: give a number of positions >= 1, or None for all")
    backends = {"torch": _paged_attention_torch, "triton": _paged_attention_triton}
    run = backends[dispatch.resolve(backend, query.device)]
    rules = Rules(scale, softcap, window, sinks)
    return run(query, key_cache, value_cache, block_tables, lengths, rules)


def _check_tensors(query, key_cache, value_cache, tables, lengths):
    if query.dim() != 3 or query.dtype not in arguments.FLOATS:
        raise ValueError(
            "query: expected [S, HQ, D] float32, bfloat16 or float16, "
            f"got {list(query.shape)} {query.dtype}"
        )
    S, HQ, D = query.shape
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4 or cache.dtype != query.dtype or cache.shape[:3] != key_cache.shape[:3]:
            raise ValueError(
                f"{name}: expected [NB, BS, HK, D] {query.dtype} as query and the other cache, "
                f"got {list(cache.shape)} {cache.dtype}"
            )
        if cache.device != query.device:
            raise ValueError(f"{name}: is on {cache.device} but query is on {query.device}")
        if cache.stride(3) != 1:
            raise ValueError(f"{name}: its last dimension has stride {cache.stride(3)}, must be 1")
    if key_cache.shape[3] != D or HQ % max(1, key_cache.shape[2]):
        raise ValueError(
            f"key_cache: {list(key_cache.shape)} does not fit query {list(query.shape)}: head "
            "sizes must be equal, query heads a multiple of key-value heads"
        )
    # Any width of a table will do; one of another rank than 2 has none that fits.
    for name, tensor, shape in (
        ("block_tables", tables, (S, *tables.shape[-1:])),
        ("lengths", lengths, (S,)),
    ):
        arguments.check_tensor(name, tensor, shape, query.device, (torch.int32,))
    room = tables.shape[1] * key_cache.shape[1]
    if lengths.device.type == "cpu" and S and int(lengths.max()) > room:
        raise ValueError(f"lengths: {int(lengths.max())} is more than the {room} of block_tables")
