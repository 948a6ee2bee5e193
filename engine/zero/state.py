"""Saves and loads what a training engine must not lose: master weights, moments and counters.

Each rank writes the parts of named parameters that it updates, under any ZeRO stage, and reads its
parts from the files of all ranks. So no rank holds more than its share, and a run may go on with
another number of ranks or another stage.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.zero.layout import (
    Fragment,
    fragments,
    inner_optimizer,
    refresh_weights,
    whole_shape,
)
from gearshift.engine.zero.split_adamw import SplitAdamW

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def shapes(engine: Any) -> dict[str, list[int]]:
    """Whole shapes of the trained parameters, by name."""
    return {
        name: list(whole_shape(parameter))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def tensors(engine: Any) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What this rank saves: views by "kind/parameter", and (start, count) of each parameter.

    Kinds are `weights` (the master), and once stepped `exp_avg`, `exp_avg_sq` and, of a split
    master, `low`. Where every rank holds everything, each saves its share.
    """
    whole = engine.zero_optimization_stage() == 0
    views, places, inner = {}, {}, inner_optimizer(engine.optimizer)
    for own in fragments(engine):
        own = _share(own) if whole else own
        if not own.count:
            continue
        places[own.name] = [own.start, own.count]
        views[f"weights/{own.name}"] = own.of(own.master)
        state = inner.state.get(own.master, {})
        for kind in _kinds(inner):
            if kind in state:
                views[f"{kind}/{own.name}"] = own.of(state[kind])
    return views, places


def counters(engine: Any, schedule: Any) -> dict[str, int]:
    """Plain numbers of an engine: steps of its optimizer and schedule, DeepSpeed's own counters."""
    state = inner_optimizer(engine.optimizer).state
    taken = {int(entry["step"]) for entry in state.values() if "step" in entry}
    assert len(taken) <= 1, f"parameters were stepped unequally: {taken}"
    own = {name: getattr(engine, name) for name in COUNTERS}
    return own | {"optimizer_steps": max(taken, default=0), "schedule": schedule.last_epoch}


@torch.no_grad()
def load(engine: Any, schedule: Any, saved: dict[str, int], files: list[Path]) -> None:
    """Restores what `tensors` and `counters` gave, of all ranks that saved. A collective.

    Raises ValueError where the files do not hold a parameter, or not of this optimizer.
    """
    inner, steps = inner_optimizer(engine.optimizer), saved["optimizer_steps"]
    with ExitStack() as stack:
        stored = Stored(files, stack)
        for own in fragments(engine):
            stored.read("weights", own, own.of(own.master))
            state = inner.state[own.master]
            if not steps:
                state.clear()
                continue
            state["step"] = _step_count(inner, own.master, steps)
            for kind, dtype in _kinds(inner).items():
                if kind not in state:
                    state[kind] = torch.zeros_like(own.master, dtype=dtype, requires_grad=False)
                stored.read(kind, own, own.of(state[kind]))
            beat()
    _replay_powers(inner, steps)
    refresh_weights(engine)
    for name in COUNTERS:
        setattr(engine, name, saved[name])
    _seek(schedule, saved["schedule"])


class Stored:
    """The fragments in the files of all ranks that saved, read where they overlap with ours."""

    def __init__(self, files: list[Path], stack: ExitStack):
        self.places: dict[str, list[tuple[int, int, Any]]] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, "pt"))
            for name, (start, count) in json.loads(file.metadata()["notes"]).items():
                self.places.setdefault(name, []).append((start, start + count, file))

    def read(self, kind: str, own: Fragment, into: Tensor) -> None:
        """Fills `into`, [count] on any device, with this fragment."""
        start, end, found = own.start, own.start + own.count, 0
        covered = start
        for left, right, file in sorted(self.places.get(own.name, []), key=lambda p: p[:2]):
            if right <= covered or left > covered or left >= end:
                continue
            values = self._slice(file, f"{kind}/{own.name}", covered - left, min(right, end) - left)
            if values.dtype != into.dtype:
                raise ValueError(
                    f"{kind} of {own.name}: the checkpoint has {values.dtype}, this run "
                    f"{into.dtype}; resume with the optimizer and precision that wrote it"
                )
            into.narrow(0, covered - start, len(values)).copy_(values)
            found, covered = found + len(values), min(right, end)
        if found != own.count:
            raise ValueError(
                f"{own.name}: the checkpoint has {found} of elements {start} to {end}; it is of "
                "another model"
            )

    def _slice(self, file: Any, key: str, left: int, right: int) -> Tensor:
        if key not in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            raise ValueError(
                f"{key}: not in the checkpoint; resume with the optimizer that wrote it"
            )
        return file.get_slice(key)[left:right]


def whole(files: list[Path], kind: str = "weights") -> Iterator[tuple[str, Tensor]]:
    """(name, flattened) of every parameter in the files of all ranks that saved, one at a time."""
    with ExitStack() as stack:
        stored = Stored(files, stack)
        for name, places in stored.places.items():
            dtype = places[0][2].get_slice(f"{kind}/{name}")[:0].dtype
            flat = torch.empty(max(end for _, end, _ in places), dtype=dtype)
            stored.read(kind, Fragment(name, 0, len(flat), flat, 0), flat)
            yield name, flat


def _share(whole: Fragment) -> Fragment:
    """This rank's part of a parameter that every rank updates."""
    part = -(-whole.count // distributed.world_size())
    start = min(part * distributed.rank(), whole.count)
    return replace(whole, start=start, count=min(part, whole.count - start), offset=start)


def _kinds(inner: torch.optim.Optimizer) -> dict[str, torch.dtype]:
    """The optimizer's state tensors and their dtypes."""
    if not isinstance(inner, SplitAdamW):
        return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    return {"low": torch.int16, "exp_avg": inner.moments, "exp_avg_sq": inner.moments}


def _step_count(inner: torch.optim.Optimizer, master: Tensor, steps: int) -> Any:
    if not isinstance(inner, torch.optim.AdamW):
        return steps
    return torch.tensor(float(steps), device=master.device)  # where the fused kernel wants it


def _replay_powers(inner: torch.optim.Optimizer, steps: int) -> None:
    """DeepSpeedCPUAdam (seen in 0.19.8) keeps beta^step as a running product, outside its state.

    A power is not bit for bit that product; as many steps on one throw-away element are.
    """
    if not hasattr(inner, "ds_opt_adam"):
        return
    group = inner.param_groups[0]
    one = [torch.zeros(1) for _ in range(4)]
    fixed = (*group["betas"], group["eps"], 0.0, group["bias_correction"])
    for step in range(1, steps + 1):
        inner.ds_opt_adam.adam_update(inner.opt_id, step, 0.0, *fixed, *one)


def _seek(schedule: Any, step: int) -> None:
    """Puts a LambdaLR where it stood after `step` optimizer steps."""
    schedule.last_epoch = step
    rates = [
        base * factor(step)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
