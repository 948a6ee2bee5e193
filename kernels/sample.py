"""Sampling one token a row: temperature, top-k, top-p, by exact fixed-point inverse CDF.

    w_j    = floor(2^40 * exp((x_j - max x) / T))            integer weight of token j
    kept   = tokens at or above the k-th largest logit (ties kept); then, of those, the smallest
             set of most probable tokens whose weight is >= top_p of theirs (ties kept)
    u      = 31 bits of Philox-4x32-10 (Salmon et al. 2011), key = seed, counter = position
    token  = first j with  sum_{i <= j, kept} w_i  >  floor(u * sum_kept w / 2^31)
    logprob = log softmax(x / T)[token], over *all* tokens

One random number a row and integer sums: additions commute exactly, so block order, batch and
backend cannot move the choice, and a sequence samples the same tokens whatever it shares a batch
with. What remains between backends is the last bit of exp: of 968,000 draws none moved when exp was
rounded from float64 instead. Tokens less likely than 2^-40 of the most likely are never drawn.
No sort on the GPU: a threshold is searched on the ordered bits of the logits, two bits a pass.
"""

import math
from typing import NamedTuple

import torch

from gearshift.kernels import arguments, dispatch

FRACTION_BITS = 40
MAX_VOCABULARY = 1 << 20  # so that the weights of a row sum to <= 2^60
MIN_TEMPERATURE = 1e-6
_LOG2E, _LN2 = math.log2(math.e), math.log(2)
_U32 = 0xFFFFFFFF
# On CPU the int64 weights of a chunk (2 MiB) stay in a core's L2 cache; a GPU wants many rows.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


class _Plan(NamedTuple):
    scale: float  # log2(e) / T; of temperature 1 when greedy
    greedy: bool
    top_k: int  # 0: off
    top_p31: int  # top_p in units of 2^-31; 0: off


def philox_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """First 32-bit word of Philox-4x32-10 as int64; key = seeds [B], counter = positions [B]."""
    c0, c1 = positions & _U32, (positions >> 32) & _U32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seeds & _U32, (seeds >> 32) & _U32
    for _ in range(10):
        # int64 products wrap, but bits 32..63 survive the wrap and the mask drops the sign.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((odd >> 32) & _U32) ^ c1 ^ k0, odd & _U32
        c2, c3 = ((even >> 32) & _U32) ^ c3 ^ k1, even & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0


def _fraction(total, numerator31):
    """floor(total * numerator31 / 2^31) without overflow; total <= 2^60, numerator31 < 2^31."""
    return numerator31 * (total >> 31) + ((numerator31 * (total & 0x7FFFFFFF)) >> 31)


def _top_p_floor(logits, weights, top_p31):
    """The largest logit of each row such that those at or above it weigh enough, [B, 1]."""
    need = _fraction(weights.sum(1, keepdim=True), top_p31).clamp_(min=1)
    size, V = 16, logits.shape[1]
    while True:  # a nucleus is mostly small: sort no more of the row than it takes
        size = min(V, 8 * size)
        top, index = logits.topk(size, 1)
        mass = weights.gather(1, index).cumsum_(1)
        if size == V or bool((mass[:, -1:] >= need).all()):
            return top.gather(1, (mass < need).sum(1, keepdim=True).clamp_(max=size - 1))


def _draw(logits, weights, uniform, plan):
    """Tokens [B] and the weight of all tokens [B]; `weights` [B, V] is overwritten."""
    total = weights.sum(1) if plan.top_k or plan.top_p31 else None
    if plan.top_k:
        kth = logits.topk(plan.top_k, 1).values[:, -1:]
        weights.masked_fill_(logits < kth, 0)
    if plan.top_p31:
        weights.masked_fill_(logits < _top_p_floor(logits, weights, plan.top_p31), 0)
    cumulative = weights.cumsum_(1)
    kept = cumulative[:, -1:]
    target = _fraction(kept, uniform[:, None] >> 1)
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    tokens.clamp_(max=logits.shape[1] - 1)  # only a row without finite logits gets there
    return tokens, kept[:, 0] if total is None else total


def _sample_rows(logits, uniform, plan):
    logits = logits.float().contiguous()
    if plan.greedy:
        # One pass gives both; argmax alone takes 2.6 times as long on a CPU.
        peak, tokens = logits.max(1, keepdim=True)
        tokens, logprobs = tokens[:, 0], (logits - peak).exp_().sum(1).log_().neg_()
    else:
        peak = logits.amax(1, keepdim=True)
        weights = (logits - peak).mul_(plan.scale).exp2_().mul_(2.0**FRACTION_BITS).long()
        tokens, total = _draw(logits, weights, uniform, plan)
        chosen = (logits.gather(1, tokens[:, None]) - peak)[:, 0] * plan.scale
        logprobs = (chosen - (total.float() * 2.0**-FRACTION_BITS).log2()) * _LN2
    broken = ~peak[:, 0].isfinite()
    return tokens.masked_fill_(broken, 0), logprobs.masked_fill_(broken, math.nan)


