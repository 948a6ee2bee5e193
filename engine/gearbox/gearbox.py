"""The gearbox: training gear (ZeRO partitions) <-> generation gear (tensor-parallel shards)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from gearshift.engine.cluster.distributed import barrier, ranks_per_node, world_size
from gearshift.engine.cluster.distributed import rank as world_rank
from gearshift.engine.config.schema import RolloutConfig
from gearshift.engine.gearbox import transfer as reshard
from gearshift.engine.gearbox.adapters import adapters, copy_layers
from gearshift.engine.gearbox.module import Rank, Shard, copy_buffers, localize, merges, meta_twin
from gearshift.engine.gearbox.quantised import packed_layers, share_layers
from gearshift.engine.gearbox.slicing import plan_tensor_parallel
from gearshift.engine.gearbox.spec import BUCKET_MB
from gearshift.engine.gearbox.transfer import ShiftCost, Topology
from gearshift.engine.zero.layout import (
    is_on_disk,
    is_partitioned,
    partition,
    ranks_of,
    whole_shape,
)


@dataclass(frozen=True)
class ShiftStats:
    """One shift into the generation gear, on this rank."""

    seconds: float = 0.0
    bytes_received: int = 0
    bytes_minimum: int = 0  # what any exact route must receive
    peak_staging_bytes: int = 0
    shard_bytes: int = 0  # memory of the generation gear's own weights; views take none


class Gearbox:
    """Gives the actor's current weights to a module that generates, and takes the memory back.

    engine: the DeepSpeed engine that trains them, at any ZeRO stage. hf_module: the transformers
    causal LM inside it. Training state (weights, optimizer, hooks, random numbers) is only read.
    merged: adapters are added to this gear's own copy of the weights, which is dequantised where
    they are in 4 bit; False: they stay beside them, at TP size 1.

    `module` generates; its parameters are empty outside `generation()`, unless they are kept.
    TP groups are consecutive ranks: `tp_group` (None for a group of one), `tp_rank`, `tp_size`,
    and `dp_index`, the number of this rank's group. Raises ValueError for what cannot be done.
    World-collective: construct it at the same point on every rank.
    """

    def __init__(
        self,
        engine: Any,
        hf_module: nn.Module,
        config: RolloutConfig,
        *,
        device: torch.device,
        route: Literal["exact", "all_gather"] = "exact",
        merged: bool = True,
    ):
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.route, self.stats = route, ShiftStats()
        self._source, self._resident = hf_module, config.weights == "resident"
        self.budget = int((config.shift_bucket_mb or BUCKET_MB[self.device.type]) * 2**20)
        node_size = ranks_per_node()
        check_partitions(hf_module)
        merged = merged or not adapters(hf_module)
        self.tp_size = config.tp or (
            smallest_tp(hf_module, node_size, self.device) if merged else 1
        )
        check_tp(self.tp_size, node_size)
        self.module = meta_twin(hf_module)
        if not merged:
            assert self.tp_size == 1, "config/check.py refuses it"
            share_layers(self.module, hf_module)
            copy_layers(self.module, hf_module)
        plan = plan_tensor_parallel(self.module, self.tp_size)
        self.tp_group, self._topology = make_groups(node_size, self.tp_size)
        self.dp_index, self.tp_rank = divmod(world_rank(), self.tp_size)
        place = Rank(self.tp_rank, self.tp_size, self.tp_group)
        self._shards = localize(self.module, hf_module, plan, place, self.device)
        self._merges = merges(self._shards, hf_module, place, self.device) if merged else []
        self._passing = [shard for merge in self._merges for shard in merge.parts]
        self._packed = [shard for shard in self._shards if shard.packed]
        self._own = {id(shard) for shard in self._packed}  # never views
        self._own |= {id(merge.weight) for merge in self._merges}
        self._partitioned = engine.zero_optimization_stage() == 3 and world_size() > 1
        here = all(partition(shard.source).device == self.device for shard in self._shards)
        self._aliased = not self._partitioned and self.tp_size == 1 and here
        self._bytes_minimum = 0
        if self._partitioned:
            self._bytes_minimum = reshard.minimum_bytes(self._moving, self._topology)

    @property
    def _moving(self) -> list[Shard]:
        """All that a shift moves: the weights that stay, and adapters until they are added."""
        return [*(shard for shard in self._shards if not shard.packed), *self._passing]

    @contextmanager
    def generation(self) -> Iterator[nn.Module]:
        """Yields the inference module, in eval mode, with the current weights.

        World-collective on entry, not on leaving. Its parameters are this rank's shards; where the
        whole weights are on this rank anyway and TP size is 1 they are views, not copies, but for
        those that an adapter is added to or that are dequantised.
        """
        self._shift()
        try:
            yield self.module
        finally:
            self._release()

    def wait_for_groups(self) -> None:
        """Waits until every TP group has generated. World-collective."""
        if world_size() > self.tp_size:
            barrier()

    @torch.no_grad()
    def _shift(self) -> None:
        start = time.perf_counter()
        if self._aliased:
            cost = self._alias()
        else:
            self._allocate(self._moving)
            cost = self._fill()
        self._allocate(self._packed)
        for shard in self._packed:
            shard.unpack()
        for merge in self._merges:
            merge.run()
        for shard in self._passing:
            shard.parameter.data = shard.parameter.new_empty(0)
        copy_buffers(self.module, self._source, self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        shard_bytes = sum(s.parameter.nbytes for s in self._shards if not self._is_view(s))
        self.stats = ShiftStats(
            seconds=time.perf_counter() - start,
            bytes_received=cost.received,
            bytes_minimum=self._bytes_minimum,
            peak_staging_bytes=cost.peak_staging,
            shard_bytes=shard_bytes,
        )

    def _is_view(self, shard: Shard) -> bool:
        return self._aliased and id(shard) not in self._own

    def _alias(self) -> ShiftCost:
        own = [shard for shard in self._moving if not self._is_view(shard)]
        self._allocate(own)
        for shard in self._moving:
            weights = partition(shard.source).view(shard.spec.shape)
            if self._is_view(shard):
                shard.parameter.data = weights
            else:
                shard.parameter.data.copy_(weights)
        return ShiftCost()

    def _allocate(self, shards: list[Shard]) -> None:
        for shard in shards:
            if shard.parameter.shape != shard.spec.local_shape:
                shard.parameter.data = shard.parameter.new_empty(shard.spec.local_shape)

    def _fill(self) -> ShiftCost:
        if not self._partitioned:
            return reshard.local_shift(self._moving, self.budget)
        if self.route == "all_gather":
            return reshard.all_gather_shift(self._moving, self._topology, self.budget)
        return reshard.exact_shift(self._moving, self._topology, self.budget)

    def _release(self) -> None:
        for shard in self._shards:
            if self._is_view(shard) or not self._resident:
                shard.parameter.data = shard.parameter.new_empty(0)


def check_tp(tp: int, node_size: int) -> None:
    if node_size % tp:
        raise ValueError(
            f"rollout.tp={tp}: must divide the {node_size} ranks of a node; use one of "
            f"{divisors(node_size)}"
        )


def check_partitions(module: nn.Module) -> None:
    """Raises ValueError where ZeRO-3 keeps a parameter in a form that shifts cannot read."""
    for name, parameter in module.named_parameters():
        if not is_partitioned(parameter):
            continue
        if is_on_disk(parameter):
            raise ValueError(
                "zero_optimization.offload_param.device=nvme: the actor's weights must be in "
                "memory to generate; use cpu or none"
            )
        if partition(parameter).dtype != parameter.dtype:
            raise ValueError(
                f"{name} is kept as {partition(parameter).dtype}: quantized ZeRO++ weights cannot "
                "be read for generation; unset zero_quantized_weights"
            )
        if ranks_of(parameter) != world_size():
            raise ValueError(
                f"{name} is partitioned over a part of the ranks: generation needs parameters "
                "partitioned over all of them"
            )


def smallest_tp(module: nn.Module, node_size: int, device: torch.device) -> int:
    """The least TP size whose shards fill at most half of the free memory of every rank.

    The other half is for the KV cache. On CPU, and alone, it is 1.
    """
    if device.type == "cpu" or world_size() == 1:
        return 1
    weights = sum(whole_shape(p).numel() * p.element_size() for p in module.parameters())
    for _, layer in packed_layers(module):  # a shard is dequantised
        weights += layer.state.shape.numel() * layer.state.dtype.itemsize - layer.weight.numel()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.tensor(torch.cuda.mem_get_info(device)[0] + cached, device=device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    sizes = divisors(node_size)
    return next((size for size in sizes if weights / size <= free.item() / 2), node_size)


def divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def make_groups(node_size: int, tp: int) -> tuple[dist.ProcessGroup | None, Topology]:
    """This rank's TP group and the topology; every rank creates all groups, in the same order."""
    rank, world = world_rank(), world_size()
    if world == 1:
        return None, Topology(rank, world, node_size, tp)
    nodes = [range(first, first + node_size) for first in range(0, world, node_size)]
    rails = [range(local, world, node_size) for local in range(node_size)]
    node_group = _own_group(nodes)
    rail_group = _own_group(rails) if len(nodes) > 1 else None
    tp_group = None
    if tp == node_size:
        tp_group = node_group
    elif tp > 1:
        tp_group = _own_group([range(first, first + tp) for first in range(0, world, tp)])
    return tp_group, Topology(rank, world, node_size, tp, node_group, rail_group)


def _own_group(members: list[range]) -> dist.ProcessGroup:
    """The group this rank is in, of disjoint groups that together hold all ranks."""
    if len(members) == 1:
        return dist.group.WORLD
    groups = [dist.new_group(list(ranks)) for ranks in members]
    return next(g for g, ranks in zip(groups, members, strict=True) if world_rank() in ranks)
