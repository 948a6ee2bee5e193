"""The kernels against the floor of this machine, and against what others would call instead.

Every side is checked in this run, on fresh random inputs against float64, before it is timed; what
fails its check has no speed. The floor is the larger of the fewest bytes at the rate of a copy and
the fewest operations at the rate of a matrix product, both measured here. Sides take turns
(A B C C B A); the figures are the median and the 20th and 80th percentile.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from gearshift.kernels import dispatch
from gearshift.kernels.checks.self_check import CASES
from gearshift.launch.bench.ops import timing as bench_timing
from gearshift.launch.bench.ops.case import Row, Setting, measure
from gearshift.launch.bench.ops.peers import PEER_NAMES
from gearshift.launch.bench.ops.shapes import FLOORS, SHAPES, parse_shape
from gearshift.launch.bench.ops.timing import DRIFT, Ceiling
from gearshift.launch.bench.record import machine, write_json
from gearshift.launch.bench.table import show

COLUMNS = [
    "op", "side", "ms", "20-80 %", "achieved", "of floor", "to ours", "extra MB", "error",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    ops = list(dict.fromkeys(case.op for case in CASES if case.name in FLOORS))
    add("--op", nargs="+", metavar="NAME", choices=ops, default=ops, help=", ".join(ops))
    shapes = ", ".join(SHAPES)
    add("--shape", nargs="+", help=f"{shapes} or NxHxV; default: llama3-8b, tiny without a GPU")
    peers = ", ".join(PEER_NAMES)
    add("--peers", nargs="*", default=None, metavar="NAME", help=f"compare with {peers}; all")
    backends = [name for name in dispatch.BACKENDS if name != "auto"]
    add("--backend", nargs="+", choices=backends, default=None, help="of ours; default: as used")
    add("--seed", type=int, default=None, help="of the inputs; default: a fresh one, printed")
    add("--json", type=Path, metavar="FILE", help="write all figures there, op by op")


def main(args: argparse.Namespace) -> int:
    """Prints a table per shape; 1 if an op of ours failed its check.

    Raises ValueError for an unknown shape, peer or a backend that cannot be timed here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = _settings(args, device)
    seed = settings[0].generator.initial_seed()
    report: dict[str, Any] = {"seed": seed, "machine": machine(device)}
    if device.type == "cpu":
        print("no GPU: CPU time of the PyTorch backend; this says nothing of the Triton kernels")
    ceiling = bench_timing.calibrate(device, settings[0].dtype)
    report["ceiling"] = ceiling._asdict()
    rows: list[Row] = []
    for setting in settings:
        rows += _shape(setting, args, ceiling, report, rows)
    later = bench_timing.calibrate(device, settings[0].dtype)
    report |= {"ceiling_after": later._asdict(), "machine_after": machine(device)}
    _write(args, report, rows)
    if ceiling.drift(later) > DRIFT:
        print(f"the ceilings moved by {ceiling.drift(later):.0%} during the run: measure again")
    return int(any(row.ours and row.problem for row in rows))


def _settings(args: argparse.Namespace, device: torch.device) -> list[Setting]:
    cuda = device.type == "cuda"
    peers = tuple(PEER_NAMES if args.peers == [] else args.peers or ())
    unknown = [name for name in peers if name not in PEER_NAMES]
    if unknown:
        raise ValueError(f"--peers {unknown[0]}: choose from {', '.join(PEER_NAMES)}")
    backends = tuple(args.backend or (dispatch.resolve("auto", device),))
    if "triton" in backends and not cuda:
        raise ValueError("--backend triton: without a GPU there is no time to take; use torch")
    seed = int.from_bytes(os.urandom(4)) if args.seed is None else args.seed
    return [
        Setting(
            shape=shape,
            size=parse_shape(shape, device),
            dtype=torch.bfloat16 if cuda else torch.float32,
            generator=torch.Generator(device).manual_seed(seed),
            backends=backends,
            peers=peers,
        )
        for shape in args.shape or (["llama3-8b"] if cuda else ["tiny"])
    ]


def _shape(
    setting: Setting,
    args: argparse.Namespace,
    ceiling: Ceiling,
    report: dict[str, Any],
    before: list[Row],
) -> list[Row]:
    """Measures and prints the ops of one shape; the file is complete after each of them."""
    rows: list[Row] = []
    for case in CASES:
        if case.name not in FLOORS or case.op not in args.op:
            continue
        floor = FLOORS[case.name](setting.size, setting.dtype.itemsize)
        rows += measure(case, setting, floor, 1e3 * floor.seconds(*ceiling))
        _write(args, report, before + rows)
    size = setting.size
    show(
        f"{setting.shape}: {size.rows} tokens, hidden {size.hidden}, vocabulary {size.vocab}, "
        f"{setting.dtype}".replace("torch.", ""),
        COLUMNS,
        [_cells(row, rows, ceiling) for row in rows],
        [
            f"{report['machine']['device']}: copy {ceiling.bytes_per_s / 1e9:.0f} GB/s, "
            f"matrix product {ceiling.flops_per_s / 1e12:.3g} TFLOP/s; seed {report['seed']}; "
            f"~: the two visits differ by more than {DRIFT:.0%}",
            *(f"{row.case}, {row.side}: {row.problem}" for row in rows if row.problem),
        ],
    )
    return rows


def _cells(row: Row, rows: list[Row], ceiling: Ceiling) -> list[str]:
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.timing is None:
        shown = "not installed" if row.problem == "not installed" else "see below"
        return [row.case, row.side, shown, "", "", "", "", "", error]
    timing, floor = row.timing, row.floor
    computing = floor.flops / ceiling.flops_per_s > floor.bytes / ceiling.bytes_per_s
    rate = floor.flops / 1e9 if computing else floor.bytes / 1e6
    achieved = f"{rate / timing.median:.3g} {'TFLOP/s' if computing else 'GB/s'}"
    extra = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    return [
        row.case,
        row.side,
        f"{timing.median:.3g}" + ("~" if timing.drift > DRIFT else ""),
        f"{timing.low:.3g}-{timing.high:.3g}",
        achieved,
        f"{row.share:.0%}",
        _ratio(row, rows),
        extra,
        error,
    ]


def _ratio(row: Row, rows: list[Row]) -> str:
    """How many times our time a side takes; under 3 % is a tie."""
    ours = next((r for r in rows if r.ours and r.case == row.case and r.timing), None)
    if ours is None or ours is row:
        return ""
    ratio = row.timing.median / ours.timing.median
    return "tie" if abs(ratio - 1) < DRIFT else f"{ratio:.2f}x"


def _write(args: argparse.Namespace, report: dict[str, Any], rows: list[Row]) -> None:
    write_json(args.json, report | {"rows": [row.as_json() for row in rows]})
