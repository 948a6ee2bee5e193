"""Generation speed: the rollout engine beside transformers' own ways to generate.

All sides answer the same prompts with the same response lengths, in turns, so that a busy machine
hits them alike; the least of `--repeats` counts. End tokens are off: lengths are prescribed.
"""

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import nn

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import RolloutConfig
from gearshift.engine.rollout import engine as rollout_engine
from gearshift.engine.rollout.burst import Burst
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.sampling import Completion
from gearshift.launch.bench import ranks, workload
from gearshift.launch.bench.record import write_json
from gearshift.launch.bench.workload import Timing, Workload

PEERS = ("hf", "batch", "zero3", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default="shape:smollm2-135m",
        help="directory, .gguf file, asset:NAME, or shape:NAME for random weights (%(default)s)",
    )
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    add("--batch", type=int, default=32, help="prompts")
    add("--prompt", type=int, default=128, help="longest prompt")
    add("--shortest", type=int, default=0, help="shortest prompt; 0: an eighth of the longest")
    add("--new", type=int, default=123, help="longest response")
    add("--ragged", action="store_true", help="response lengths from 4 up, a quarter of --new mean")
    add("--slots", type=int, default=256, help="rollout.max_sequences")
    add(
        "--peers",
        nargs="*",
        default=[],
        choices=PEERS,
        help="hf: generate; batch: continuous batching; with --ranks, zero3: generate on the "
        "partitioned module; deepspeed: HybridEngineRollout",
    )
    add("--ranks", type=int, default=1, help="processes, under ZeRO-3 if more than one")
    add("--tp", type=int, default=0, help="with --ranks: TP size of ours; 0: all ranks")
    add("--repeats", type=int, default=2, help="runs of each side; the fastest counts")
    add("--threads", type=int, default=0, help="CPU threads; 0: as PyTorch finds")
    add("--json", type=Path, help="also write the figures to this file")


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """What only the engine can be asked. Seconds are wall time of the fastest run."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # None: no step was timed
    decode_step_ms: float | None
    decode_steps: int  # timed, out of those without prompt tokens
    capturing_rounds: int  # left out of the decode figures: each captured a graph
    outside_forward: float | None  # share of a decode step; None: graphs, whose replays call none
    graphs: bool
    kv_bytes: int
    slots: int  # sequences decoded at once, at most
    capture_s: float  # of CUDA graphs, once


def main(args: argparse.Namespace) -> int:
    if args.ranks > 1:
        if "RANK" not in os.environ:
            return ranks.start("generation", args)
        from gearshift.launch.bench import zero3

        return zero3.main(args)
    partitioned = sorted({"zero3", "deepspeed"} & set(args.peers))
    if partitioned:
        raise ValueError(f"--peers {' '.join(partitioned)}: needs --ranks of at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    distributed.forbid_cudnn_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = workload.load(args.model, getattr(torch, args.dtype), device).eval()
    work = workload.make_workload(args, model.config.get_text_config().vocab_size)
    engine = workload.make_engine(model, RolloutConfig(max_sequences=args.slots), device)
    made: list[Completion] = []
    sides = {"gearshift": lambda: made.__setitem__(slice(None), workload.engine_run(engine, work))}
    if "hf" in args.peers:
        sides["transformers generate"] = lambda: workload.generate_run(model, work)
    if "batch" in args.peers:
        sides["transformers continuous"] = lambda: continuous_run(model, work)
    timings = workload.measure(sides, args.repeats)
    figures = measure_engine(engine, work)
    show(work, timings, figures)
    counts = token_counts(work, made)
    print("tokens: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    engine_figures = {"threads": torch.get_num_threads(), "engine": asdict(figures)}
    engine_figures["token_counts"] = counts
    write_json(args.json, workload.figures_of(args, work, timings) | engine_figures)
    return 0


def token_counts(work: Workload, made: list[Completion]) -> dict[str, int]:
    """What was really read and written."""
    prompts, responses = [*map(len, work.prompts)], [len(one.token_ids) for one in made]
    return {
        "rows": len(prompts),
        "shortest prompt": min(prompts),
        "longest prompt": max(prompts),
        "shortest response": min(responses),
        "longest response": max(responses),
        "all": sum(prompts) + sum(responses),
    }


def measure_engine(engine: RolloutEngine, work: Workload) -> EngineFigures:
    """Splits a run into prefill (a run of one token each) and the steps that only decode."""
    first = Workload(prompts=work.prompts, limits=[1] * len(work.limits))
    prefill = workload.measure({"": lambda: workload.engine_run(engine, first)}, 2)[""].wall_s
    decoding = [played for played in timed_rounds(engine, work) if not played.prefill]
    rounds = [played for played in decoding if not played.captured]
    seconds, steps = sum(r.seconds for r in rounds), sum(r.forwards for r in rounds)
    forward = None if engine._use_graphs else sum(r.forward_s for r in rounds)
    return EngineFigures(
        prefill_tokens_per_s=sum(map(len, work.prompts)) / prefill,
        decode_tokens_per_s=sum(r.tokens for r in rounds) / seconds if steps else None,
        decode_step_ms=1e3 * seconds / steps if steps else None,
        decode_steps=steps,
        capturing_rounds=len(decoding) - len(rounds),
        outside_forward=1 - forward / seconds if steps and forward is not None else None,
        graphs=engine._use_graphs,
        kv_bytes=engine.kv_bytes,
        slots=engine.config.max_sequences,
        capture_s=engine.capture_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Round:
    """Forwards of the engine that one plan serves, to the tokens on the host."""

    seconds: float
    forward_s: float  # inside the model's forward; 0 with graphs
    forwards: int
    tokens: int  # drawn
    prefill: bool  # computed prompt tokens, too
    captured: bool


def timed_rounds(engine: RolloutEngine, work: Workload) -> list[Round]:
    """A run, round by round. With graphs the forward has no hooks: they would wait in a capture."""
    rounds: list[Round] = []
    drawn: list[int] = []
    plans: list[bool] = []
    inside: list[float] = []
    play, append, pack = engine._round, engine._append, rollout_engine.pack
    take = Burst.take

    def counted(tokens, *rest):
        tokens = list(tokens)
        drawn.append(len(tokens))
        return append(tokens, *rest)

    def counted_step(burst, token_ids, *rest):
        drawn.append(burst.drawing)
        return take(burst, token_ids, *rest)

    def planned(batch, *rest):
        plans.append(bool(batch.prefill))
        return pack(batch, *rest)

    def timed(*args):
        inside.clear()
        drawn.clear()
        capturing, start = engine.capture_seconds, _now()
        ended = list(play(*args))
        seconds = _now() - start
        captured = engine.capture_seconds != capturing
        values = dict(prefill=plans[-1], captured=captured, forwards=len(drawn))
        made = Round(seconds=seconds, forward_s=sum(inside), tokens=sum(drawn), **values)
        rounds.append(made)
        return ended

    with ExitStack() as stack:
        if not engine._use_graphs:
            before = engine.module.register_forward_pre_hook(lambda *_: inside.append(-_now()))
            after = engine.module.register_forward_hook(lambda *_: inside.append(_now()))
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(mock.patch.object(engine, "_round", timed))
        stack.enter_context(mock.patch.object(engine, "_append", counted))
        stack.enter_context(mock.patch.object(Burst, "take", counted_step))
        stack.enter_context(mock.patch.object(rollout_engine, "pack", planned))
        workload.engine_run(engine, work)
    return rounds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def continuous_run(model: nn.Module, work: Workload) -> None:
    """The same requests through transformers' continuous batching, with a cache of their size."""
    options = signature(transformers.ContinuousBatchingConfig).parameters
    name, size = "page_size" if "page_size" in options else "block_size", 32
    blocks = sum(-(-(len(p) + n) // size) for p, n in zip(work.prompts, work.limits, strict=True))
    cache = {name: size, "num_blocks": blocks + len(work.prompts), "max_batch_tokens": 4096}
    manager = model.init_continuous_batching(
        generation_config=transformers.GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**cache),
    )
    manager.start()
    for prompt, limit in zip(work.prompts, work.limits, strict=True):
        manager.add_request(prompt, max_new_tokens=limit, eos_token_id=workload.NO_TOKEN)
    results = [manager.get_result(timeout=600) for _ in work.prompts]
    manager.stop(block=True)
    failed = [result.error for result in results if result is None or result.error]
    if failed:
        raise RuntimeError(f"transformers' continuous batching failed: {failed[0]}")


def show(work: Workload, timings: dict[str, Timing], figures: EngineFigures) -> None:
    title = f"{len(work.prompts)} prompts, {work.tokens} tokens"
    engine = (
        f"prefill {figures.prefill_tokens_per_s:.0f} tokens/s, {decode_text(figures)}, "
        f"KV cache {figures.kv_bytes / 1e6:.1f} MB, {figures.slots} slots, "
        f"graphs captured in {figures.capture_s:.1f} s"
    )
    workload.show_sides(title, work, timings, [engine])


def decode_text(figures: EngineFigures) -> str:
    """The decode figures in words; names what was not measured."""
    left_out = figures.capturing_rounds
    note = f" ({left_out} rounds that captured a graph left out)" if left_out else ""
    if figures.decode_steps == 0:
        return f"decode not measured{note}"
    outside = "share outside the forward not measured with graphs"
    if figures.outside_forward is not None:
        outside = f"{figures.outside_forward:.1%} of it outside the forward"
    return (
        f"decode {figures.decode_tokens_per_s:.1f} tokens/s, "
        f"{figures.decode_step_ms:.1f} ms a step{note}, {outside}"
    )
