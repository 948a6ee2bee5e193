"""Run on ranks: both transfer routes against slices of whole tensors, without DeepSpeed.

    torchrun --nproc_per_node 4 transfer_on_ranks.py OUT

OUT/rank<r>.jsonl gets one object per TP size, node size and staging budget.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from gearshift.engine.gearbox.gearbox import make_groups
from gearshift.engine.gearbox.module import Shard
from gearshift.engine.gearbox.slicing import cut_heads
from gearshift.engine.gearbox.spec import Spec, balanced
from gearshift.engine.gearbox.transfer import all_gather_shift, exact_shift, minimum_bytes

CASES = [(1, 4), (2, 4), (4, 4), (1, 2), (2, 2), (1, 1)]  # TP size, ranks of a node
BUDGETS = (600, 4096, 2**20)  # bytes; the smallest cuts every matrix in many places


def specs_of(tp: int) -> list[tuple[Spec, ...]]:
    """One of each kind of cut; sizes divide by nothing, one is smaller than the world."""

    def each(shape, dim, cut):
        return tuple(Spec.cut(shape, dim, cut(rank)) for rank in range(tp))

    def halves(rank):
        start, stop = balanced(15, tp, rank)
        return [(start, stop), (15 + start, 15 + stop)]

    heads = [cut_heads(6, 3, tp, rank) for rank in range(tp)]
    return [
        each((37, 11), 0, lambda rank: [balanced(37, tp, rank)]),
        each((13, 29), 1, lambda rank: [balanced(29, tp, rank)]),
        each((3, 30, 7), 1, halves),
        each((12, 9), 0, lambda rank: heads[rank].intervals("k_proj", 12)),
        each((48, 5), 0, lambda rank: heads[rank].intervals("qkv_proj", 48)),
        (Spec.whole((3,)),) * tp,
        (Spec.whole((31,)),) * tp,
    ]


def make_shards(tp: int, dtype: torch.dtype) -> tuple[list[Shard], list[torch.Tensor]]:
    """Shards whose sources are laid out as ZeRO-3 does, and the slices they should become."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shards, expected, first = [], [], 1
    for specs in specs_of(tp):
        spec = specs[rank % tp]
        whole = torch.arange(first, first + spec.numel, dtype=torch.float64).to(dtype)
        first += spec.numel
        count = -(-spec.numel // world)
        padded = torch.full((count * world,), float("nan"), dtype=dtype)
        padded[: spec.numel] = whole
        source = nn.Parameter(torch.empty(0, dtype=dtype))
        source.ds_tensor = padded[rank * count : (rank + 1) * count].clone()
        empty = torch.full(spec.local_shape, -1.0, dtype=dtype)
        shards.append(Shard(source, specs, spec, nn.Parameter(empty, requires_grad=False)))
        rows = torch.cat([torch.arange(start, stop) for start, stop in spec.intervals])
        expected.append(whole.view(spec.shape).index_select(spec.dim, rows))
    return shards, expected


def least_bytes(shards: list[Shard], node_size: int) -> int:
    """What must come to this rank, found by marking elements: the rail's parts, then the rest."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = 0
    for shard in shards:
        spec, count = shard.spec, shard.source.ds_tensor.numel()
        owner = (torch.arange(spec.numel) // count).view(spec.shape)
        rows = torch.cat([torch.arange(start, stop) for start, stop in spec.intervals])
        needed = owner.index_select(spec.dim, rows)
        on_rail = [r for r in range(world) if r % node_size == rank % node_size]
        rail = sum(int((owner == r).sum()) for r in on_rail if r != rank)
        rest = int((~torch.isin(needed, torch.tensor(on_rail))).sum())
        total += (rail + rest) * shard.source.element_size()
    return total


def main(out: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    with Path(out, f"rank{dist.get_rank()}.jsonl").open("w") as log:
        for tp, node_size in CASES:
            _, topology = make_groups(node_size, tp)
            for budget in BUDGETS:
                for route in (all_gather_shift, exact_shift):
                    # fp32, then bf16: two dtypes never share a bucket
                    shards, expected = make_shards(tp, torch.float32)
                    more = make_shards(tp, torch.bfloat16)
                    shards, expected = shards + more[0], expected + more[1]
                    traffic = route(shards, topology, budget)
                    pairs = zip(shards, expected, strict=True)
                    wrong = sum(not torch.equal(s.parameter, e) for s, e in pairs)
                    row = dict(tp=tp, node_size=node_size, budget=budget, route=route.__name__)
                    row |= dict(wrong=wrong, **vars(traffic))
                    row |= dict(minimum=minimum_bytes(shards, topology))
                    row |= dict(least=least_bytes(shards, node_size))
                    row |= dict(total=sum(s.spec.numel * s.source.element_size() for s in shards))
                    print(json.dumps(row), file=log)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
