"""Where the time of one PPO step goes.

Runs the first steps of a job in a folder of its own, profiles the last of them, and shows its
phases with what cost most on the device and on the host. Further arguments go to the job, as
--ppo.micro_batch_tokens 4096. A job on several hosts takes --run.profile.steps [3] under its own
launcher instead: any run can be profiled so.
"""

import argparse
import json
import time
from pathlib import Path

from gearshift.engine.config import load as config_load
from gearshift.engine.config.errors import ConfigError
from gearshift.launch import profiler
from gearshift.launch.bench.table import plain_lines, show
from gearshift.launch.commands.demo import LAUNCH, launcher, see_through


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(overrides=[])  # what is not named below, as --section.key value
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: one per GPU, or one")
    parser.add_argument("--step", type=int, default=3, help="PPO step to profile; earlier warm up")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: a new one")


def main(args: argparse.Namespace) -> int:
    """Returns the exit status of the job."""
    for option, value, least in (("--step", args.step, 1), ("--ranks", args.ranks, 0)):
        if value < least:
            raise ConfigError(option, f"must be at least {least}", value=value)
    config = config_load.load(args.config, args.overrides).config
    out = args.out or Path(f"{config.run.dir}-profile-{time.strftime('%Y%m%d-%H%M%S')}")
    settings = {
        "run.dir": out,
        "run.steps": args.step,
        "run.profile.steps": f"[{args.step}]",
        "run.resume": "none",
        "run.save_every": 0,
        "run.save_last": "false",
        "run.export": "false",
        "run.trackers": "[]",
        "ppo.critic_warmup_steps": 0,  # the step is to have every phase
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    job = [str(LAUNCH / "train.py"), "--config", args.config, *args.overrides, *words]
    status = see_through([*launcher(args.ranks), *job], out)
    if status == 0:
        report(out, args.step)
    return status


def report(folder: Path, step: int) -> None:
    """The table of a profiled step, its largest costs, and where the traces are."""
    file = profiler.place(folder, step).with_name(profiler.TABLE)
    table = json.loads(file.read_text())
    columns, rows = profiler.rows(table)
    show(f"step {step}, rank 0", columns, rows, [], left=1)
    for phase, kind in profiler.costly(table):
        rows = profiler.cost_rows(table, phase, kind)
        lines = plain_lines([f"{phase}, {kind}", *profiler.COST_COLUMNS[1:]], rows, left=1)
        print("\n".join([*lines, ""]))
    print(f"traces: {file.parent}/rank*.json.gz (chrome://tracing, ui.perfetto.dev)")
