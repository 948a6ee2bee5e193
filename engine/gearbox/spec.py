"""Which part of a parameter one tensor-parallel rank keeps, in a form transfers can count with."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

# Staging of a shift in MB: large buckets saturate NVLink, on CPU they only leave the cache.
BUCKET_MB = {"cuda": 256.0, "cpu": 16.0}

Interval = tuple[int, int]


def balanced(count: int, parts: int, index: int, *, grain: int = 1) -> Interval:
    """Part `index` of [0, count) in `parts` parts whose sizes differ by at most one grain.

    `grain` must divide count.
    """
    size, extra = divmod(count // grain, parts)
    start = index * size + min(index, extra)
    return start * grain, (start + size + (index < extra)) * grain


@dataclass(frozen=True)
class Spec:
    """What one TP rank keeps of one parameter: ascending [start, stop) rows along `dim`.

    `shape` is the whole parameter's. A shard's flat order is the whole's flat order with gaps, so
    any flat range of the whole maps to one flat range of the shard, by `count_below`.
    """

    shape: tuple[int, ...]
    dim: int
    intervals: tuple[Interval, ...]

    @classmethod
    def cut(cls, shape, dim: int, intervals) -> "Spec":
        """Merges touching intervals and drops empty ones: equal shards compare equal."""
        merged: list[Interval] = []
        for start, stop in intervals:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            elif stop > start:
                merged.append((start, stop))
        return cls(tuple(shape), dim, tuple(merged))

    @classmethod
    def whole(cls, shape) -> "Spec":
        return cls(tuple(shape), 0, ((0, shape[0] if len(shape) else 1),))

    @cached_property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    @cached_property
    def _flat(self) -> tuple[int, int, list[Interval]]:
        """(period, kept, intervals) in flat elements: the pattern of gaps repeats every period."""
        inner = prod(self.shape[self.dim + 1 :])
        rows = self.shape[self.dim] if self.shape else 1
        intervals = [(start * inner, stop * inner) for start, stop in self.intervals]
        return rows * inner, sum(stop - start for start, stop in intervals), intervals

    @property
    def width(self) -> int:
        """Rows kept along `dim`."""
        return sum(stop - start for start, stop in self.intervals)

    @property
    def local_shape(self) -> tuple[int, ...]:
        if not self.shape:
            return ()
        return (*self.shape[: self.dim], self.width, *self.shape[self.dim + 1 :])

    def count_below(self, index: int) -> int:
        """How many of the shard's elements have a flat index below `index` in the whole."""
        period, kept, intervals = self._flat
        outer, rest = divmod(index, period)
        return outer * kept + sum(
            min(rest, stop) - start for start, stop in intervals if rest > start
        )

    def count(self, start: int, stop: int) -> int:
        """How many of the shard's elements lie in the whole's flat range [start, stop)."""
        return self.count_below(stop) - self.count_below(start)

    def extract(self, chunk: Tensor, start: int, out: Tensor) -> None:
        """Copies the shard's part of chunk, the whole's flat range from `start`, to flat `out`."""
        period, kept, intervals = self._flat
        if kept == period:
            out.copy_(chunk)
            return
        stop = start + chunk.numel()
        first, last = -(-start // period), stop // period  # whole periods inside the range
        done = self._extract_partial(chunk, start, min(stop, first * period), start, out)
        if last > first:
            rows = chunk[first * period - start : last * period - start].view(-1, period)
            kept_rows = out[done : done + (last - first) * kept].view(-1, kept)
            column = 0
            for low, high in intervals:
                kept_rows[:, column : column + high - low].copy_(rows[:, low:high])
                column += high - low
            done += kept_rows.numel()
        if last >= first:
            self._extract_partial(chunk, last * period, stop, start, out[done:])

    def _extract_partial(self, chunk: Tensor, low: int, high: int, start: int, out: Tensor) -> int:
        """The part [low, high) within one period; returns how many elements it wrote."""
        period, _, intervals = self._flat
        base, written = low // period * period, 0
        for begin, end in intervals:
            begin, end = max(low, base + begin), min(high, base + end)
            if end > begin:
                out[written : written + end - begin].copy_(chunk[begin - start : end - start])
                written += end - begin
        return written
