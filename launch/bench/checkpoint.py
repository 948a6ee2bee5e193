"""What a checkpoint of a recipe costs: seconds, bytes, and how long the run stands still for it.

    gearshift bench checkpoint --config FILE [--saves N] [--json FILE] [--section.key value ...]
    deepspeed launch/bench/checkpoint.py --config FILE ...    (several ranks; also torchrun, srun)

Steps are taken in turns: one without a checkpoint, one that waits for its checkpoint, one whose
checkpoint a thread writes while the next step runs. They lie in `run.dir`, deleted at the end.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gearshift.launch.bench import job
from gearshift.launch.bench.record import write_json
from gearshift.launch.bench.table import show

if TYPE_CHECKING:
    from gearshift.launch.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job.add_arguments(parser, required=True)
    parser.add_argument("--saves", type=int, default=3, help="checkpoints of each kind (default 3)")


def main(args: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON; raises ValueError for the user's mistakes."""
    job.check_counts(args, "saves")
    result = measure(args.config, args.overrides, args.saves)
    if int(os.environ["RANK"]) == 0:
        print_table(result)
        write_json(args.json, result)
    return 0


def measure(recipe: str, overrides: list[str], saves: int) -> dict[str, Any]:
    """Takes `saves` checkpoints of each kind. A collective over the ranks.

    Raises ValueError where `run.dir` exists, or a checkpoint could not be written there.
    """
    from gearshift.engine.checkpoint import store
    from gearshift.engine.cluster import distributed
    from gearshift.engine.config import load as config_load

    folder = Path(config_load.load(recipe, overrides).config.run.dir)
    if folder.exists():
        raise ValueError(
            f"run.dir={str(folder)!r}: exists; name a new folder on the disk to measure"
        )
    session = job.open_job(recipe, overrides)
    step(session)  # warms up, and makes the optimizers' states
    try:
        turns = [turn(session, folder) for _ in range(saves)]
        size = sum(path.stat().st_size for path in store.steps(folder)[-1].iterdir())
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
    middle = {name: median(found[name] for found in turns) for name in turns[0]}
    trained = parameters(session)
    sizes = {"bytes": size, "parameters": trained, "bytes_per_parameter": size / trained}
    return job.describe(recipe, overrides) | sizes | middle | {"saves": saves}


def turn(session: "Session", folder: Path) -> dict[str, float]:
    """Seconds of a step, of a checkpoint that is waited for, and of one beside a step."""
    from gearshift.engine.checkpoint.save import Checkpoints

    def fail(text: str) -> None:
        raise ValueError(text)

    def saved(background: bool) -> Checkpoints:
        made = Checkpoints(folder, keep=1, background=background, tell=fail)
        made.take(session.trainer, session.streams)
        made.publish()
        return made

    plain, start = step(session), time.perf_counter()
    saved(False).settle()
    written = time.perf_counter() - start
    step(session)  # a checkpoint is of a step
    start = time.perf_counter()
    beside = saved(True)
    copied = time.perf_counter() - start
    during, start = step(session), time.perf_counter()
    beside.settle()
    left = time.perf_counter() - start
    return {
        "step_s": plain,
        "write_s": written,
        "copy_s": copied,
        "step_beside_s": during,
        "wait_after_step_s": left,
    }


def step(session: "Session") -> float:
    """Seconds of one PPO step."""
    from gearshift.engine.cluster import distributed

    prompts = job.next_prompts(session)
    distributed.barrier()
    start = time.perf_counter()
    session.trainer.step(prompts)
    distributed.barrier()
    return time.perf_counter() - start


def parameters(session: "Session") -> int:
    """Trained parameters of all roles, over all ranks."""
    from math import prod

    from gearshift.engine.checkpoint import state as run_state
    from gearshift.engine.zero import state as zero_state

    roles = run_state.trained(session.trainer).values()
    return sum(prod(shape) for role in roles for shape in zero_state.shapes(role.engine).values())


def print_table(result: dict[str, Any]) -> None:
    """A row per figure."""
    rate = result["bytes"] / result["write_s"] / 1e6
    beside = result["step_beside_s"] - result["step_s"]
    rows = {
        "bytes per trained parameter": f"{result['bytes_per_parameter']:.2f}",
        "checkpoint, MB": f"{result['bytes'] / 1e6:.1f}",
        "written while the run waits, s": f"{result['write_s']:.3f}",
        "that is, MB/s": f"{rate:.0f}",
        "copied for a thread to write, s": f"{result['copy_s']:.3f}",
        "a step, s": f"{result['step_s']:.3f}",
        "a step beside the thread, s": f"{result['step_beside_s']:.3f} ({beside:+.3f})",
        "still to wait after that step, s": f"{result['wait_after_step_s']:.3f}",
        "ranks; median of": f"{result['environment']['ranks']}; {result['saves']}",
    }
    title = f"Checkpoints of {Path(result['recipe']).name}"
    show(title, ["what", "figure"], list(map(list, rows.items())), [], left=1)


if __name__ == "__main__":
    from gearshift.launch.cli import main as command

    sys.exit(command(["bench", "checkpoint", *sys.argv[1:]]))