def _sample_reference(logits, seeds, positions, plan):
    rows = max(1, _CHUNK_ELEMENTS[logits.device.type] // logits.shape[1])
    uniform = philox_uniform(seeds, positions)
    chunks = zip(logits.split(rows), uniform.split(rows), strict=True)
    parts = [_sample_rows(x, u, plan) for x, u in chunks]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _load(row_ptr, start, V, BLOCK: tl.constexpr):
        j = start + tl.arange(0, BLOCK)
        return tl.load(row_ptr + j, mask=j < V, other=float("-inf")).to(tl.float32)

    @triton.jit
    def _weight(x, peak, scale, BITS: tl.constexpr):
        gap = x - peak
        weight = tl.exp2(gap * scale) * (1 << BITS)
        return tl.where(gap <= 0.0, weight, 0.0).to(tl.int64)  # NaN rows weigh nothing

    @triton.jit
    def _fraction31(total, numerator31):
        numerator31 = numerator31.to(tl.int64)
        return numerator31 * (total >> 31) + ((numerator31 * (total & 0x7FFFFFFF)) >> 31)

    @triton.jit
    def _search(
        row_ptr, V, peak, scale, need, MASS: tl.constexpr, DIGITS: tl.constexpr,
        BITS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Largest logit such that those at or above it number (or with MASS weigh) >= need.

        A float's bits, sign bit flipped (all bits if negative), order as unsigned integers.
        """
        found = tl.full((), 0, tl.uint32)
        step = tl.full((), 1 << 30, tl.uint32)
        for _ in range(DIGITS):
            above1 = tl.zeros((BLOCK,), tl.int64)
            above2 = tl.zeros((BLOCK,), tl.int64)
            above3 = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, V, BLOCK):
                x = _load(row_ptr, start, V, BLOCK)
                bits = x.to(tl.int32, bitcast=True)
                key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
                if MASS:
                    amount = _weight(x, peak, scale, BITS)
                else:
                    amount = (start + tl.arange(0, BLOCK) < V).to(tl.int64)
                above1 += tl.where(key >= found + step, amount, 0)
                above2 += tl.where(key >= found + 2 * step, amount, 0)
                above3 += tl.where(key >= found + 3 * step, amount, 0)
            digit = (tl.sum(above1, 0) >= need).to(tl.uint32)
            digit += (tl.sum(above2, 0) >= need).to(tl.uint32)
            digit += (tl.sum(above3, 0) >= need).to(tl.uint32)
            found += digit * step
            step = step >> 2
        key = found.to(tl.int32, bitcast=True)
        return tl.where(key < 0, key ^ -2147483648, ~key).to(tl.float32, bitcast=True)

    # An argument equal to 1 is otherwise compiled in as a Python int, which has no tensor methods.
    @triton.jit(do_not_specialize=["top_k", "top_p31"])
    def _sample_kernel(
        logits_ptr,
        stride,
        seeds_ptr,
        positions_ptr,
        tokens_ptr,
        logprobs_ptr,
        V,
        scale,
        top_k,
        top_p31,
        GREEDY: tl.constexpr,
        TOP_K: tl.constexpr,
        TOP_P: tl.constexpr,
        DIGITS: tl.constexpr,
        BITS: tl.constexpr,
        LN2: tl.constexpr,
        BLOCK: tl.constexpr,
        TILES: tl.constexpr,
    ):
        """One program per row. Two reads of the row, plus DIGITS for each truncation searched."""
        row = tl.program_id(0)
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        lane = tl.arange(0, BLOCK)

        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_index = lane
        for start in range(0, V, BLOCK):
            x = _load(row_ptr, start, V, BLOCK)
            if GREEDY:
                best_index = tl.where(x > best, start + lane, best_index)
            best = tl.maximum(best, x, tl.PropagateNan.ALL)
        peak = tl.max(best, 0)
        has_nan = tl.max((best != best).to(tl.int32), 0) != 0
        broken = has_nan | (peak == float("inf")) | (peak == float("-inf"))

        floor = float("-inf")
        if TOP_K:
            floor = _search(row_ptr, V, peak, scale, top_k, False, DIGITS, BITS, BLOCK)
        tile = tl.arange(0, TILES)
        tile_weight = tl.zeros((TILES,), tl.int64)
        all_weight = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, V, BLOCK):
            x = _load(row_ptr, start, V, BLOCK)
            weight = _weight(x, peak, scale, BITS)
            all_weight += weight
            kept = tl.sum(tl.where(x >= floor, weight, 0), 0)
            tile_weight = tl.where(tile == start // BLOCK, kept, tile_weight)
        total = tl.sum(all_weight, 0)
        if TOP_P:
            need = tl.maximum(_fraction31(tl.sum(tile_weight, 0), top_p31), 1)
            floor = _search(row_ptr, V, peak, scale, need, True, DIGITS, BITS, BLOCK)
            for start in range(0, V, BLOCK):
                x = _load(row_ptr, start, V, BLOCK)
                kept = tl.where(x >= floor, _weight(x, peak, scale, BITS), 0)
                tile_weight = tl.where(tile == start // BLOCK, tl.sum(kept, 0), tile_weight)

        if GREEDY:
            token = tl.min(tl.where(best == peak, best_index, V), 0)
        else:
            position = tl.load(positions_ptr + row)
            low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
            zero = tl.full((), 0, tl.uint32)
            uniform, _, _, _ = tl.philox(tl.load(seeds_ptr + row), low, high, zero, zero)
            target = _fraction31(tl.sum(tile_weight, 0), uniform >> 1)
            before = tl.sum((tl.cumsum(tile_weight, 0) <= target).to(tl.int32), 0)
            base = tl.sum(tl.where(tile < before, tile_weight, 0), 0)
            x = _load(row_ptr, before * BLOCK, V, BLOCK)
            kept = tl.where(x >= floor, _weight(x, peak, scale, BITS), 0)
            token = before * BLOCK + tl.sum((base + tl.cumsum(kept, 0) <= target).to(tl.int32), 0)
        token = tl.where(broken, 0, token)
        chosen = (tl.load(row_ptr + token).to(tl.float32) - peak) * scale
        logprob = (chosen - tl.log2(total.to(tl.float32) * (1.0 / (1 << BITS)))) * LN2
        tl.store(tokens_ptr + row, token.to(tl.int64))
        tl.store(logprobs_ptr + row, tl.where(broken, float("nan"), logprob))


# Passes of two bits that tell apart all values of a dtype: bf16 has 16 bits, fp16 widened 19.
_DIGITS = {torch.bfloat16: 8, torch.float16: 10, torch.float32: 16}


def _sample_triton(logits, seeds, positions, plan):
    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    BLOCK = 2048  # with 8 warps: one 128-bit load of bf16 a thread, no spills; 4096 spills
    _sample_kernel[(B,)](
        logits,
        logits.stride(0),
        seeds.contiguous(),
        positions.contiguous(),
        tokens,
        logprobs,
        V,
        plan.scale,
        plan.top_k,
        plan.top_p31,
        GREEDY=plan.greedy,
        TOP_K=plan.top_k > 0,
        TOP_P=plan.top_p31 > 0,
        DIGITS=_DIGITS[logits.dtype],
        BITS=FRACTION_BITS,
        LN2=_LN2,
        BLOCK=BLOCK,
        TILES=triton.next_power_of_2(triton.cdiv(V, BLOCK)),
        num_warps=8,
    )
    return tokens, logprobs


@torch.no_grad()
def sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples a token for each row, reproducibly: a row's logits, seed and position decide alone.

    Args:
        logits: [B, V] float32, bfloat16 or float16; V <= 2^20. -inf forbids a token.
        temperature: 0 is greedy (lowest index of the largest logit), else >= 1e-6.
        top_k: keep the k most likely tokens and ties with the k-th; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this share of what top_k
            left, and ties with its last; 1.0 keeps all.
        seeds: [B] int64, one per sequence. positions: [B] int64, never used twice with one seed
            (the index of the token in its response). torch's own generators are not touched.

    Returns token ids [B] int64 and log-probs [B] float32 in nats of the temperature-scaled
    distribution *before* top-k and top-p (temperature 1 when greedy). A row with NaN, +inf or no
    finite logit gives token 0 with log-prob NaN. Raises ValueError naming a bad argument.
    """
    _check_tensors(logits, seeds, positions)
    plan = _plan(temperature, top_k, top_p, logits.shape[1])
    backend = dispatch.resolve(backend, logits.device)
    if logits.shape[0] == 0:
        return seeds.clone(), torch.empty_like(seeds, dtype=torch.float32)
    run = {"torch": _sample_reference, "triton": _sample_triton}[backend]
    return run(logits, seeds, positions, plan)


def _plan(temperature, top_k, top_p, V):
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: give 0 (greedy) or a number >= 1e-6")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k}: give an integer >= 0 (0 keeps every token)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: give a number in (0, 1] (1.0 keeps every token)")
    if temperature == 0:
        return _Plan(_LOG2E, True, 0, 0)
    top_p31 = 0 if top_p == 1 else min(math.ceil(top_p * 2**31), 2**31 - 1)
    return _Plan(_LOG2E / temperature, False, top_k if top_k < V else 0, top_p31)


def _check_tensors(logits, seeds, positions):
    sized = logits.dim() == 2 and 0 < logits.shape[1] <= MAX_VOCABULARY
    if not sized or logits.dtype not in _DIGITS:
        raise ValueError(
            "logits: expected [B, V] float32, bfloat16 or float16 with 1 <= V <= 2^20, "
            f"got {list(logits.shape)} {logits.dtype}"
        )
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        arguments.check_tensor(name, tensor, logits.shape[:1], logits.device, (torch.int64,))
