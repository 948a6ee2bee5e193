"""One op at one shape: every side checked first, then timed in turns, then its memory taken."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from gearshift.kernels.checks.case import (
    Case,
    Size,
    Tensors,
    complaint,
    errors_of,
    poisoned,
    verify,
)
from gearshift.launch.bench.ops.peers import Peer, missing, peers_of
from gearshift.launch.bench.ops.shapes import Floor
from gearshift.launch.bench.ops.timing import Timing, interleaved, peak_extra_bytes

# Peers may round logits and sums to bf16, or drop small gradients: their error is printed, and only
# beyond this do they count as computing something else. Ours is held to LIMITS in checks/case.py.
PEER_LIMIT = 0.3


@dataclasses.dataclass(kw_only=True)
class Row:
    """One side of one op at one shape. Without a `timing`, `problem` says why there is none."""

    shape: str
    case: str
    side: str
    ours: bool
    floor: Floor
    floor_ms: float
    error: float | None = None  # of the worst output
    problem: str | None = None
    timing: Timing | None = None
    peak_bytes: int | None = None

    @property
    def share(self) -> float | None:
        """Floor over median: 1 is as fast as this machine can move or compute."""
        return self.timing and self.floor_ms / self.timing.median

    def as_json(self) -> dict[str, Any]:
        row = dataclasses.asdict(self) | {"floor": self.floor._asdict(), "timing_ms": None}
        timing = row.pop("timing")
        if timing is not None:
            seconds = self.timing.median / 1e3
            row["timing_ms"] = self.timing._asdict()
            row["gb_per_s"] = self.floor.bytes / seconds / 1e9
            row["tflop_per_s"] = self.floor.flops / seconds / 1e12
            row["share_of_floor"] = self.share
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ops of a run share. backends: of ours; peers: names, none if empty."""

    shape: str
    size: Size
    dtype: torch.dtype
    generator: torch.Generator
    backends: tuple[str, ...]
    peers: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return self.generator.device


def measure(case: Case, setting: Setting, floor: Floor, floor_ms: float) -> list[Row]:
    """Rows of our backends, then of the peers; only a side whose outputs are right has a time."""

    def row(side: str, ours: bool, problem: str | None) -> Row:
        return Row(
            shape=setting.shape,
            case=case.name,
            side=side,
            ours=ours,
            floor=floor,
            floor_ms=floor_ms,
            problem=problem,
        )

    rows, runs = [], {}
    for backend in setting.backends:
        name = f"gearshift {backend}"
        rows.append(row(name, True, _ragged_problem(case, setting, backend)))
        runs[name] = lambda inputs, backend=backend: case.run(inputs, setting.size, backend)
    for name, peer in peers_of(case.name).items():
        if name in setting.peers:
            rows.append(row(name, False, missing(name)))
            runs[name] = lambda inputs, peer=peer: _quiet(peer, inputs, setting.size)
    inputs = case.draw(setting.size, setting.dtype, setting.generator)
    _check(case, inputs, {r.side: r for r in rows}, runs)
    _time({r.side: r for r in rows if not r.problem}, runs, inputs, setting.device)
    return rows


def _quiet(peer: Peer, inputs: Tensors, size: Size) -> Tensors:
    return {name: tensor.detach() for name, tensor in peer(inputs, size).items()}


def _ragged_problem(case: Case, setting: Setting, backend: str) -> str | None:
    """What is wrong on inputs with masked rows, clipped ratios and unequal weights."""
    size = dataclasses.replace(setting.size, plain=False)
    found: list[str | None] = []
    failure = attempt(
        lambda: found.append(verify(case, size, setting.dtype, setting.generator, backend)[1])
    )
    return failure or (found[0] and f"check failed: {found[0]}")


def _check(case: Case, inputs: Tensors, rows: dict[str, Row], runs: dict[str, Callable]) -> None:
    """Sets the error of each row on `inputs`, and the problem of those that are too far off."""
    truth: Tensors = {}

    def check(row: Row) -> None:
        # A compiler would trace the poison of a peer into its code.
        with poisoned() if row.ours else contextlib.nullcontext():
            outputs = runs[row.side](inputs)
        if not outputs.keys() <= truth.keys() or "drawn" in outputs:
            truth.update(case.truth(inputs, outputs))
        errors = errors_of(outputs, truth)
        row.error = max(errors.values())
        wrong = complaint(outputs, errors, None if row.ours else PEER_LIMIT)
        row.problem = wrong and f"check failed: {wrong}"

    for row in rows.values():
        if not row.problem:
            failure = attempt(lambda row=row: check(row))
            row.problem = failure or row.problem


def _time(
    rows: dict[str, Row], runs: dict[str, Callable], inputs: Tensors, device: torch.device
) -> None:
    bound = {side: lambda side=side: runs[side](inputs) for side in rows}
    timings = interleaved(bound, device)
    for side, row in rows.items():
        row.timing = timings[side]
        row.peak_bytes = peak_extra_bytes(bound[side], device)


def attempt(action: Callable[[], object]) -> str | None:
    """Why `action` failed in one line: kernels and libraries that do not run here are a result."""
    try:
        action()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        lines = str(error).strip().splitlines()
        return f"failed: {type(error).__name__}: {lines[0][:160] if lines else ''}"
    return None
