"""What `gearshift doctor --config` looks at for one job: its folder, disks and attention."""

import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import Config
from gearshift.engine.log.run_log import nearest_existing
from gearshift.engine.models.cast import Part, cast
from gearshift.engine.models.load import attention_implementation, dtype_of
from gearshift.engine.models.shapes import shape_of
from gearshift.engine.plan.hardware import GB
from gearshift.engine.plan.seconds import saved_bytes
from gearshift.launch.examine.machine import Finding


def examine(config: Config) -> Iterator[Finding]:
    """Reads the models' configurations, then looks at what the job needs of this machine."""
    parts = list(cast(config).values())
    try:
        for part in parts:
            _ = part.settings, part.hf_config  # they can be read
    except ConfigError as error:
        fix = error.fix or "gearshift fetch, or a path on this machine"
        yield Finding("models", "bad", error.mistake, fix)
        return
    yield from _folder(config, parts)
    yield from _attention(parts)
    yield from _nvme(parts)


def _folder(config: Config, parts: list[Part]) -> Iterator[Finding]:
    """Whether the run folder can be made and holds the checkpoints that will be kept."""
    run = config.run
    place = nearest_existing(Path(run.dir))
    if not place.is_dir() or not os.access(place, os.W_OK):
        fix = "run.dir: choose a folder that you may write to"
        yield Finding("run folder", "bad", f"{place} is not writable", fix)
        return
    bytes_each = sum(
        shape_of(part.hf_config, part.kind, part.lora, still=part.still).updated
        * saved_bytes(part.section.optimizer)
        for part in parts
        if part.trained
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


def _attention(parts: list[Part]) -> Iterator[Finding]:
    """The backend that `attn` resolves to, for each model."""
    installed = {package.name.lower().replace("_", "-") for package in metadata.distributions()}
    for part in parts:
        role, dtype = part.name, dtype_of(part.settings)
        try:
            picked = attention_implementation(part.section.attn, part.hf_config, dtype)
        except ConfigError as error:
            yield Finding(f"attention of {role}", "bad", error.mistake, error.fix)
            continue
        if picked.startswith("flash") and not installed & {"flash-attn", "flash-attn-4"}:
            fix = "pip install --no-build-isolation 'gearshift[flash]', or attn: sdpa"
            yield Finding(f"attention of {role}", "bad", f"{picked} is not installed", fix)
        else:
            yield Finding(f"attention of {role}", "ok", picked)


def _nvme(parts: list[Part]) -> Iterator[Finding]:
    """The folders of states that are kept on a disk."""
    for part in parts:
        role, deepspeed = part.name, part.settings
        if all(ds_config.offloaded(deepspeed, what) != "nvme" for what in ("param", "optimizer")):
            continue
        try:
            ds_config.check_nvme(deepspeed)
        except ConfigError as error:
            yield Finding(f"nvme of {role}", "bad", error.mistake, error.fix)
            continue
        yield Finding(f"nvme of {role}", "ok", "the folder is there")
