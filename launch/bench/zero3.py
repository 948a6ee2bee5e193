"""Generation by a model that trains under ZeRO-3 on several ranks: ours beside what others do.

Ours shifts the weights to tensor-parallel shards first, which counts, and generates from them.
`generate` on the ZeRO-3 module gathers every weight for every token, on all ranks in step;
DeepSpeed's HybridEngineRollout calls the same `generate` without an end token. Each rank has its
own part of the prompts. Started by `gearshift bench generation --ranks N`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import RolloutConfig
from gearshift.engine.data.streams import left_padded
from gearshift.engine.gearbox.gearbox import Gearbox
from gearshift.launch.bench import ranks, workload
from gearshift.launch.bench.record import write_json
from gearshift.launch.bench.workload import Timing, Workload

LEFT_OUT = {
    "hf": "whole weights on one rank: run it with --ranks 1",
    "batch": "its workers would each need the whole weights: run it with --ranks 1",
}


class PadOnly:
    """What HybridEngineRollout asks a tokenizer for."""

    pad_token_id, eos_token_id = 0, workload.NO_TOKEN


def main(args: argparse.Namespace) -> int:
    """Measures on a rank that was started; prints the table on rank 0."""
    device = distributed.start(args.threads)
    engine, model = partitioned(args)
    work = workload.make_workload(args, model.config.get_text_config().vocab_size)
    mine = work.share(distributed.rank(), distributed.world_size())  # where sides are data-parallel
    sides = {"gearshift": ours(engine, model, work, args, device)}
    if "zero3" in args.peers:
        sides["generate on ZeRO-3"] = lambda: workload.generate_run(model, mine, synced=True)
    if "deepspeed" in args.peers:
        sides["HybridEngineRollout"] = lambda: deepspeed_run(engine, mine, device)
    best = workload.measure(sides, args.repeats, lambda run: timed(run, device))
    if distributed.is_main():
        report(args, work, best)
    distributed.stop()
    return 0


def partitioned(args: argparse.Namespace) -> tuple[Any, nn.Module]:
    """A DeepSpeed engine at stage 3 without an optimizer, and the causal LM in it."""
    torch.manual_seed(0)
    model = workload.load(args.model, getattr(torch, args.dtype)).eval()
    engine = ranks.partition(model, args.dtype)
    engine.eval()
    return engine, model


def ours(engine: Any, model: nn.Module, work: Workload, args, device) -> Callable:
    """A shift into the generation gear, all responses of this rank's TP group, and back."""
    tp = args.tp or distributed.world_size()
    config = RolloutConfig(tp=tp, max_sequences=args.slots)
    gearbox = Gearbox(engine, model, config, device=device)
    share = work.share(gearbox.dp_index, distributed.world_size() // tp)
    rollout = workload.make_engine(gearbox.module, config, gearbox.device, gearbox.tp_group)

    def run() -> None:
        with gearbox.generation():
            workload.engine_run(rollout, share)
            rollout.rest()
        gearbox.wait_for_groups()

    return run


def deepspeed_run(engine: Any, work: Workload, device: torch.device) -> None:
    from deepspeed.runtime.rollout import base
    from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout

    ids, mask = (x.long().to(device) for x in left_padded(work.prompts, 0))
    request = base.RolloutRequest(prompt_ids=ids, prompt_attention_mask=mask)
    # The longest of all ranks: they must make the same number of steps.
    longest = int(distributed.global_max(torch.tensor(max(work.limits))))
    sampling = base.SamplingConfig(max_new_tokens=longest)
    HybridEngineRollout(engine, PadOnly()).generate(request, sampling)


def timed(run: Callable[[], None], device: torch.device) -> Timing:
    """Wall time of the slowest rank, CPU time of all."""

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    distributed.barrier()
    own = workload.timed(whole)
    seconds = torch.tensor([own.wall_s, own.cpu_s], dtype=torch.float64, device=device)
    return Timing(
        wall_s=distributed.global_max(seconds)[0].item(),
        cpu_s=distributed.global_sum(seconds)[1].item(),
    )


def report(args: argparse.Namespace, work: Workload, best: dict[str, Timing]) -> None:
    world = distributed.world_size()
    notes = [f"{peer}: left out, {LEFT_OUT[peer]}" for peer in args.peers if peer in LEFT_OUT]
    title = f"{len(work.prompts)} prompts, {work.tokens} tokens on {world} ranks under ZeRO-3"
    workload.show_sides(title, work, best, notes)
    write_json(args.json, workload.figures_of(args, work, best) | {"ranks": world})
