"""Generation speed: the rollout engine beside transformers' own ways to generate.

All sides answer the same prompts with the same response lengths, in turns, so that a busy machine
hits them alike; the least of `--repeats` counts. End tokens are off: lengths are prescribed.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gearshift.engine.cluster import distributed
from gearshift.engine.config import assets
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.engine import RolloutEngine

PEERS = ("hf", "batch", "zero3", "deepspeed")
NO_TOKEN = -1  # as an end token: never sampled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="directory, .gguf file or asset:NAME; default: a random 135M Llama")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    add("--batch", type=int, default=32, help="prompts")
    add("--prompt", type=int, default=128, help="longest prompt; the shortest is an eighth of it")
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
class Workload:
    """What every side is asked for."""

    prompts: list[list[int]]
    limits: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.limits)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a run, or the least of several; cpu_s is of the whole process, all threads."""

    wall_s: float
    cpu_s: float

    def least(self, other: "Timing") -> "Timing":
        """The smaller of each: what others on the machine added to least."""
        return Timing(wall_s=min(self.wall_s, other.wall_s), cpu_s=min(self.cpu_s, other.cpu_s))


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """What only the engine can be asked. Seconds are wall time of the fastest run."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # None: no step was timed
    decode_step_ms: float | None
    decode_steps: int  # timed, out of those without prompt tokens
    capturing_steps: int  # left out of the decode figures: each captured a graph
    outside_forward: float | None  # share of a decode step; None: graphs, whose replays call none
    graphs: bool
    kv_bytes: int
    slots: int  # sequences decoded at once, at most
    capture_s: float  # of CUDA graphs, once


def main(args: argparse.Namespace) -> int:
    if args.ranks > 1:
        from gearshift.launch.bench import zero3 as bench_zero3

        return bench_zero3.start_ranks(args)
    partitioned = sorted({"zero3", "deepspeed"} & set(args.peers))
    if partitioned:
        raise ValueError(f"--peers {' '.join(partitioned)}: needs --ranks of at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    distributed.forbid_cudnn_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(args.model, getattr(torch, args.dtype)).to(device).eval()
    work = make_workload(args, model.config.get_text_config().vocab_size)
    config = RolloutConfig(max_sequences=args.slots)
    engine = RolloutEngine(model, config, eos_token_ids=[NO_TOKEN], pad_token_id=0, device=device)
    sides = {"gearshift": lambda: engine_run(engine, work)}
    if "hf" in args.peers:
        sides["transformers generate"] = lambda: generate_run(model, work)
    if "batch" in args.peers:
        sides["transformers continuous"] = lambda: continuous_run(model, work)
    timings = measure(sides, args.repeats)
    figures = measure_engine(engine, work)
    show(work, timings, figures)
    if args.json:
        report = {
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "tokens": work.tokens,
            "threads": torch.get_num_threads(),
            "sides": {name: asdict(timing) for name, timing in timings.items()},
            "engine": asdict(figures),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def load(path: str | None, dtype: torch.dtype) -> nn.Module:
    """The model at `path`; without one, a random Llama of SmolLM2-135M's shape."""
    if path is None:
        shape = transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
    place = Path(assets.resolve(path))
    options = {"gguf_file": place.name} if place.suffix == ".gguf" else {}
    folder = place.parent if options else place
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def make_workload(args: argparse.Namespace, vocabulary: int) -> Workload:
    """Random prompts of --prompt/8 to --prompt tokens; the first response is always a longest."""
    chooser = random.Random(0)
    lengths = [chooser.randint(max(1, args.prompt // 8), args.prompt) for _ in range(args.batch)]
    limits = [args.new] * args.batch
    if args.ragged:
        drawn = (4 + int(chooser.expovariate(4 / args.new)) for _ in limits[1:])
        limits = [args.new, *(min(args.new, n) for n in drawn)]
    prompts = [[chooser.randrange(vocabulary) for _ in range(n)] for n in lengths]
    return Workload(prompts=prompts, limits=limits)


def measure(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, Timing]:
    """The least wall and the least CPU time of `repeats` runs of each side, in turns."""
    best: dict[str, Timing] = {}
    for _ in range(repeats):
        for name, run in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            timing = Timing(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)
            best[name] = timing.least(best.get(name, timing))
    return best


def engine_run(engine: RolloutEngine, work: Workload) -> None:
    sampling = SamplingConfig(max_new_tokens=max(work.limits))
    engine.generate(work.prompts, sampling, list(range(len(work.prompts))), limits=work.limits)


def measure_engine(engine: RolloutEngine, work: Workload) -> EngineFigures:
    """Splits a run into prefill (a run of one token each) and the steps that only decode."""
    first = Workload(prompts=work.prompts, limits=[1] * len(work.limits))
    prefill = measure({"": lambda: engine_run(engine, first)}, 2)[""].wall_s
    decoding = [step for step in timed_steps(engine, work) if not step.prefill]
    steps = [step for step in decoding if not step.captured]
    seconds = sum(step.seconds for step in steps)
    forward = None if engine._use_graphs else sum(step.forward_s for step in steps)
    return EngineFigures(
        prefill_tokens_per_s=sum(map(len, work.prompts)) / prefill,
        decode_tokens_per_s=sum(step.tokens for step in steps) / seconds if steps else None,
        decode_step_ms=1e3 * seconds / len(steps) if steps else None,
        decode_steps=len(steps),
        capturing_steps=len(decoding) - len(steps),
        outside_forward=1 - forward / seconds if steps and forward is not None else None,
        graphs=engine._use_graphs,
        kv_bytes=engine.kv_bytes,
        slots=engine.config.max_sequences,
        capture_s=engine.capture_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the engine, from planning its batch to the tokens on the host."""

    seconds: float
    forward_s: float  # inside the model's forward; 0 with graphs
    tokens: int  # drawn
    prefill: bool  # computed prompt tokens, too
    captured: bool


def timed_steps(engine: RolloutEngine, work: Workload) -> list[Step]:
    """A run, step by step. With graphs the forward has no hooks: they would wait in a capture."""
    steps: list[Step] = []
    batches: list[tuple[int, bool]] = []
    inside: list[float] = []
    step, draw = engine._step, engine._draw

    def drawn(batch, drawing, *rest):
        batches.append((len(drawing), bool(batch.prefill)))
        return draw(batch, drawing, *rest)

    def timed(*args):
        inside.clear()
        capturing, start = engine.capture_seconds, _now()
        ended = step(*args)
        seconds = _now() - start
        tokens, prefill = batches[-1]
        captured = engine.capture_seconds != capturing
        values = dict(tokens=tokens, prefill=prefill, captured=captured)
        steps.append(Step(seconds=seconds, forward_s=sum(inside), **values))
        return ended

    with ExitStack() as stack:
        if not engine._use_graphs:
            before = engine.module.register_forward_pre_hook(lambda *_: inside.append(-_now()))
            after = engine.module.register_forward_hook(lambda *_: inside.append(_now()))
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(mock.patch.object(engine, "_step", timed))
        stack.enter_context(mock.patch.object(engine, "_draw", drawn))
        engine_run(engine, work)
    return steps


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class RowLimits(transformers.StoppingCriteria):
    """Ends each row of a padded batch at its own length."""

    def __init__(self, limits: list[int], width: int):
        self.limits, self.width = torch.tensor(limits), width

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids.shape[1] - self.width >= self.limits).to(input_ids.device)


def padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask, both [B, P] int64."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= width - lengths[:, None]).long()


def generate_run(model: nn.Module, work: Workload, *, synced: bool = False) -> None:
    """One left-padded batch through `generate`, until its longest response ends.

    synced: until that of all ranks, which ZeRO-3 needs: its gathers are collectives.
    """
    ids, mask = padded(work.prompts, model.device)
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(work.limits),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[RowLimits(work.limits, ids.shape[1])],
        synced_gpus=synced,
    )


def continuous_run(model: nn.Module, work: Workload) -> None:
    """The same requests through transformers' continuous batching, with a cache of their size."""
    name = "page_size" if "page_size" in _batching_options() else "block_size"
    size = 32
    blocks = sum(-(-(len(p) + n) // size) for p, n in zip(work.prompts, work.limits, strict=True))
    options = {name: size, "num_blocks": blocks + len(work.prompts), "max_batch_tokens": 4096}
    manager = model.init_continuous_batching(
        generation_config=transformers.GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**options),
    )
    manager.start()
    for prompt, limit in zip(work.prompts, work.limits, strict=True):
        manager.add_request(prompt, max_new_tokens=limit, eos_token_id=NO_TOKEN)
    results = [manager.get_result(timeout=600) for _ in work.prompts]
    manager.stop(block=True)
    failed = [result.error for result in results if result is None or result.error]
    if failed:
        raise RuntimeError(f"transformers' continuous batching failed: {failed[0]}")


def _batching_options() -> set[str]:
    return set(signature(transformers.ContinuousBatchingConfig).parameters)


def show(work: Workload, timings: dict[str, Timing], figures: EngineFigures) -> None:
    table = Table("side", "tokens/s", "wall s", "CPU s", "gearshift is faster by (wall, CPU)")
    ours = timings["gearshift"]
    for name, timing in timings.items():
        factors = f"{timing.wall_s / ours.wall_s:.2f}x, {timing.cpu_s / ours.cpu_s:.2f}x"
        table.add_row(
            name,
            f"{work.tokens / timing.wall_s:.1f}",
            f"{timing.wall_s:.2f}",
            f"{timing.cpu_s:.2f}",
            factors if timing is not ours else "",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{len(work.prompts)} prompts, {work.tokens} tokens; prefill "
        f"{figures.prefill_tokens_per_s:.0f} tokens/s, {decode_text(figures)}, "
        f"KV cache {figures.kv_bytes / 1e6:.1f} MB, {figures.slots} slots, "
        f"graphs captured in {figures.capture_s:.1f} s"
    )


def decode_text(figures: EngineFigures) -> str:
    """The decode figures in words; what was not measured is said to be so."""
    left_out = figures.capturing_steps
    note = f" ({left_out} steps that captured a graph left out)" if left_out else ""
    if figures.decode_steps == 0:
        return f"decode not measured{note}"
    outside = "share outside the forward not measured with graphs"
    if figures.outside_forward is not None:
        outside = f"{figures.outside_forward:.1%} of it outside the forward"
    return (
        f"decode {figures.decode_tokens_per_s:.1f} tokens/s, "
        f"{figures.decode_step_ms:.1f} ms a step{note}, {outside}"
    )
