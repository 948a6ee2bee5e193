"""One PPO step of a recipe: seconds, CPU time and peak memory of every phase.

    gearshift bench step --config FILE [--steps N] [--json FILE] [--section.key value ...]
    deepspeed launch/bench/step.py --config FILE ...    (several ranks; also torchrun, srun)

It runs what the main job runs, in a run folder that is then deleted: one step to warm up, then N
that count. `--vs-trl` instead measures a tiny model against TRL's PPO trainer (versus.py).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from gearshift.engine.config.errors import ConfigError
from gearshift.launch.bench import job
from gearshift.launch.bench.record import write_json
from gearshift.launch.bench.table import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job.add_arguments(parser, required=False)
    parser.add_argument("--steps", type=int, default=3, help="steps that count (default 3)")
    peer = parser.add_argument_group("against TRL")
    peer.add_argument("--vs-trl", action="store_true", help="measure a tiny model with both")
    peer.add_argument(
        "--vocab", type=int, nargs="+", default=[32_000, 150_000], help="vocabulary sizes"
    )
    peer.add_argument("--repeats", type=int, default=2, help="processes of each, in turns")
    peer.add_argument("--peer-batch", type=int, default=8, help="rows TRL generates at a time")
    peer.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")


def main(args: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON; raises ValueError for the user's mistakes."""
    job.check_counts(args, "steps", "repeats", "peer_batch")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError("--json", "its folder does not exist", "make it", args.json)
    if args.vs_trl:
        from gearshift.launch.bench import versus

        return versus.main(args)
    if args.config is None:
        raise ConfigError("--config", "missing", "give the recipe to measure, or --vs-trl")
    result = measure(args.config, args.overrides, args.steps)
    if int(os.environ["RANK"]) == 0:
        print_table(result)
        write_json(args.json, result)
    return 0


def measure(recipe: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Runs 1 + `steps` PPO steps; the figures of the later ones. A collective over the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        session = job.open_job(recipe, overrides, dir=folder)
        built_gb = resident_gb(session.device)
        with cpu_times():
            taken = range(1 + steps)
            figures = [session.trainer.step(job.next_prompts(session))[0] for _ in taken][1:]
    return job.describe(recipe, overrides) | summary(figures, built_gb)


def resident_gb(device: Any) -> float:
    """GB in use now, of the rank that uses most: models, and what DeepSpeed keeps of them."""
    import torch

    from gearshift.engine.cluster import distributed
    from gearshift.engine.metrics import peak_memory, reset_peak_memory

    reset_peak_memory(device)
    now = torch.tensor(peak_memory(device), dtype=torch.float64, device=device)
    return float(distributed.global_max(now))


@contextmanager
def cpu_times() -> Iterator[None]:
    """While this is open, every timed span of a step also reports cpu_s/<name>.

    That is process time, user and system, of all threads; the rank that used most counts.
    """
    import torch

    from gearshift.engine import ppo
    from gearshift.engine.metrics import StepMetrics

    class CpuMetrics(StepMetrics):
        @contextmanager
        def time(self, name: str) -> Iterator[None]:
            begin = time.process_time()
            with super().time(name):
                yield
            seconds = torch.tensor(time.process_time() - begin, device=self.device)
            self.add_max(f"cpu_s/{name}", seconds)

    with mock.patch.object(ppo, "StepMetrics", CpuMetrics):
        yield


def summary(steps: list[dict[str, float]], built_gb: float) -> dict[str, Any]:
    """Medians over the measured steps; growth_gb is the peak above what the models take."""
    middle = {name: median(step[name] for step in steps) for name in steps[0]}
    phases = {}
    for name in _phases(steps[0]):
        peak = middle[f"memory_gb/{name}"]
        phases[name] = {
            "seconds": middle[f"timing_s/{name}"],
            "cpu_seconds": middle[f"cpu_s/{name}"],
            "peak_gb": peak,
            "growth_gb": peak - built_gb,
        }
    peaks = [max(step[f"memory_gb/{name}"] for name in phases) for step in steps]
    whole = {
        "seconds": middle["timing_s/step"],
        "cpu_seconds": middle["cpu_s/step"],
        "cpu_seconds_of_each": [step["cpu_s/step"] for step in steps],
        "peak_gb": median(peaks),
        "growth_gb": median(peaks) - built_gb,
        "tokens": middle["tokens"],
        "generated_tokens": middle["generated_tokens"],
        "tokens_per_s": middle["throughput/tokens_per_s"],
        "generated_tokens_per_s": middle["throughput/generated_tokens_per_s"],
    }
    return {"steps": len(steps), "built_gb": built_gb, "step": whole, "phases": phases}


def _phases(figures: dict[str, float]) -> list[str]:
    """Names of the phases that ran, in the order of a step."""
    from gearshift.launch.console import PHASES

    ran = [name.removeprefix("memory_gb/") for name in figures if name.startswith("memory_gb/")]
    return sorted(ran, key=PHASES.index)


def print_table(result: dict[str, Any]) -> None:
    """A row per phase, then the step."""
    step = result["step"]
    each = step["cpu_seconds_of_each"]
    rows = [
        [name, *_cells(figures, step["seconds"])]
        for name, figures in [*result["phases"].items(), ("step", step)]
    ]
    notes = [
        f"ranks {result['environment']['ranks']}, median of {len(each)} steps after a warm-up, "
        f"CPU s of a step {min(each):.2f} to {max(each):.2f}",
        f"tokens/s {step['tokens_per_s']:,.0f} over the step, "
        f"{step['generated_tokens_per_s']:,.0f} generated in generate",
        f"growth is above the {result['built_gb']:.3f} GB in use when the models are built",
    ]
    columns = ["phase", "s", "CPU s", "share", "peak GB", "growth GB"]
    show(f"One PPO step of {Path(result['recipe']).name}", columns, rows, notes, left=1)


def _cells(figures: dict[str, float], whole: float) -> list[str]:
    return [
        f"{figures['seconds']:.2f}",
        f"{figures['cpu_seconds']:.2f}",
        f"{figures['seconds'] / whole:.0%}",
        f"{figures['peak_gb']:.3f}",
        f"{figures['growth_gb']:+.3f}",
    ]


if __name__ == "__main__":
    from gearshift.launch.cli import main as command

    sys.exit(command(["bench", "step", *sys.argv[1:]]))
