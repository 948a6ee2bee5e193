"""Moves weights from ZeRO-3's flat partitions to tensor-parallel shards, in bounded memory.

ZeRO-3 keeps parameter p as a flat vector in W equal parts: rank r holds [r n, (r + 1) n),
n = ceil(numel / W), the tail padded. A bucket is the same range of every rank's part, cut anywhere,
also inside a parameter, so that staging never exceeds its budget. Two routes give the same shards:

`all_gather_shift` gathers whole buckets on every rank and keeps what belongs to the shard:
(1 - 1/W) P bytes received. `exact_shift` sends each rank only its shard: with one node of W ranks
that is the lower bound, (1 - 1/W) P/t on average. Over several nodes, ranks of equal local index
first gather between nodes (a rail), so each byte enters a node once, then exchange inside the node.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.gearbox.module import Shard, all_gather_flat
from gearshift.engine.zero.layout import partition


@dataclass(frozen=True)
class Topology:
    """Ranks, `node_size` of them a node, TP groups of consecutive ranks inside nodes."""

    rank: int
    world: int
    node_size: int
    tp: int
    node_group: dist.ProcessGroup | None = None
    rail_group: dist.ProcessGroup | None = None

    @property
    def nodes(self) -> int:
        return self.world // self.node_size

    @property
    def local(self) -> int:
        return self.rank % self.node_size


@dataclass
class ShiftCost:
    """Bytes that came from other ranks, and the most that staging tensors held at once."""

    received: int = 0
    peak_staging: int = 0

    def stage(self, *tensors: Tensor) -> None:
        self.peak_staging = max(self.peak_staging, sum(t.nbytes for t in tensors))


@dataclass(frozen=True, slots=True)
class Segment:
    """The range [start, stop) of every rank's part of one parameter, at `offset` in a bucket."""

    shard: Shard
    start: int
    stop: int
    offset: int

    def span(self, rank: int) -> tuple[int, int]:
        """The range in the whole flat parameter that this is on `rank`, padding left out."""
        numel, base = self.shard.spec.numel, rank * partition(self.shard.source).numel()
        return min(base + self.start, numel), min(base + self.stop, numel)


def filled(shard: Shard, start: int, stop: int) -> Tensor:
    """The flat part of the shard that holds its elements of the whole's range [start, stop)."""
    spec = shard.spec
    return shard.parameter.data.view(-1)[spec.count_below(start) : spec.count_below(stop)]


@dataclass(frozen=True)
class Bucket:
    """Segments of one dtype; `count` elements of every rank's part."""

    segments: tuple[Segment, ...]
    count: int
    dtype: torch.dtype


def make_buckets(shards: list[Shard], budget: int, copies: int) -> Iterator[Bucket]:
    """Cuts all parts into buckets, the same on every rank.

    budget: staging bytes. copies: how many elements are staged for one element of a bucket.
    """
    for dtype in dict.fromkeys(shard.source.dtype for shard in shards):
        capacity = budget // (copies * dtype.itemsize)
        if capacity < 1:
            raise ValueError(
                f"rollout.shift_bucket_mb={budget / 2**20:.4g}: too small for this many ranks; "
                "raise it"
            )
        segments: list[Segment] = []
        count = 0
        for shard in (shard for shard in shards if shard.source.dtype == dtype):
            start, numel = 0, partition(shard.source).numel()
            while start < numel:
                stop = min(numel, start + capacity - count)
                segments.append(Segment(shard, start, stop, count))
                count += stop - start
                start = stop
                if count == capacity:
                    yield Bucket(tuple(segments), count, dtype)
                    segments, count = [], 0
        if segments:
            yield Bucket(tuple(segments), count, dtype)


def local_shift(shards: list[Shard], budget: int) -> ShiftCost:
    """Cuts shards out of parameters that are whole on this rank, on any device."""
    cost = ShiftCost()
    for bucket in make_buckets(shards, budget, copies=1):
        for segment in bucket.segments:
            start, stop = segment.span(0)
            chunk = partition(segment.shard.source)[start:stop]
            out = filled(segment.shard, start, stop)
            if chunk.device != out.device:
                chunk = chunk.to(out.device)
                cost.stage(chunk)
            segment.shard.spec.extract(chunk, start, out)
    return cost


def all_gather_shift(shards: list[Shard], topology: Topology, budget: int) -> ShiftCost:
    """The plain route: every rank receives everything and keeps its shards. World-collective."""
    cost = ShiftCost()
    for bucket in make_buckets(shards, budget, copies=topology.world + 1):
        own = _pack(bucket)
        gathered = own.new_empty(topology.world * bucket.count)
        all_gather_flat(gathered, own)
        cost.stage(own, gathered)
        cost.received += gathered.nbytes - own.nbytes
        parts = gathered.view(topology.world, bucket.count)
        for segment in bucket.segments:
            for rank in range(topology.world):
                start, stop = segment.span(rank)
                chunk = parts[rank, segment.offset : segment.offset + stop - start]
                segment.shard.spec.extract(chunk, start, filled(segment.shard, start, stop))
    return cost


