"""Where the time of one PPO step goes: a trace of each rank, and a table by phase of rank 0's.

The trace is torch.profiler's, in Chrome's format: chrome://tracing and ui.perfetto.dev show it. The
table is read from the file, so it says what the trace shows.
"""

import gzip
import json
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gearshift.engine import trace
from gearshift.engine.cluster import distributed
from gearshift.engine.plan.compare import needs
from gearshift.engine.plan.record import Plan

FOLDER = "profile"  # of a run folder
TABLE = "table.json"
COST_COLUMNS = ["", "s", "share", "calls"]
OUTSIDE = "outside of operators: Python, waiting"
_MOST_COSTS = 8  # of each kind, a phase
_NAME_LENGTH = 100  # of a kernel: C++ templates have no end
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
_US = 1e-6

Span = tuple[float, float]
Event = dict[str, Any]  # of the trace: name, cat, tid, ts and dur in microseconds


@contextmanager
def recording(file: Path | None, device: torch.device) -> Iterator[None]:
    """Profiles what is inside and writes this rank's trace; None: does nothing."""
    if file is None:
        yield
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of every start and stop
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profile, trace.marking(device):
        yield
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))


def place(folder: Path, step: int) -> Path:
    """Of this rank's trace of a step, in a run folder."""
    return folder / FOLDER / f"step_{step:06d}" / f"rank{distributed.rank()}.json.gz"


def tabulate(file: Path, figures: dict[str, float], plan: Plan | None) -> dict[str, Any]:
    """The table of a trace, which rank 0 also writes beside it: seconds, the mean over all ranks of
    the share in which the device worked, and by_phase with what each phase needs at least.

    figures: of the step. A collective; every rank passes its own file.
    """
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        events = [event for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]
    phases = by_phase(events)
    for name, need in (needs(plan, figures) if plan else {}).items():
        if plan and name in phases:
            floor = need.seconds(plan.hardware)
            phases[name] |= {"flops": need.flops, "bytes": need.bytes, "floor_s": floor}
    step = phases.pop("step")
    shares = distributed.all_gather_objects(step["busy"])
    table = {
        "step": int(figures["step"]),
        "gpu": on_gpu(events),
        "seconds": step["seconds"],
        "device_busy": sum(shares) / len(shares),
        "phases": phases,
    }
    if distributed.is_main():
        file.with_name(TABLE).write_text(json.dumps(table, indent=1) + "\n")
    return table


def on_gpu(events: Iterable[Event]) -> bool:
    """Whether the trace has work of a GPU; else the CPU is the device."""
    return any(event["cat"] in _ON_DEVICE for event in events)


def by_phase(events: list[Event]) -> dict[str, dict[str, Any]]:
    """Seconds, share of them in which the device worked, launches and the largest costs of each
    phase, and of "step", the whole. A phase that comes several times is one, all in all."""
    marks = [e for e in events if e["cat"] == "user_annotation" and _phase(e)]
    gpu = on_gpu(events)
    host = [e for e in events if e["cat"] in _ON_HOST]
    # On a CPU: PyTorch's own operators; autograd's, which hold them, also hold Python.
    work = (
        [e for e in events if e["cat"] in _ON_DEVICE]
        if gpu
        else [e for e in host if e["name"].startswith("aten::")]
    )
    kinds = {"work": work, "host": host, "costs": list(_self_times(host))}

    found = {}
    for name in dict.fromkeys(map(_phase, marks)):
        windows = sorted(_span(e) for e in marks if _phase(e) == name)
        inside = {kind: _inside(windows, group) for kind, group in kinds.items()}
        length = sum(end - begin for begin, end in windows)
        outside = {"name": OUTSIDE, "dur": max(0.0, length - _covered(inside["host"]))}
        found[name] = {
            "seconds": length * _US,
            "busy": _covered(inside["work"]) / length if length else 0.0,
            "launches": len(inside["work"]) if gpu else None,
            "device": _largest(inside["work"] if gpu else []),
            "host": _largest([*inside["costs"], outside]),
        }
    return found


def _inside(windows: list[Span], events: Iterable[Event]) -> list[Event]:
    """Those that begin in one of the windows, which are sorted."""
    begins = [begin for begin, _ in windows]

    def within(event: Event) -> bool:
        at = bisect_right(begins, event["ts"]) - 1
        return at >= 0 and event["ts"] < windows[at][1]

    return [event for event in events if within(event)]


def _largest(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Seconds and calls of the names that cost most."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        name = event["name"]
        entry = spent[name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 3]}..."]
        entry[0] += event["dur"] * _US
        entry[1] += 1
    order = sorted(spent.items(), key=lambda item: -item[1][0])[:_MOST_COSTS]
    return [{"name": name, "seconds": s, "calls": int(n)} for name, (s, n) in order if s > 0]


def _self_times(events: list[Event]) -> Iterator[Event]:
    """The events, each without what others of its thread took inside it."""
    threads = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    for own in threads.values():
        stack: list[list[Any]] = []  # [event, microseconds of its own]
        for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
                yield _alone(*stack.pop())
            if stack:
                stack[-1][1] -= event["dur"]
            stack.append([event, event["dur"]])
        for entry in stack:
            yield _alone(*entry)


def _alone(event: Event, microseconds: float) -> Event:
    return event | {"dur": max(0.0, microseconds)}


def busy_share(spans: Iterable[Span]) -> tuple[int, float]:
    """(spans, share of the time from first to last that any covers)."""
    ordered = sorted(spans)
    if not ordered:
        return 0, 0.0
    last = max(end for _, end in ordered)
    return len(ordered), _union(ordered) / (last - ordered[0][0])


def _covered(events: Iterable[Event]) -> float:
    return _union(sorted(map(_span, events)))


def _union(ordered: list[Span]) -> float:
    """Length of what sorted spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _span(event: Event) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _phase(event: Event) -> str:
    name = event["name"]
    return name.removeprefix(trace.PHASE) if name.startswith(trace.PHASE) else ""


def rows(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, a row of each phase and one of the step)."""
    busy = "GPU busy" if table["gpu"] else "in operators"
    columns = ["phase", "s", busy, "launches", "TFLOP", "GB", "floor s"]
    step = {"seconds": table["seconds"], "busy": table["device_busy"]}
    every = table["phases"] | {"step": step}
    return columns, [[name, *_cells(phase)] for name, phase in every.items()]


def _cells(phase: dict[str, Any]) -> list[str]:
    """Of one row; empty where a figure is not known."""
    forms: dict[str, tuple[float, str]] = {
        "seconds": (1, ".3f"),
        "busy": (1, ".0%"),
        "launches": (1, ".0f"),
        "flops": (1e12, ".3g"),
        "bytes": (1e9, ".3g"),
        "floor_s": (1, ".3f"),
    }
    known = [(phase.get(key), *form) for key, form in forms.items()]
    return ["" if value is None else format(value / unit, form) for value, unit, form in known]


def costly(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(phase, "device" or "host") of which the largest costs are worth showing."""
    for name, phase in table["phases"].items():
        if phase["seconds"] >= table["seconds"] / 20:
            yield from ((name, kind) for kind in ("device", "host") if phase[kind])


def cost_rows(table: dict[str, Any], phase: str, kind: str) -> list[list[str]]:
    """Of COST_COLUMNS; the share is of the phase."""
    found = table["phases"][phase]
    return [
        [cost["name"], f"{cost['seconds']:.3f}"]
        + [f"{cost['seconds'] / found['seconds']:.0%}", str(cost["calls"])]
        for cost in found[kind]
    ]
