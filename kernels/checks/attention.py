"""Cases of paged decode attention: plain, and with everything a family may add to it."""

import functools
import math

import torch

from gearshift.kernels import ops
from gearshift.kernels.checks.case import Case, Size, Tensors

BLOCK_TOKENS = 32
WINDOW, SOFTCAP = 100, 30.0


def _draw(size: Size, dtype: torch.dtype, generator: torch.Generator, *, sinks: bool) -> Tensors:
    """A cache whose blocks are shuffled; what no sequence has written holds NaN."""
    batch, device = size.batch, generator.device
    query_heads, heads, width = size.heads
    normal = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    columns = math.ceil(size.context / BLOCK_TOKENS)
    tables = torch.randperm(batch * columns, generator=generator, device=device)
    tables = tables.view(batch, columns).int()
    lengths = torch.full((batch,), size.context, device=device, dtype=torch.int32)
    if not size.plain:
        lengths = torch.randint(
            size.context + 1, (batch,), generator=generator, device=device, dtype=torch.int32
        )
        lengths[:2] = torch.tensor([0, size.context])[:batch]
    shape = (batch * columns, BLOCK_TOKENS, heads, width)
    keys, values = normal(shape), normal(shape)
    position = torch.arange(columns * BLOCK_TOKENS, device=device)
    unwritten = (position >= lengths[:, None]).view(batch * columns, BLOCK_TOKENS)
    by_block = torch.empty_like(unwritten)
    by_block[tables.flatten().long()] = unwritten
    for cache in (keys, values):
        cache[by_block] = float("nan")
    inputs = {
        "query": normal(batch, query_heads, width),
        "key_cache": keys,
        "value_cache": values,
        "block_tables": tables,
        "lengths": lengths,
    }
    return inputs | ({"sinks": normal(query_heads)} if sinks else {})


def _run(inputs: Tensors, size: Size, backend: str, *, options: dict) -> Tensors:
    scale = size.heads[2] ** -0.5
    return {"out": ops.paged_attention(**inputs, scale=scale, **options, backend=backend)}


def _truth(inputs: Tensors, outputs: Tensors, *, options: dict) -> Tensors:
    out = [_sequence(inputs, row, **options) for row in range(len(inputs["query"]))]
    return {"out": torch.stack(out)}


def _sequence(
    inputs: Tensors, row: int, *, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt D) v of one sequence, [HQ, DV] float64."""
    query, length = inputs["query"][row].double(), int(inputs["lengths"][row])
    if length == 0:
        return torch.zeros_like(query)
    blocks = inputs["block_tables"][row].long()
    start = max(0, length - window) if window else 0
    keys, values = (
        inputs[name][blocks].flatten(0, 1)[start:length].double()
        for name in ("key_cache", "value_cache")
    )
    group = len(query) // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,thd->ht", query, keys) * query.shape[1] ** -0.5
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    if "sinks" in inputs:
        scores = torch.cat([scores, inputs["sinks"].double()[:, None]], 1)
    weights = scores.softmax(1)[:, : len(keys)]
    return torch.einsum("ht,thd->hd", weights, values)


def _case(name: str, sinks: bool, options: dict) -> Case:
    part = functools.partial
    draw = part(_draw, sinks=sinks)
    return Case(name, draw, part(_run, options=options), part(_truth, options=options))


CASES = (
    _case("paged_attention", False, {}),
    _case("paged_attention.window", True, {"window": WINDOW, "softcap": SOFTCAP}),
)
