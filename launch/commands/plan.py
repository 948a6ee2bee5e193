"""Plan a run before it starts: memory by phase and role, seconds by phase, and whether it fits.

Needs no GPU and no weights: a model's config.json is read, or a published architecture is named, as
--actor.path shape:qwen2.5-7b. Any key can be overridden: --ppo.micro_batch_tokens 4096.
Exit status: 0 it fits, 3 it does not, 2 a mistake. Seconds are estimates until measured.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from gearshift.engine.config import load as config_load
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.models.cast import cast, check_bases
from gearshift.engine.plan.advice import advise
from gearshift.engine.plan.hardware import GB, GPUS, Hardware, hardware
from gearshift.engine.plan.planner import plan
from gearshift.engine.plan.record import PhasePlan, Plan, Role
from gearshift.launch import pretraining
from gearshift.launch.console import stdout_for_the_answer

DOES_NOT_FIT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(overrides=[])  # what is not named below, as --section.key value
    parser.add_argument("--config", metavar="FILE", help="the run's YAML")
    names = ", ".join(GPUS)
    parser.add_argument("--gpu", default="h200", help=f"one of {names} (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs per node (1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes (1)")
    parser.add_argument(
        "--host-gb", type=float, default=128, metavar="G", help="memory of a node (128)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    place = hardware(args.gpu, args.gpus, args.nodes, args.host_gb)
    if args.config is None and not args.overrides:
        raise ConfigError("--config", "missing", "give a run's YAML")
    with stdout_for_the_answer(args.json):
        made, advice = planned(args.config, args.overrides, place)
    if args.json:
        print(json.dumps(as_json(made, advice), indent=2))
    else:
        show(made, advice)
    return 0 if made.fits else DOES_NOT_FIT


def planned(path: str | None, overrides: list[str], place: Hardware) -> tuple[Plan, str | None]:
    """The plan of a configuration, and what to change first where it does not fit."""
    resolved = config_load.load(path, overrides)
    alone = resolved.config.run.task == "critic"
    config = (pretraining.settle(resolved) if alone else resolved).config
    parts = cast(config)
    check_bases(parts)
    made = plan(config, parts, place)
    return made, None if made.fits else advise(config, parts, place)


def as_json(made: Plan, advice: str | None) -> dict[str, Any]:
    """Everything of a plan, in bytes and seconds."""
    return {
        "verdict": "FITS" if made.fits else "DOES NOT FIT",
        "reason": made.refuse_reason,
        "change": advice,
        "assumed": made.assumed,
        "hardware": asdict(made.hardware),
        "usable_gpu_bytes": made.hardware.usable,
        "usable_host_bytes": made.hardware.usable_host,
        "tp": made.tp,
        "largest_micro_batch_tokens": made.most_tokens,
        "kv_slots": made.kv_slots,
        "kv_slots_wanted": made.kv_wanted,
        "sleep": made.sleeps,
        "recompute": {
            name: getattr(made.config, name).gradient_checkpointing for name in made.sleeps
        },
        "step_seconds_estimate": made.step_seconds,
        "swap_seconds_estimate": made.swap_seconds,
        "roles": [_role_json(role) for role in made.roles],
        "phases": [
            asdict(phase) | {"gpu_total": phase.total, "seconds_estimate": phase.seconds}
            for phase in made.phases
        ],
    }


def _role_json(role: Role) -> dict[str, Any]:
    states = {"gpu": role.states.gpu, "host_per_rank": role.states.host}
    base = role.part.base.name if role.part.base else None
    return {"name": role.name, "parameters": role.shape.total, "base": base, **states}


def show(made: Plan, advice: str | None, console: Console | None = None) -> None:
    """Tables of roles and phases, and the verdict."""
    console = console or Console()
    console.print(_roles_table(made), _phases_table(made))
    for line in summary(made, advice):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def summary(made: Plan, advice: str | None) -> list[str]:
    """The limits, the expected time and the verdict, a line each."""
    place, few = made.hardware, made.kv_slots < made.kv_wanted
    cache = f"{made.kv_slots} of {made.kv_wanted} wanted" if few else f"{made.kv_slots}"
    lines = [
        f"{place.world} x {place.name}: {place.usable / GB:.1f} GB usable of a GPU, "
        f"{max(0, place.usable_host) / GB:.1f} GB of a host",
        f"largest ppo.micro_batch_tokens {made.most_tokens}; sequences in the KV cache {cache} per "
        f"group of {made.tp}",
        made.told,
        f"a PPO step: {made.step_seconds:.0f} s at full lengths, {made.swap_seconds:.1f} of them "
        "swapping (estimate until measured)",
    ]
    lines += [made.assumed] if made.assumed else []
    if made.fits:
        return [*lines, "FITS"]
    return [*lines, f"DOES NOT FIT: {made.refuse_reason}", f"change first: {advice}"]


def _roles_table(made: Plan) -> Table:
    table = Table(title="states of a rank, GB", title_justify="left")
    table.add_column("role")
    table.add_column("parameters", justify="right")
    table.add_column("on the GPU")
    table.add_column("on the host")
    for role in made.roles:
        total = f"{role.shape.total / 1e9:.2f}B"
        where = f" on the {role.part.base.name}'s base" if role.part.base else ""
        table.add_row(
            f"{role.name}{where}", total, _listed(role.states.gpu), _listed(role.states.host)
        )
    return table


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{what} {size / GB:.2f}" for what, size in parts.items() if size)


def _phases_table(made: Plan) -> Table:
    table = Table(title="phases", title_justify="left")
    table.add_column("phase")
    for column in ("GPU GB", "host GB", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("beyond the states, GB")
    for phase in made.phases:
        over = " !" if phase.total > made.hardware.usable else ""
        table.add_row(
            phase.name,
            f"{phase.total / GB:.1f}{over}",
            f"{phase.host / GB:.1f}",
            f"{phase.seconds:.1f}",
            _listed(transients(phase, made)),
        )
    return table


def transients(phase: PhasePlan, made: Plan) -> dict[str, float]:
    """What a phase has on the GPU besides the states of the roles."""
    names = tuple(f"{role.name} " for role in made.roles)
    return {what: size for what, size in phase.gpu.items() if not what.startswith(names)}
