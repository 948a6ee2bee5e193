"""Run on ranks: scores with weights that stay and with weights that stream; writes both down.

    torchrun --nproc_per_node W engine_on_ranks.py OUT MODELS DISK MODEL:ROLE:PLACE[,...]

PLACE: of the weights, host or disk. OUT/rank<r>.jsonl: one object per case: the largest difference
of resident and streamed scores, and the bytes that moved over the least that a pass must bring.
Then what was on the device at once, beside the plan; and, last, how the ranks end when one fails.
"""

import gc
import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import ModelConfig
from gearshift.engine.models.heads import Policy, ScoreModel, verify_head
from gearshift.engine.models.load import load_config, load_model, room_for
from gearshift.engine.models.reading import lay_out
from gearshift.engine.models.scoring import forwards
from gearshift.engine.models.shapes import shape_of
from gearshift.engine.plan import bytes as memory_model
from gearshift.engine.plan.bytes import Zero
from gearshift.engine.roles import frozen_engine
from gearshift.kernels import ops
from tests.plan.memory_on_ranks import live_bytes


def settings(place: str, disk: Path) -> dict:
    """Of a frozen role with its weights on "device", "host", "host16" (bf16) or "disk"."""
    names = {"device": "frozen_zero3", "host": "frozen_zero3_cpu", "disk": "frozen_zero3_nvme"}
    names["host16"] = "frozen_zero3_cpu_bf16"
    found = ds_config.load(names[place])
    if place == "disk":
        found["zero_optimization"]["offload_param"]["nvme_path"] = str(disk)
    return found


def engine_of(path: Path, role: str, place: str, disk: Path):
    ds = settings(place, disk)
    config = ModelConfig(path=str(path))
    module = load_model(config, role, ds, store=room_for(config, role, ds))
    return frozen_engine(Policy(module) if role == "policy" else ScoreModel(module), ds)


def inputs(role: str, count: int, *, packs: bool) -> list[tuple]:
    """Micro-batches of one rank: ragged in length, different on every rank."""
    draw = torch.Generator().manual_seed(7 + distributed.rank())
    found = []
    for i in range(count):
        ids = torch.randint(3, 32, (2, 6 + i), generator=draw)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if role == "policy":
            mask[0, :2] = False  # left padding
        reading, places = lay_out(ids, mask, packs=packs)
        if role == "reward":
            found.append((reading, places[:, -1]))
            continue
        found.append((reading, places[:, -4:-1].flatten(), head(ids[:, -3:].flatten())))
    return found


def head(targets: torch.Tensor):
    return lambda hidden, weight, bias: ops.linear_logprob(hidden, weight, targets, bias=bias)[0]


def scores(engine, role: str, count: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(forwards(engine, inputs(role, count, packs=engine.module.packs))))


def case(models: Path, name: str, role: str, place: str, disk: Path) -> dict:
    count = 3 + distributed.rank()  # ranks need not have as many micro-batches
    resident = engine_of(models / name, role, "device", disk)
    # Under ZeRO every forward is a collective: all ranks make the most that any makes.
    expected = scores(resident, role, 2 + distributed.world_size())
    engine = engine_of(models / name, role, place, disk)
    if role == "policy":
        verify_head(engine)
    before = replace(engine.traffic)  # a trunk without its head, too, is read to be verified
    found = [scores(engine, role, count) for _ in range(2)]
    part = sum(p.numel() for p in load_whole(models / name, role)) / distributed.world_size() * 4
    traffic = engine.traffic - before
    return {
        "case": f"{name} {role} {place}",
        "verified": before.passes,
        "error": max(float((f - expected[: len(f)]).abs().max()) for f in found),
        "ratio": traffic.ratio,
        "passes": traffic.passes,
        "least over part": traffic.least_bytes / traffic.passes / part,
        "held": sum(p.numel() for p in engine.module.parameters()),
    }


def load_whole(path: Path, role: str) -> list[torch.Tensor]:
    ds = ds_config.load("frozen_zero3") | {"zero_optimization": {"stage": 0}}
    return list(load_model(ModelConfig(path=str(path)), role, ds).parameters())


def footprint(models: Path, place: str, disk: Path) -> dict:
    """The most bytes that a pass of MODELS/wide has alive at once, weights and forwards, and the
    host memory of its weights, each beside the plan."""
    gc.freeze()  # the libraries' objects: a walk leaves them out
    engine = engine_of(models / "wide", "policy", place, disk)
    calls, tokens = [], 0
    for _ in range(3):
        ids = torch.ones(2, 48, dtype=torch.long)
        mask = ids.bool()
        mask[0, :2] = False
        reading, places = lay_out(ids, mask, packs=True)
        before, targets = places[:, -4:-1].flatten(), ids[:, -3:].flatten()
        calls.append(partial(engine.module, reading, before, head(targets)))
        tokens += int(mask.sum())
    empty, most, bring = live_bytes(), 0, engine._bring

    def watched(index: int) -> None:
        nonlocal most
        bring(index)
        most = max(most, live_bytes() - empty)

    engine._bring = watched
    engine.together(calls)
    shape = shape_of(load_config(ModelConfig(path=str(models / "wide")), "policy"), "policy")
    zero = Zero.of(settings(place, disk))
    return {
        "case": f"footprint {place}",
        "device": most,
        "device planned": memory_model.streamed_weights(shape, zero)
        + memory_model.paused_forwards(shape, zero, tokens),
        "host": engine.store.nbytes,
        "host planned": memory_model.frozen_states(
            shape, zero, distributed.world_size()
        ).steady_host,
        "whole": zero.size * shape.total,
    }


def one_fails(models: Path, disk: Path) -> dict:
    """What each rank is told when the last rank's head raises in the middle of a pass."""
    engine = engine_of(models / "policy", "policy", "host", disk)
    *inside, head = inputs("policy", 1, packs=True)[0]
    if distributed.rank() == distributed.world_size() - 1:
        engine.module.lm.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    start = time.monotonic()
    try:
        engine(*inside, head)
    except (RuntimeError, ZeroDivisionError) as error:
        return {"case": "failed", "told": type(error).__name__, "s": time.monotonic() - start}
    return {"case": "failed", "told": "", "s": time.monotonic() - start}


def main(out: Path, models: Path, disk: Path, chosen: str) -> None:
    distributed.start(1)
    cases = [name.split(":") for name in chosen.split(",")]
    rows = [case(models, *each, disk) for each in cases]
    rows += [footprint(models, place, disk) for place in ("host", "host16", "disk")]
    distributed.barrier()
    rows.append(one_fails(models, disk))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / f"rank{distributed.rank()}.jsonl").write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
    os._exit(0)  # there is no group any more to say goodbye to
