"""Run on ranks: one checkpoint taken up under several ZeRO stages.

    torchrun --nproc_per_node W resume_on_ranks.py MODELS CHECKPOINT OUT

For each stage of `STAGES`: OUT/<stage> gets a checkpoint saved before anything moved, and
OUT/<stage>.json the figures of the next step. OUT/back is OUT/zero2 taken up under ZeRO-3.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.checkpoint.save import Checkpoints
from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.ppo import PPOTrainer
from tests.checkpoint.save_on_ranks import CHANGES, Prompts, advance
from tests.tiny import run as tiny_run

STAGES = ("zero3", "zero2", "zero1", "zero0")


def take_up(models: Path, source: Path, zero: str, out: Path) -> dict[str, Any]:
    """Loads `source` under `zero`, saves it again to `out`, and makes a step."""
    config = tiny_run.config(models, zero, "tied", **CHANGES)
    trainer, stream = tiny_run.trainer(config), Prompts(config.ppo)
    advance(trainer, stream, 1)  # what it must forget
    remarks = checkpoint.load(source, trainer, {"prompts": stream})
    save(trainer, stream, out)
    (figures,) = advance(trainer, stream, 1)
    save(trainer, stream, out)
    return {"figures": figures, "remarks": remarks}


def save(trainer: PPOTrainer, stream: Prompts, out: Path) -> None:
    checkpoints = Checkpoints(out, keep=9, background=False, tell=pytest.fail)
    checkpoints.take(trainer, {"prompts": stream})
    checkpoints.publish()
    checkpoints.settle()


def write_stage_1(models: Path) -> None:
    for role in ("actor", "critic"):
        settings = ds_config.load(f"{role}_zero0") | {"zero_optimization": {"stage": 1}}
        (models / f"{role}_zero1.json").write_text(json.dumps(settings))


def main() -> None:
    models, source, out = map(Path, sys.argv[1:])
    distributed.start(1)
    if distributed.is_main():
        write_stage_1(models)
    distributed.barrier()
    for zero in STAGES:
        found = take_up(models, source, zero, out / zero)
        if distributed.is_main():
            (out / f"{zero}.json").write_text(json.dumps(found))
    take_up(models, out / "zero2" / source.name, "zero3", out / "back")


if __name__ == "__main__":
    main()
