"""What every side of a generation bench is asked for, and the sides that several benches time."""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from gearshift.engine.config import assets
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.data.streams import left_padded
from gearshift.engine.models.shapes import PREFIX, published
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.sampling import Completion
from gearshift.launch.bench.record import machine
from gearshift.launch.bench.table import show

NO_TOKEN = -1  # as an end token: never sampled


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every side is asked for."""

    prompts: list[list[int]]
    limits: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.limits)

    def share(self, index: int, count: int) -> "Workload":
        """One of `count` parts."""
        return Workload(prompts=self.prompts[index::count], limits=self.limits[index::count])


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a run, or the least of several; cpu_s is of the whole process, all threads."""

    wall_s: float
    cpu_s: float

    def least(self, other: "Timing") -> "Timing":
        """The smaller of each: what others on the machine added to least."""
        return Timing(wall_s=min(self.wall_s, other.wall_s), cpu_s=min(self.cpu_s, other.cpu_s))


def load(
    path: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layers: int = 0,
    vocabulary: int = 0,
) -> nn.Module:
    """The model at `path` on the device; of random weights, made there, where it is a shape's.

    layers, vocabulary: of a shape; 0: its own.
    """
    if path.startswith(PREFIX):
        name = path.removeprefix(PREFIX)
        with torch.device(device):
            config = published(name, layers=layers, vocabulary=vocabulary)
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    place = Path(assets.resolve(path))
    options = {"gguf_file": place.name} if place.suffix == ".gguf" else {}
    folder = place.parent if options else place
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(
        device
    )


def make_workload(args: argparse.Namespace, vocabulary: int) -> Workload:
    """Random prompts of --shortest to --prompt tokens; the first response is always a longest."""
    chooser = random.Random(0)
    shortest = args.shortest or max(1, args.prompt // 8)
    lengths = [chooser.randint(shortest, args.prompt) for _ in range(args.batch)]
    limits = [args.new] * args.batch
    if args.ragged:
        drawn = (4 + int(chooser.expovariate(4 / args.new)) for _ in limits[1:])
        limits = [args.new, *(min(args.new, n) for n in drawn)]
    prompts = [[chooser.randrange(vocabulary) for _ in range(n)] for n in lengths]
    return Workload(prompts=prompts, limits=limits)


def timed(run: Callable[[], None]) -> Timing:
    """Of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)


def measure(
    sides: dict[str, Callable[[], None]],
    repeats: int,
    clock: Callable[[Callable[[], None]], Timing] = timed,
) -> dict[str, Timing]:
    """The least wall and the least CPU time of `repeats` runs of each side, in turns."""
    best: dict[str, Timing] = {}
    for _ in range(repeats):
        for name, run in sides.items():
            timing = clock(run)
            best[name] = timing.least(best.get(name, timing))
    return best


def make_engine(
    model: nn.Module, config: RolloutConfig, device: torch.device, group: Any = None
) -> RolloutEngine:
    """A rollout engine that ends no response before its limit. group: of tensor parallelism."""
    ends = {"eos_token_ids": [NO_TOKEN], "pad_token_id": 0}
    return RolloutEngine(model, config, **ends, group=group, device=device)


def engine_run(engine: RolloutEngine, work: Workload) -> list[Completion]:
    sampling = SamplingConfig(max_new_tokens=max(work.limits))
    return engine.generate(
        work.prompts, sampling, list(range(len(work.prompts))), limits=work.limits
    )


class RowLimits(transformers.StoppingCriteria):
    """Ends each row of a padded batch at its own length."""

    def __init__(self, limits: list[int], width: int):
        self.limits, self.width = torch.tensor(limits), width

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids.shape[1] - self.width >= self.limits).to(input_ids.device)


def generate_run(model: nn.Module, work: Workload, *, synced: bool = False) -> None:
    """One left-padded batch through `generate`, until its longest response ends.

    synced: until that of all ranks, which ZeRO-3 needs: its gathers are collectives.
    """
    ids, mask = left_padded(work.prompts, 0)
    model.generate(
        ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        max_new_tokens=max(work.limits),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[RowLimits(work.limits, ids.shape[1])],
        synced_gpus=synced,
    )


def show_sides(title: str, work: Workload, timings: dict[str, Timing], notes: list[str]) -> None:
    """A row per side; ours, "gearshift", is what the others are compared with."""
    ours = timings["gearshift"]
    rows = [
        [
            name,
            f"{work.tokens / timing.wall_s:.1f}",
            f"{timing.wall_s:.2f}",
            f"{timing.cpu_s:.2f}",
            ""
            if timing is ours
            else f"{timing.wall_s / ours.wall_s:.2f}x, {timing.cpu_s / ours.cpu_s:.2f}x",
        ]
        for name, timing in timings.items()
    ]
    columns = ["side", "tokens/s", "wall s", "CPU s", "gearshift is faster by (wall, CPU)"]
    show(title, columns, rows, notes, left=1)


def figures_of(
    args: argparse.Namespace, work: Workload, timings: dict[str, Timing]
) -> dict[str, Any]:
    """What every generation bench writes down."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "machine": machine(device),
        "arguments": vars(args),
        "tokens": work.tokens,
        "sides": {name: asdict(timing) for name, timing in timings.items()},
    }
