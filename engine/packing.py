"""From a scheduled batch to the arrays of one forward, in NumPy on the host."""

from dataclasses import dataclass

import numpy as np

from gearshift.engine.scheduler import Batch


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
