"""Decode steps as CUDA graphs: one replay in place of about a thousand kernel launches.

A graph is captured per number of rows (1, 2, 4, 8, 16, 32, 48, ...) when it is first needed, from
the model's forward to the drawn tokens, tensor-parallel all-reduces included; all share one memory
pool. A step leaves its tokens where the next one reads them, so that the host may start the next
before it has read any. Rows that fill a bucket up read and write the cache's dummy block. Graphs
hold addresses: of the weights, which may be refreshed in place (the engine checks that they did not
move), and of one KVCache.
"""

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.attention import paged
from gearshift.engine.attention.cache import KVCache
from gearshift.engine.attention.packed import by_layer, moving_rope
from gearshift.engine.config.schema import SamplingConfig
from gearshift.engine.rollout.context import positions
from gearshift.engine.rollout.packing import Inputs
from gearshift.engine.rollout.sampling import Bans, draw_packed

STEP = 16  # rows between buckets above 16: at most 15 padding rows, one graph per 16 rows
# Graphs that live for one generation are made anew every step, some tenths of a second each: there
# are few, as padding rows cost little where weights bound a step.
COARSE_STEP = 64
WIDTH = 16  # widths are rounded up to it: a slightly longer prompt needs no new graphs
# Expert layers that choose their kernels without reading the routing on the host.
CAPTURABLE_EXPERTS = ("grouped_mm", "batched_mm")


def buckets(rows: int, *, coarse: bool = False) -> list[int]:
    """The numbers of rows that graphs are captured for; the last is the first that holds `rows`.

    coarse: for graphs that are thrown away after one generation.
    """
    step = COARSE_STEP if coarse else STEP
    smaller = [STEP] if coarse else [1 << i for i in range(STEP.bit_length() - 1)]
    sizes = [*smaller, *range(step, rows + step, step)]
    return sizes[: bisect.bisect_left(sizes, rows) + 1]


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Where the module's weights and buffers are."""
    return tuple(t.data_ptr() for t in (*module.parameters(), *module.buffers()))


def has_experts(text: Any) -> bool:
    """Whether a text model has expert layers."""
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(layer, name, None) for layer in by_layer(text) for name in counts)


def cannot_capture(module: nn.Module) -> str | None:
    """Why the module's forward cannot be captured; None if nothing known forbids it."""
    config = module.config.get_text_config()
    kind = getattr(config, "_experts_implementation", None)
    if has_experts(config) and kind not in CAPTURABLE_EXPERTS:
        return f"its experts ({kind}) read the routing on the host"
    if moving_rope(config) == "dynamic":
        return "its rotary frequencies are chosen on the host"
    return None


