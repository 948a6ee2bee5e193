"""Saving a run and taking it up again.

A checkpoint is a folder `step_000020`: DeepSpeed's files of actor and critic, and `trainer.json`
with everything else. It is written beside and renamed, so a folder of that name is complete.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from gearshift.engine import distributed
from gearshift.engine.ppo import PPOTrainer


def save(folder: Path, trainer: PPOTrainer, streams: dict[str, Any], keep: int) -> Path:
    """Writes `folder`/step_NNNNNN and deletes all but the last `keep`. A collective."""
    target = folder / f"step_{trainer.steps_done:06d}"
    partial = target.with_suffix(".partial")
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    for name, role in _trained(trainer).items():
        role.engine.save_checkpoint(str(partial), tag=name, save_latest=False)
    distributed.barrier()
    if distributed.is_main():
        state = {
            "steps_done": trainer.steps_done,
            "kl_coef": trainer.kl.coef,
            "world_size": distributed.world_size(),
            "streams": {name: stream.state_dict() for name, stream in streams.items()},
        }
        (partial / "trainer.json").write_text(json.dumps(state, indent=1))
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return target


def load(checkpoint: Path, trainer: PPOTrainer, streams: dict[str, Any]) -> None:
    """Restores what `save` wrote. A collective.

    Raises ValueError for another world size, as DeepSpeed's partitions are of the one that saved,
    and where a model to train was not saved.
    """
    state = json.loads((checkpoint / "trainer.json").read_text())
    if state["world_size"] != distributed.world_size():
        raise ValueError(
            f"run.resume={str(checkpoint)!r}: saved by {state['world_size']} ranks, this run has "
            f"{distributed.world_size()}; start as many"
        )
    for name, role in _trained(trainer).items():
        if not (checkpoint / name).is_dir():
            raise ValueError(
                f"run.resume={str(checkpoint)!r}: has no {name}; it was saved with another "
                "ppo.estimator"
            )
        role.engine.load_checkpoint(str(checkpoint), tag=name)
    trainer.steps_done = state["steps_done"]
    trainer.kl.coef = state["kl_coef"]
    for name, stream in streams.items():
        stream.load_state_dict(state["streams"][name])


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        p for p in folder.glob("step_*") if (p / "trainer.json").exists() and p.suffix == ""
    )


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `run.resume` names: the last one for "auto", None for "none"."""
    if resume == "none":
        return None
    if resume == "auto":
        return (checkpoints(folder) or [None])[-1]
    if not (Path(resume) / "trainer.json").exists():
        raise ValueError(f"run.resume={resume!r}: no checkpoint there; use auto, none or its path")
    return Path(resume)


def _trained(trainer: PPOTrainer) -> dict[str, Any]:
    roles = {"actor": trainer.actor, "critic": trainer.critic}
    return {name: role for name, role in roles.items() if role is not None}
