"""From a scheduled batch to what one forward reads: NumPy on the host, then the device's Step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gearshift.engine.attention import paged, sequences
from gearshift.engine.attention.cache import KVCache
from gearshift.engine.rollout.scheduler import Batch
from gearshift.kernels.paged_attention import Gather

GATHERED_ROWS = 4  # more rows: fewer calls, but more keys copied beyond a row's own


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """N packed tokens: S decoding rows first, then the chunks of prompts."""

    token_ids: np.ndarray  # [N] int64
    positions: np.ndarray  # [N] int64, of each token in its sequence
    slots: np.ndarray  # [N] int64, block * block_size + offset
    block_tables: np.ndarray  # [S, blocks] int32, as wide as the longest row needs
    lengths: np.ndarray  # [S] int32, tokens in the cache with this one
    spans: list[tuple[int, int, np.ndarray | None]]  # start, stop, slots of the context if chunked
    last: np.ndarray  # [rows to sample] int64, the rows whose logits are wanted


def pack(batch: Batch, table: np.ndarray, block_size: int) -> Inputs:
    """Lays out the batch. table: [max_sequences, blocks] int32, see Scheduler."""
    decode, count = batch.decode, len(batch.decode)
    rows = np.fromiter((s.row for s in decode), np.int64, count)
    cached = np.fromiter((s.cached for s in decode), np.int64, count)
    token_ids = [[s.tokens[-1] for s in decode]]
    positions = [cached]
    slots = [table[rows, cached // block_size].astype(np.int64) * block_size + cached % block_size]
    spans, last, start = [], list(range(count)), count
    for sequence, length in batch.prefill:
        past, end = sequence.cached, sequence.cached + length
        places = np.arange(end)
        context = table[sequence.row, places // block_size].astype(np.int64) * block_size
        context += places % block_size
        token_ids.append(sequence.tokens[past:end])
        positions.append(places[past:])
        slots.append(context[past:])
        spans.append((start, start + length, context if past else None))
        start += length
        if end == len(sequence.tokens):
            last.append(start - 1)
    width = int(cached.max()) // block_size + 1 if count else 0
    return Inputs(
        token_ids=np.concatenate([np.asarray(ids, np.int64) for ids in token_ids]),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        block_tables=table[rows, :width],
        lengths=(cached + 1).astype(np.int32),
        spans=spans,
        last=np.asarray(last, np.int64),
    )


def to_step(inputs: Inputs, cache: KVCache) -> paged.Step:
    """The attention layers' side of the inputs, on the cache's device."""
    kernel = paged.uses_kernel(cache.device)
    return paged.Step(
        cache=cache,
        slots=send(inputs.slots, cache.device),
        block_tables=send(inputs.block_tables, cache.device),
        lengths=send(inputs.lengths, cache.device),
        gathers=[] if kernel else _gathers(inputs, cache),
        prompts=_prompts(inputs, cache.device),
    )


def _prompts(inputs: Inputs, device: torch.device) -> sequences.Sequences:
    """The chunks of prompts; their rows are counted from the end of the decoding ones."""
    if not inputs.spans:
        return sequences.NONE
    first = inputs.spans[0][0]
    spans = [
        sequences.Span(
            start=start - first,
            stop=stop - first,
            context=None if slots is None else send(slots, device),
        )
        for start, stop, slots in inputs.spans
    ]
    packed = _packed(inputs, device) if sequences.packs(device) else None
    return sequences.Sequences(spans=spans, packed=packed)


def _packed(inputs: Inputs, device: torch.device) -> sequences.Packed:
    fresh = all(slots is None for _, _, slots in inputs.spans)
    # A span without a past has its own rows as keys, which are in the cache by then.
    places = [inputs.slots[a:b] if slots is None else slots for a, b, slots in inputs.spans]
    queries, keys = [b - a for a, b, _ in inputs.spans], [len(slots) for slots in places]
    return sequences.Packed(
        queries=send(np.cumsum([0, *queries], dtype=np.int32), device),
        keys=send(np.cumsum([0, *keys], dtype=np.int32), device),
        longest_query=max(queries),
        longest_key=max(keys),
        context=None if fresh else send(np.concatenate(places), device),
    )


def _gathers(inputs: Inputs, cache: KVCache) -> list[Gather]:
    """Neighbouring rows, which the caller has sorted by length, in groups."""
    gathers = []
    for start in range(0, len(inputs.lengths), GATHERED_ROWS):
        rows = slice(start, min(start + GATHERED_ROWS, len(inputs.lengths)))
        lengths = inputs.lengths[rows].astype(np.int64)
        width = -(-int(lengths.max()) // cache.block_size)
        blocks = inputs.block_tables[rows, :width].astype(np.int64).ravel()
        gathers.append(
            Gather(
                rows=rows,
                blocks=send(blocks, cache.device),
                lengths=send(lengths[:, None], cache.device),
            )
        )
    return gathers


def send(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
