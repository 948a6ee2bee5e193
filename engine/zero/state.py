"""What a training engine must not lose: its masters and moments, as pieces of named parameters.

Every rank reads and writes the pieces it updates, under any ZeRO stage, so no rank ever holds more
than its share, and pieces saved by one number of ranks are read by another.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.config.deepspeed import offloaded
from gearshift.engine.zero.split_adamw import SplitAdamW

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + count` of a flattened parameter: those that this rank updates.

    flat: what the optimizer steps on, and its key for the moments; the piece begins at `offset`.
    """

    name: str
    start: int
    count: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of the flat master, or of a moment of the same shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def check_settings(role: str, ds_config: dict[str, Any]) -> None:
    """Raises ValueError where an engine with this DeepSpeed JSON could not be saved."""
    if offloaded(ds_config, "optimizer") == "nvme":
        raise ValueError(
            f"{role}.deepspeed: zero_optimization.offload_optimizer.device=nvme: checkpoints do "
            "not read an optimizer that is on a disk; use cpu"
        )


def pieces(engine: Any) -> list[Piece]:
    """All that this rank updates, of the trained parameters of a DeepSpeed engine."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return [piece for piece in _partitioned(zero, names) if piece.count]
    if stage:
        return list(_flattened(zero, names))
    return [Piece(names[weight], 0, master.numel(), master, 0) for weight, master in _whole(zero)]


def _partitioned(zero: Any, names: dict[Tensor, str]) -> Iterator[Piece]:
    """Stage 3: every parameter lies in equal parts over its ranks, the last ones padded."""
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        offset = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            start = part * dist.get_rank(parameter.ds_process_group)
            count = max(0, min(part, parameter.ds_numel - start))
            yield Piece(names[parameter], start, count, flat, offset)
            offset += part


def _flattened(zero: Any, names: dict[Tensor, str]) -> Iterator[Piece]:
    """Stages 1 and 2: a group's parameters end to end, cut evenly, wherever that falls."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        masters, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
    else:  # DeepSpeed's BF16_Optimizer: stage 1, bf16 weights, fp32 gradients
        masters, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
    for flat, parameters in zip(masters, groups, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(names[parameter], ours.start, ours.numel, flat, theirs.start)


def _whole(zero: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Stage 0: (weight, master) of every parameter; they differ for bf16 weights."""
    if not hasattr(zero, "fp32_groups"):
        yield from ((p, p) for group in zero.param_groups for p in group["params"])
        return
    for weights, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
        yield from zip(weights, masters, strict=True)


def shapes(engine: Any) -> dict[str, list[int]]:
    """Whole shapes of the trained parameters, by name."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def tensors(engine: Any) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What this rank saves: views by "kind/parameter", and (start, count) of each parameter.

    Kinds are `weights` (the master), and once stepped `exp_avg`, `exp_avg_sq` and, of a split
    master, `low`. Where every rank holds everything, each saves its share.
    """
    whole = engine.zero_optimization_stage() == 0
    views, places, state = {}, {}, _inner(engine.optimizer).state
    for piece in pieces(engine):
        piece = _share(piece) if whole else piece
        if not piece.count:
            continue
        places[piece.name] = [piece.start, piece.count]
        views[f"weights/{piece.name}"] = piece.of(piece.flat)
        for kind in _kinds(engine.optimizer):
            if kind in state.get(piece.flat, {}):
                views[f"{kind}/{piece.name}"] = piece.of(state[piece.flat][kind])
    return views, places


def counters(engine: Any, schedule: Any) -> dict[str, int]:
    """Plain numbers of an engine: steps of its optimizer and schedule, DeepSpeed's own counters."""
    state = _inner(engine.optimizer).state
    taken = {int(entry["step"]) for entry in state.values() if "step" in entry}
    assert len(taken) <= 1, f"parameters were stepped unequally: {taken}"
    own = {name: getattr(engine, name) for name in COUNTERS}
    return own | {"optimizer_steps": max(taken, default=0), "schedule": schedule.last_epoch}


@torch.no_grad()
def load(engine: Any, schedule: Any, saved: dict[str, int], files: list[Path]) -> None:
    """Restores what `tensors` and `counters` gave, of all ranks that saved. A collective.

    Raises ValueError where the files do not hold a parameter, or not of this optimizer.
    """
    inner, steps = _inner(engine.optimizer), saved["optimizer_steps"]
    with ExitStack() as stack:
        stored = Stored(files, stack)
        for piece in pieces(engine):
            stored.read("weights", piece, piece.of(piece.flat))
            state = inner.state[piece.flat]
            if not steps:
                state.clear()
                continue
            state["step"] = _step_count(inner, piece.flat, steps)
            for kind, dtype in _kinds(engine.optimizer).items():
                if kind not in state:
                    state[kind] = torch.zeros_like(piece.flat, dtype=dtype, requires_grad=False)
                stored.read(kind, piece, piece.of(state[kind]))
            beat()
    _replay_powers(inner, steps)
    _refresh_weights(engine)
    for name in COUNTERS:
        setattr(engine, name, saved[name])
    _seek(schedule, saved["schedule"])


class Stored:
    """The pieces in the files of all ranks that saved, read where they overlap with ours."""

    def __init__(self, files: list[Path], stack: ExitStack):
        self.places: dict[str, list[tuple[int, int, Any]]] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, "pt"))
            for name, (start, count) in json.loads(file.metadata()["notes"]).items():
                self.places.setdefault(name, []).append((start, start + count, file))

    def read(self, kind: str, piece: Piece, into: Tensor) -> None:
        """Fills `into`, [count] on any device, with this piece."""
        start, end, found = piece.start, piece.start + piece.count, 0
        covered = start
        for left, right, file in sorted(self.places.get(piece.name, []), key=lambda p: p[:2]):
            if right <= covered or left > covered or left >= end:
                continue
            values = self._slice(
                file, f"{kind}/{piece.name}", covered - left, min(right, end) - left
            )
            if values.dtype != into.dtype:
                raise ValueError(
                    f"{kind} of {piece.name}: the checkpoint has {values.dtype}, this run "
                    f"{into.dtype}; resume with the optimizer and precision that wrote it"
                )
            into.narrow(0, covered - start, len(values)).copy_(values)
            found, covered = found + len(values), min(right, end)
        if found != piece.count:
            raise ValueError(
                f"{piece.name}: the checkpoint has {found} of elements {start} to {end}; it is of "
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
            piece = Piece(name, 0, len(flat), flat, 0)
            stored.read(kind, piece, flat)
            yield name, flat


def _share(piece: Piece) -> Piece:
    """This rank's part of a whole parameter."""
    part = -(-piece.count // distributed.world_size())
    start = min(part * distributed.rank(), piece.count)
    count = min(part, piece.count - start)
    return Piece(piece.name, start, count, piece.flat, start)


def _inner(zero: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps; at stage 0 with fp32 weights there is no wrapper."""
    return getattr(zero, "optimizer", zero)


def _kinds(zero: Any) -> dict[str, torch.dtype]:
    """The optimizer's state tensors and their dtypes."""
    inner = _inner(zero)
    if not isinstance(inner, SplitAdamW):
        return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    return {"low": torch.int16, "exp_avg": inner.moments, "exp_avg_sq": inner.moments}


def _step_count(inner: torch.optim.Optimizer, flat: Tensor, steps: int) -> Any:
    if not isinstance(inner, torch.optim.AdamW):
        return steps
    return torch.tensor(float(steps), device=flat.device)  # where the fused kernel wants it


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


def _refresh_weights(engine: Any) -> None:
    """The model's weights become casts of the masters, as after a step."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
    elif stage:
        zero.update_lp_params()
    else:
        for weight, master in _whole(zero):
            weight.data.copy_(master.data)


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
