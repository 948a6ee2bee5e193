"""Generation by a model that trains under ZeRO-3 on several ranks: ours beside what others do.

Ours shifts the weights to tensor-parallel shards first, which counts, and generates from them.
`generate` on the ZeRO-3 module gathers every weight for every token, on all ranks in step;
DeepSpeed's HybridEngineRollout calls the same `generate` without an end token. Each rank has its
own part of the prompts. Started by `gearshift bench generation --ranks N`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import RolloutConfig
from gearshift.engine.gearbox.gearbox import Gearbox
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.launch.bench import generation as single
from gearshift.launch.bench.table import show

LEFT_OUT = {
    "hf": "whole weights on one rank: run it with --ranks 1",
    "batch": "its workers would each need the whole weights: run it with --ranks 1",
}


class PadOnly:
    """What HybridEngineRollout asks a tokenizer for."""

    pad_token_id, eos_token_id = 0, single.NO_TOKEN


def start_ranks(args: argparse.Namespace) -> int:
    """The same command on `--ranks` processes of this machine."""
    words = []
    for key, value in vars(args).items():
        if value is None or value is False or value == []:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{key}", *map(str, values)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    command = [sys.executable, *launcher, "-m", "gearshift.launch.bench.zero3", *words]
    return subprocess.run(command, check=False).returncode


def main(args: argparse.Namespace) -> int:
    """Measures on a rank that was started; prints the table on rank 0."""
    device = distributed.start(args.threads)
    engine, model = partitioned(args)
    work = single.make_workload(args, model.config.get_text_config().vocab_size)
    sides = {"gearshift": ours(engine, model, work, args, device)}
    if "zero3" in args.peers:
        sides["generate on ZeRO-3"] = lambda: single.generate_run(model, mine(work), synced=True)
    if "deepspeed" in args.peers:
        sides["HybridEngineRollout"] = lambda: deepspeed_run(engine, mine(work), device)
    best: dict[str, single.Timing] = {}
    for _ in range(args.repeats):
        for name, run in sides.items():
            timing = timed(run, device)
            best[name] = timing.least(best.get(name, timing))
    if distributed.is_main():
        report(args, work, best)
    distributed.stop()
    return 0


def partitioned(args: argparse.Namespace) -> tuple[Any, nn.Module]:
    """A DeepSpeed engine at stage 3 without an optimizer, and the causal LM in it."""
    import deepspeed

    torch.manual_seed(0)
    model = single.load(args.model, getattr(torch, args.dtype)).eval()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": args.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine, model


def mine(work: single.Workload) -> single.Workload:
    """This rank's prompts, for sides that are data-parallel."""
    rank, world = distributed.rank(), distributed.world_size()
    return single.Workload(prompts=work.prompts[rank::world], limits=work.limits[rank::world])


def ours(engine: Any, model: nn.Module, work: single.Workload, args, device) -> Callable:
    """A shift into the generation gear, all responses of this rank's TP group, and back."""
    tp = args.tp or distributed.world_size()
    config = RolloutConfig(tp=tp, max_sequences=args.slots)
    gearbox = Gearbox(engine, model, config, device=device)
    groups = distributed.world_size() // tp
    share = single.Workload(
        prompts=work.prompts[gearbox.dp_index :: groups],
        limits=work.limits[gearbox.dp_index :: groups],
    )
    rollout = RolloutEngine(
        gearbox.module,
        config,
        eos_token_ids=[single.NO_TOKEN],
        pad_token_id=0,
        group=gearbox.tp_group,
        device=gearbox.device,
    )

    def run() -> None:
        with gearbox.generation():
            single.engine_run(rollout, share)
            rollout.rest()
        gearbox.meet()

    return run


def deepspeed_run(engine: Any, work: single.Workload, device: torch.device) -> None:
    from deepspeed.runtime.rollout import base
    from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout

    ids, mask = single.padded(work.prompts, device)
    request = base.RolloutRequest(prompt_ids=ids, prompt_attention_mask=mask)
    sampling = base.SamplingConfig(max_new_tokens=longest(work))
    HybridEngineRollout(engine, PadOnly()).generate(request, sampling)


def longest(work: single.Workload) -> int:
    """Over all ranks: they must make the same number of steps."""
    return int(distributed.global_max(torch.tensor(max(work.limits))))


def timed(run: Callable[[], None], device: torch.device) -> single.Timing:
    """Wall time of the slowest rank, CPU time of all."""
    distributed.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = [time.perf_counter() - wall, time.process_time() - cpu]
    seconds = torch.tensor(taken, dtype=torch.float64, device=device)
    return single.Timing(
        wall_s=distributed.global_max(seconds)[0].item(),
        cpu_s=distributed.global_sum(seconds)[1].item(),
    )


def report(args: argparse.Namespace, work: single.Workload, best: dict) -> None:
    world, fastest = distributed.world_size(), best["gearshift"]
    rows = [
        [
            name,
            f"{work.tokens / timing.wall_s:.1f}",
            f"{timing.wall_s:.2f}",
            f"{timing.cpu_s:.2f}",
            f"{timing.wall_s / fastest.wall_s:.1f}x, {timing.cpu_s / fastest.cpu_s:.1f}x",
        ]
        for name, timing in best.items()
    ]
    notes = [f"{peer}: left out, {LEFT_OUT[peer]}" for peer in args.peers if peer in LEFT_OUT]
    title = f"{len(work.prompts)} prompts, {work.tokens} tokens on {world} ranks under ZeRO-3"
    columns = ["side", "tokens/s", "wall s", "CPU s", "gearshift is faster by (wall, CPU)"]
    show(title, columns, rows, notes)
    if args.json:
        figures = {
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "tokens": work.tokens,
            "ranks": world,
            "sides": {name: asdict(timing) for name, timing in best.items()},
        }
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("bench_zero3", description=__doc__)
    single.add_arguments(parser)
    sys.exit(main(parser.parse_args()))