@cache
def _warm_up_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace of 32 MB for every stream it has met."""
    return torch.cuda.Stream()


class DecodeGraphs:
    """Runs decode steps of one module over one cache with one sampling configuration.

    rows: most sequences decoded at once. width: blocks of the longest sequence. coarse: see
    `buckets`. Valid while the module's tensors are at the `weights` addresses; capture_seconds
    grows with every new bucket.
    On a device without CUDA the same steps run eagerly, padding included; tests rely on it.
    """

    def __init__(
        self,
        module: nn.Module,
        cache: KVCache,
        sampling: SamplingConfig,
        group: dist.ProcessGroup | None,
        *,
        rows: int,
        width: int,
        coarse: bool = False,
        bans: Bans | None = None,
    ):
        self.bans = bans
        self.module, self.cache, self.sampling, self.group = module, cache, sampling, group
        self.rows, self.width = rows, -(-width // WIDTH) * WIDTH
        self.weights, self.capture_seconds = addresses(module), 0.0
        self._capture = cache.device.type == "cuda"
        self._replays: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._capture else None
        self._buckets = buckets(rows, coarse=coarse)
        self._positions = positions(module.config)
        self._allocate(self._buckets[-1])

    def fits(self, sampling: SamplingConfig, rows: int, width: int) -> bool:
        """Whether these graphs serve such a call, too."""
        return sampling == self.sampling and rows <= self.rows and width <= self.width

    def load(self, inputs: Inputs, seeds: list[int], positions: list[int]) -> None:
        """Takes decoding rows only, for the launches that follow; none may be in flight."""
        count = len(inputs.lengths)
        self._count = count
        self._bucket = self._buckets[bisect.bisect_left(self._buckets, count)]
        self._fill(inputs, seeds, positions)
        if self._bucket not in self._replays:
            start = time.perf_counter()
            self._replays[self._bucket] = self._prepare(self._bucket)
            self.capture_seconds += time.perf_counter() - start
            self._fill(inputs, seeds, positions)  # the first run has moved on

    def launch(self) -> "Drawn":
        """Starts forward and draw of every row, each from the token that it drew before."""
        replay, packed = self._replays[self._bucket]
        replay()
        self._turn ^= 1
        # Whole: a part of each row would be copied by way of unpinned memory, and waited for.
        host = self._host_draws[self._turn, : packed.numel()].view_as(packed)
        host.copy_(packed, non_blocking=True)
        event = None
        if self._capture:
            event = torch.cuda.Event()
            event.record()
        return Drawn(host[:, : self._count], event)

    def move(self, tables: np.ndarray) -> None:
        """Other block tables [rows, blocks] for the launches to come; one may be in flight.

        A row of the cache's dummy block belongs to nobody any more: what it draws is waste.
        """
        host = self._host_tables[self._turn]
        host[: self._bucket] = self.cache.dummy_block
        host.numpy()[: len(tables), : tables.shape[1]] = tables
        self._tables[: self._bucket].copy_(host[: self._bucket], non_blocking=True)

    def holds(self, rows: int) -> bool:
        """Whether as few rows as these would still be run by the graph in use."""
        return self._buckets[bisect.bisect_left(self._buckets, rows)] == self._bucket

    def _allocate(self, rows: int) -> None:
        """Buffers at fixed addresses; graphs read their first `bucket` rows."""
        device, pinned = self.cache.device, self._capture
        # Ids, positions, draws, lengths and seeds in one: a single copy to the device.
        self._numbers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(rows, self.width, dtype=torch.int32, device=device)
        self._host_numbers = torch.zeros(5, rows, dtype=torch.int64, pin_memory=pinned)
        # Two: one is still on its way when the next is written.
        self._host_tables = torch.zeros(2, rows, self.width, dtype=torch.int32, pin_memory=pinned)
        self._host_draws = torch.zeros(2, 2 * rows, dtype=torch.int64, pin_memory=pinned)
        self._turn = self._count = self._bucket = 0

    def _fill(self, inputs: Inputs, seeds: list[int], positions: list[int]) -> None:
        """Copies a step to the device, padded to the bucket's rows."""
        numbers, count = self._host_numbers.numpy(), self._count
        rows = (inputs.token_ids, inputs.positions, positions, inputs.lengths, seeds)
        for row, values in enumerate(rows):
            numbers[row, :count] = values
        numbers[:, count : self._bucket] = np.array([0, 0, 0, 1, 0])[:, None]
        self._numbers.copy_(self._host_numbers, non_blocking=True)
        self.move(inputs.block_tables)

    def _prepare(self, bucket: int) -> tuple[Callable[[], None], Tensor]:
        """What runs a step of `bucket` rows, and where it leaves its draws."""
        if not self._capture:
            packed = torch.empty(2, bucket, dtype=torch.int64)
            return lambda: packed.copy_(self._forward(bucket)), packed
        # Once on a side stream first: kernels compile and libraries allocate there, which a
        # capture forbids. The keys it writes are those the replay writes again.
        stream = _warm_up_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(bucket)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            packed = self._forward(bucket)
        return graph.replay, packed

    def _forward(self, bucket: int) -> Tensor:
        """[2, bucket] int64, see draw_packed; reads the buffers only, and nothing on the host.

        Leaves the buffers as the next step needs them, but for new blocks.
        """
        token_ids, places, draws, lengths, seeds = self._numbers[:, :bucket]
        tables, size = self._tables[:bucket], self.cache.block_size
        # A row that is waste may have counted beyond its table, and a learned one of positions.
        if self._positions is not None:
            places = places.clamp(max=self._positions - 1)
        block = (places // size).clamp(max=self.width - 1)
        slots = tables.gather(1, block[:, None])[:, 0].long() * size + places % size
        step = paged.decode_step(self.cache, slots, tables, lengths.clamp(max=self.width * size))
        with paged.running(step):
            output = self.module(
                input_ids=token_ids[None], position_ids=places[None], use_cache=False
            )
        logits = output.logits[0]
        packed = draw_packed(logits, self.sampling, seeds, draws, self.group, self.bans)
        self._numbers[0, :bucket] = packed[0].clamp(0, logits.shape[-1] - 1)
        self._numbers[1:4, :bucket] += 1
        return packed


@dataclass(frozen=True)
class Drawn:
    """Tokens and log-probs on their way to the host."""

    host: Tensor  # [2, rows], see draw_packed
    event: Any  # a torch.cuda.Event, None where the device is the host

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Waits for them: int64 [rows], valid until two launches later, and float32 [rows]."""
        if self.event:
            self.event.synchronize()
        token_ids, bits = self.host.numpy()
        return token_ids, bits.astype(np.int32).view(np.float32)
