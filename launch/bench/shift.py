"""Times the gear shift: ZeRO-3 partitions to tensor-parallel shards, and their release.

In the same run and turn by turn: our exact route, the plain all-gather route, and DeepSpeed's
GatheredParameters over the whole model. Starts its own ranks unless a launcher has.

  gearshift bench shift --ranks 2 --tp 2
  gearshift bench shift --ranks 4 --tp 2 --nodes 2      # two nodes of two, on one machine
  deepspeed --no_local_rank --module gearshift.launch.cli bench shift --model DIR --tp 4
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.distributed import ranks_per_node
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import RolloutConfig
from gearshift.engine.gearbox.gearbox import Gearbox
from gearshift.engine.zero.layout import partition, whole_shape
from gearshift.launch.bench import ranks
from gearshift.launch.bench.record import write_json
from gearshift.launch.bench.table import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes to start")
    parser.add_argument("--tp", type=int, default=0, help="TP size; 0: all ranks of a node")
    parser.add_argument("--nodes", type=int, default=1, help="treat the started ranks as so many")
    parser.add_argument("--model", help="Hugging Face directory; none: a random Llama")
    parser.add_argument("--hidden", type=int, default=512, help="of the random model")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--vocab", type=int, default=32000, help="of the random model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--bucket-mb", type=float, default=0, help="staging; 0: 256 GPU, 16 CPU")
    parser.add_argument(
        "--repeats", type=int, default=5, help="shifts of each kind, one unmeasured"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")


def main(args: argparse.Namespace) -> int:
    """Prints the table on rank 0. Raises ValueError for sizes that do not go together."""
    if args.repeats < 2:
        raise ConfigError(f"--repeats {args.repeats}", "needs at least 2, the first is a warm-up")
    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}", "must be at least 1")
    if args.nodes < 1 or args.ranks % args.nodes:
        raise ConfigError(f"--nodes {args.nodes}", f"must divide the {args.ranks} ranks")
    if args.ranks > 1 and "RANK" not in os.environ:
        return ranks.start("shift", args)
    if args.nodes > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(args.ranks // args.nodes)
    return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    device = distributed.start()
    engine, model = _partitioned_model(args)
    tp = args.tp or ranks_per_node()
    config = RolloutConfig(tp=tp, shift_bucket_mb=args.bucket_mb)
    exact = Gearbox(engine, model, config, device=device)
    plain = Gearbox(engine, model, config, device=device, route="all_gather")
    routes = {
        "exact": lambda: _shift(exact),
        "all-gather": lambda: _shift(plain),
        "GatheredParameters": lambda: _gather(model),
    }
    seen: dict[str, list[dict]] = {name: [] for name in routes}
    for _ in range(args.repeats):
        for name, route in routes.items():
            seen[name].append(_timed(route, device))
    minimum = _sum(exact.stats.bytes_minimum, device)
    result = {
        "ranks": distributed.world_size(),
        "ranks_per_node": ranks_per_node(),
        "tp": tp,
        "dtype": args.dtype,
        "model_bytes": sum(whole_shape(p).numel() * p.element_size() for p in model.parameters()),
        "bucket_bytes": exact.budget,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "rows": [_row(name, figures[1:], minimum) for name, figures in seen.items()],
    }
    if distributed.is_main():
        _print_table(result)
        write_json(args.json, result)
    dist.destroy_process_group()
    return 0


def _partitioned_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """A causal LM in ZeRO-3 partitions, without an optimizer, and its engine."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        heads = max(1, args.hidden // 64)
        config = LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
        )
        model = LlamaForCausalLM(config).to(dtype)
    engine = ranks.partition(model, args.dtype, stage3_param_persistence_threshold=0)
    return engine, model


def _shift(gearbox: Gearbox) -> tuple[float, dict]:
    """When the weights were there, and what the shift cost this rank in bytes."""
    with gearbox.generation():
        ready = time.perf_counter()
    stats = gearbox.stats
    return ready, {
        "received": stats.bytes_received,
        "staging": stats.peak_staging_bytes,
        "held": stats.shard_bytes,
    }


def _gather(model: torch.nn.Module) -> tuple[float, dict]:
    """The whole model on every rank, as `GatheredParameters` does it in one go."""
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        ready = time.perf_counter()
        held = sum(parameter.nbytes for parameter in parameters)
    others = distributed.world_size() - 1
    received = sum(partition(parameter).nbytes * others for parameter in parameters)
    return ready, {"received": received, "staging": 0, "held": held}


def _timed(route: Callable[[], tuple[float, dict]], device: torch.device) -> dict:
    """One shift there and back: seconds and memory of the worst rank, bytes of all ranks.

    On GPUs staging is the allocator's peak less what stays; on CPU the buffers are counted.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    distributed.barrier()
    start = time.perf_counter()
    ready, cost = route()
    if cuda:
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        cost["staging"] = peak - before - cost["held"]
    figures = [ready - start, time.perf_counter() - ready, cost["staging"], cost["held"]]
    worst = distributed.global_max(torch.tensor(figures, dtype=torch.float64, device=device))
    names = ("there", "back", "staging", "held")
    return dict(zip(names, worst.tolist(), strict=True), received=_sum(cost["received"], device))


def _sum(count: int, device: torch.device) -> int:
    """Over all ranks; fp64 is exact up to 9 PB."""
    total = distributed.global_sum(torch.tensor(float(count), dtype=torch.float64, device=device))
    return int(total.item())


def _row(name: str, figures: list[dict], minimum: int) -> dict:
    """Medians over the measured shifts; the bytes of all are the same."""
    return {
        "route": name,
        "shift_s": statistics.median(f["there"] for f in figures),
        "shift_s_min": min(f["there"] for f in figures),
        "back_s": statistics.median(f["back"] for f in figures),
        "received_bytes": figures[0]["received"],
        "received_over_minimum": figures[0]["received"] / minimum if minimum else None,
        "staging_bytes": int(max(f["staging"] for f in figures)),
        "held_bytes": int(figures[0]["held"]),
        "peak_bytes": int(max(f["staging"] + f["held"] for f in figures)),
    }


def _print_table(result: dict) -> None:
    megabytes = result["model_bytes"] / 2**20
    title = (
        f"gear shift of {megabytes:.0f} MB on {result['ranks']} ranks, tp {result['tp']}, "
        f"staging {result['bucket_bytes'] / 2**20:.0f} MB, {result['device']}"
    )
    rows = []
    for row in result["rows"]:
        ratio = row["received_over_minimum"]
        rows.append(
            [
                row["route"],
                f"{1e3 * row['shift_s']:.1f}",
                f"{1e3 * row['back_s']:.1f}",
                f"{row['received_bytes'] / result['ranks'] / 2**20:.1f}",
                "-" if ratio is None else f"{ratio:.3f}",
                f"{row['staging_bytes'] / 2**20:.1f}",
                f"{row['held_bytes'] / 2**20:.1f}",
            ]
        )
    note = (
        "there, back: ms, median, slowest rank. received: MB, mean of the ranks; least: what an "
        "exact transfer receives. staging, held: MB, largest rank."
    )
    columns = ["", "there", "back", "received", "/ least", "staging", "held"]
    show(title, columns, rows, [note], left=1)