def exact_shift(shards: list[Shard], topology: Topology, budget: int) -> ShiftCost:
    """The lean route: every rank receives its shards only. World-collective."""
    cost = ShiftCost()
    # Own part, gathered rail, and, where all of it goes to every rank, what is sent and received.
    copies = 1 + (topology.nodes if topology.nodes > 1 else 0) + 2 * topology.world
    for bucket in make_buckets(shards, budget, copies):
        own = _pack(bucket)
        held = own.view(1, -1)
        if topology.nodes > 1:
            held = own.new_empty(topology.nodes * bucket.count)
            all_gather_flat(held, own, group=topology.rail_group)
            cost.received += held.nbytes - own.nbytes
            held = held.view(topology.nodes, bucket.count)
        _keep_own(bucket, held, topology)
        if topology.node_size > 1:
            _exchange(bucket, held, own, topology, cost)
        else:
            cost.stage(own, held)
    return cost


def minimum_bytes(shards: list[Shard], topology: Topology) -> int:
    """What `exact_shift` must bring to this rank: its share of the other nodes' parts, then what
    its shards still lack. On one node this is the bound for any route."""
    total = 0
    for shard in shards:
        whole = Segment(shard, 0, partition(shard.source).numel(), 0)
        for rank in range(topology.world):
            start, stop = whole.span(rank)
            on_rail = rank % topology.node_size == topology.local
            elements = stop - start if on_rail else shard.spec.count(start, stop)
            total += elements * shard.source.dtype.itemsize * (rank != topology.rank)
    return total


def _pack(bucket: Bucket) -> Tensor:
    """This rank's part of a bucket on the shards' device; a view where one range is all of it."""
    device = bucket.segments[0].shard.parameter.device
    parts = [partition(s.shard.source)[s.start : s.stop] for s in bucket.segments]
    if len(parts) == 1:
        return parts[0].to(device)
    packed = torch.empty(bucket.count, dtype=bucket.dtype, device=device)
    for segment, part in zip(bucket.segments, parts, strict=True):
        packed[segment.offset : segment.offset + part.numel()].copy_(part)
    return packed


def _chunks(
    bucket: Bucket, topology: Topology, local: int
) -> Iterator[tuple[Segment, int, int, int]]:
    """(segment, node, start, stop): the ranges of the whole that local index `local` holds after
    the rail gather, in the order in which they are sent."""
    for segment in bucket.segments:
        for node in range(topology.nodes):
            start, stop = segment.span(node * topology.node_size + local)
            if stop > start:
                yield segment, node, start, stop


def _keep_own(bucket: Bucket, held: Tensor, topology: Topology) -> None:
    for segment, node, start, stop in _chunks(bucket, topology, topology.local):
        chunk = held[node, segment.offset : segment.offset + stop - start]
        segment.shard.spec.extract(chunk, start, filled(segment.shard, start, stop))


def _exchange(
    bucket: Bucket, held: Tensor, own: Tensor, topology: Topology, cost: ShiftCost
) -> None:
    """Sends to every other rank of the node what its shards need of `held`, and receives so."""
    send_counts, receive_counts = [0] * topology.node_size, [0] * topology.node_size
    others = [local for local in range(topology.node_size) if local != topology.local]
    mine = list(_chunks(bucket, topology, topology.local))
    for other in others:
        send_counts[other] = sum(
            segment.shard.specs[other % topology.tp].count(start, stop)
            for segment, _, start, stop in mine
        )
        receive_counts[other] = sum(
            segment.shard.spec.count(start, stop)
            for segment, _, start, stop in _chunks(bucket, topology, other)
        )
    outgoing, incoming = own.new_empty(sum(send_counts)), own.new_empty(sum(receive_counts))
    position = 0
    for other in others:
        for segment, node, start, stop in mine:
            spec = segment.shard.specs[other % topology.tp]
            size = spec.count(start, stop)
            chunk = held[node, segment.offset : segment.offset + stop - start]
            spec.extract(chunk, start, outgoing[position : position + size])
            position += size
    dist.all_to_all_single(
        incoming, outgoing, receive_counts, send_counts, group=topology.node_group
    )
    rail = [held] if topology.nodes > 1 else []
    cost.stage(own, *rail, outgoing, incoming)
    cost.received += incoming.nbytes
    position = 0
    for other in others:
        for segment, _, start, stop in _chunks(bucket, topology, other):
            out = filled(segment.shard, start, stop)
            out.copy_(incoming[position : position + out.numel()])
            position += out.numel()
