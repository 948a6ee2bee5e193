"""What `gearshift doctor --config` looks at for one job: its folder, disks and attention."""

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import Config
from gearshift.engine.log.run_log import nearest_existing
from gearshift.engine.models.load import attention_implementation, dtype_of
from gearshift.engine.models.shapes import shape_of
from gearshift.engine.plan import inputs as plan_inputs
from gearshift.engine.plan.hardware import GB
from gearshift.engine.plan.seconds import saved_bytes
from gearshift.launch.examine.machine import Finding


def examine(config: Config) -> Iterator[Finding]:
    """Reads the models' configurations, then looks at what the job needs of this machine."""
    try:
        models, settings = plan_inputs.read(config)
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        yield Finding("models", "bad", what, fix or "gearshift fetch, or a path on this machine")
        return
    yield from _folder(config, models)
    yield from _attention(config, models, settings)
    yield from _nvme(settings)


def _folder(config: Config, models: dict[str, Any]) -> Iterator[Finding]:
    """Whether the run folder can be made and holds the checkpoints that will be kept."""
    run = config.run
    place = nearest_existing(Path(run.dir))
    if not place.is_dir() or not os.access(place, os.W_OK):
        fix = "run.dir: choose a folder that you may write to"
        yield Finding("run folder", "bad", f"{place} is not writable", fix)
        return
    bytes_each = sum(
        shape_of(models[role], kind).total * saved_bytes(getattr(config, role).optimizer)
        for role, kind in (("actor", "policy"), ("critic", "critic"))
        if role in models
    )
    # The last ones, the best, and the one being written beside them.
    wanted, free = bytes_each * (run.keep_checkpoints + 2), shutil.disk_usage(place).free
    text = (
        f"{place} has {free / GB:.1f} GB free; checkpoints of {bytes_each / GB:.1f} GB take "
        f"{wanted / GB:.1f} GB"
    )
    if free < wanted:
        fix = "run.dir: choose a larger disk, or lower run.keep_checkpoints"
        yield Finding("run folder", "bad", text, fix)
    else:
        yield Finding("run folder", "ok", text)


def _attention(
    config: Config, models: dict[str, Any], settings: dict[str, dict]
) -> Iterator[Finding]:
    """The backend that `attn` resolves to, for each model."""
    sections = {"actor": config.actor, "critic": config.critic, "reference": config.reference}
    sections |= {reward.name: reward for reward in config.rewards}
    for role, model in models.items():
        try:
            dtype = dtype_of(settings[role])
            picked = attention_implementation(sections[role].attn, model, dtype)
        except ValueError as error:
            yield Finding(f"attention of {role}", "bad", *str(error).split("; ", 1))
            continue
        if picked.startswith("flash") and not _installed("flash-attn", "flash-attn-4"):
            fix = "pip install --no-build-isolation 'gearshift[flash]', or attn: sdpa"
            yield Finding(f"attention of {role}", "bad", f"{picked} is not installed", fix)
        else:
            yield Finding(f"attention of {role}", "ok", picked)


def _installed(*names: str) -> bool:
    for name in names:
        try:
            importlib.metadata.version(name)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def _nvme(settings: dict[str, dict]) -> Iterator[Finding]:
    """The folders of states that are kept on a disk."""
    for role, deepspeed in settings.items():
        if all(ds_config.offloaded(deepspeed, what) != "nvme" for what in ("param", "optimizer")):
            continue
        try:
            ds_config.check_nvme(deepspeed)
        except ValueError as error:
            yield Finding(f"nvme of {role}", "bad", *str(error).split("; ", 1))
            continue
        yield Finding(f"nvme of {role}", "ok", "the folder is there")
