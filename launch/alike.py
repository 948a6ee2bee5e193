"""What must be the same on every host: settings, code, versions, and the files that a run reads."""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from gearshift.engine.assemble import Blueprint
from gearshift.engine.checkpoint.resume import leaves
from gearshift.engine.checkpoint.state import tokenizer_print
from gearshift.engine.cluster import distributed
from gearshift.engine.config.assets import resolve
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import Config
from gearshift.engine.models.load import location
from gearshift.engine.models.shapes import PREFIX

PACKAGE = Path(__file__).resolve().parents[1]
DRIVER = Path("/proc/driver/nvidia/version")
FIX = "start every host with the same configuration, code and libraries"
_READ_BYTES = 1 << 22  # of a file, from its start; with the size of the whole


def compare(mine: Mapping[str, str], fix: str) -> None:
    """Raises ConfigError, naming the first fact that differs and on which host. A collective.

    Facts are only sent where their digests differ: there can be a thousand of them.
    """
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    if len(set(distributed.all_gather_objects(digest))) == 1:
        return
    told = distributed.all_gather_objects((distributed.host(), mine))
    for other in told:
        found = difference(*told[0], *other)
        if found:
            raise ConfigError(*found, fix)


def difference(
    first: str, ours: Mapping[str, str], host: str, theirs: Mapping[str, str]
) -> tuple[str, str] | None:
    """The first fact in which two hosts differ, and how."""
    keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if not keys:
        return None
    here, there = (facts.get(keys[0], "absent") for facts in (ours, theirs))
    more = f" ({len(keys)} differ)" if len(keys) > 1 else ""
    return keys[0], f"{first} has {here}, {host} has {there}{more}"


def check_programs(config: Config) -> None:
    """Every key of the configuration, and what `programs` finds. A collective."""
    if distributed.world_size() > 1:
        compare(settings(config) | programs(), FIX)


def check_files(config: Config, blueprint: Blueprint) -> None:
    """What `files` finds. A collective."""
    if distributed.world_size() > 1:
        compare(files(config, blueprint), "give every host the same files")


def settings(config: Config) -> dict[str, str]:
    """Every key of the configuration."""
    return {key: str(value) for key, value in leaves(asdict(config), "")}


def programs() -> dict[str, str]:
    """Versions of what computes, our code file by file, and what our variables choose."""
    found = {"Python": platform.python_version()}
    for name in ("torch", "transformers", "deepspeed", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if DRIVER.exists():
        found["NVIDIA driver"] = DRIVER.read_text().splitlines()[0]
    found["GEARSHIFT_KERNELS"] = os.environ.get("GEARSHIFT_KERNELS", "unset")
    for room in ("engine", "kernels", "launch"):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            found[f"gearshift/{path.relative_to(PACKAGE)}"] = _print(path)
    return found


def files(config: Config, blueprint: Blueprint) -> dict[str, str]:
    """DeepSpeed JSONs, tokenizers, models, data, reward functions: by the key that names them."""
    found: dict[str, str] = {}
    for part in blueprint.cast.values():
        found[f"{part.key}.deepspeed"] = _digest(repr(part.settings))
        if part.named and not str(part.section.path).startswith(PREFIX):
            found[f"{part.key}.tokenizer"] = tokenizer_print(part.tokenizer)[:12]
            found |= _prints(f"{part.key}.path", location(part.source))
            found |= _prints(f"{part.key}.path", str(part.adapter or ""))
            commit = getattr(part.hf_config, "_commit_hash", None)
            found[f"{part.key}.revision"] = str(commit)
    for key in ("data", "pretrain", "eval"):
        for i, source in enumerate(getattr(config, key).sources):
            found |= _prints(f"{key}.sources.{i}.path", resolve(source.path))
    for key, rewards in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
        for i, reward in enumerate(rewards):
            found |= _prints(f"{key}.{i}.function", (reward.function or "").rpartition(":")[0])
    return found


def _prints(key: str, place: str) -> Iterator[tuple[str, str]]:
    """Of a file, or of the files of a directory; nothing of what is on the hub, or a module."""
    path = Path(place)
    if place and path.is_file():
        yield f"{key}={place}", _print(path)
    elif place and path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                yield f"{key}={place}/{file.name}", _print(file)


def _print(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(_READ_BYTES)
    return f"{path.stat().st_size} bytes, sha256 {hashlib.sha256(start).hexdigest()[:12]}"


def _digest(text: str) -> str:
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
