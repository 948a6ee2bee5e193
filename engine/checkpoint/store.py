"""Checkpoint folders on disk: written beside, checksummed, renamed when whole, deleted when old.

`step_000020.partial` becomes `step_000020` only when every file in it has reached the disk, so a
folder of that name was whole once. What happened to its bytes since, checksums tell. Nothing here
is collective, and nothing is pickled: tensors are safetensors, all else is JSON.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.cluster.progress import beat

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder; another one is refused
REWARD = "objective/rlhf_reward"  # what manifests have under "reward", unless they name another
_BLOCK = 1 << 26  # bytes handed to the disk at once
_POLL_S = 0.05
# Names of safetensors' header, by dtype.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int16: "I16"}


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def partial(target: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return target.with_name(target.name + ".partial")


def steps(folder: Path) -> list[Path]:
    """Folders that were whole when they got their name, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Any) -> dict[str, Any]:
    """Writes a safetensors file straight from the tensors' memory; returns its size and sha256.

    notes: plain JSON values, under "notes" in the file's metadata. Tensors may be on any device.
    """
    # The widest elements first: each tensor then starts at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"notes": json.dumps(notes)}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = _DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    contents = (_bytes(tensor) for _, tensor in ordered)
    return _write(path, _after(len(text).to_bytes(8, "little") + text, contents))


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Writes plain values; returns the file's size and sha256."""
    return _write(path, iter([memoryview(json.dumps(value).encode())]))


def replace_json(path: Path, value: Any) -> None:
    """Writes a file that is either as before or whole, whenever the power fails."""
    fresh = path.with_name(path.name + ".tmp")
    fresh.unlink(missing_ok=True)
    write_json(fresh, value)
    os.replace(fresh, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names in `folder` survive a power failure: fsync of a file does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with a checksum of itself."""
    return content | {"sha256": _digest(content)}


def publish(target: Path, content: dict[str, Any]) -> None:
    """Makes the written `partial(target)` the checkpoint `target`, then the latest one.

    content: of its manifest; "files" holds the size and checksum of every file.
    """
    source = partial(target)
    replace_json(source / MANIFEST, seal({"format": FORMAT, **content}))
    if target.exists():  # of an abandoned continuation
        _discard(target)
    os.replace(source, target)
    sync_folder(target.parent)
    replace_json(target.parent / "latest", {"checkpoint": target.name})


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError, naming what is wrong, where it is no whole manifest of this format."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"has no {MANIFEST}: not a checkpoint of Gearshift, or not a whole one")
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if claimed != _digest(content):
        raise ValueError(f"{MANIFEST} is damaged")
    if content["format"] != FORMAT:
        raise ValueError(
            f"has format {content['format']}, this version of Gearshift reads {FORMAT}"
        )
    return content


def fault(checkpoint: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with one file of a checkpoint, None where its checksum holds."""
    path = checkpoint / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size} bytes, {entry['bytes']} were written"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == entry["sha256"] else f"{name} is damaged: its checksum differs"


def await_files(paths: list[Path], cancelled: Callable[[], bool], timeout_s: float) -> None:
    """Returns when all of `paths` are there; raises OSError when cancelled or out of time."""
    deadline = time.monotonic() + timeout_s
    for path in paths:
        while not path.exists():
            if cancelled():
                raise OSError("another rank could not write its part")
            if time.monotonic() > deadline:
                raise OSError(f"{path.name} did not appear within {timeout_s:.0f} s")
            time.sleep(_POLL_S)


def figures(folder: Path, name: str) -> dict[Path, float | None]:
    """Checkpoints, oldest first, and what their manifests say of the figure `name`.

    One whose manifest cannot be read, damaged since or of another version, is left out.
    """
    found: dict[Path, float | None] = {}
    for path in steps(folder):
        with suppress(ValueError):
            manifest = read_manifest(path)
            same = manifest.get("reward_is", REWARD) == name
            found[path] = manifest.get("reward") if same else None
    return found


def best(known: Mapping[Path, float | None]) -> Path | None:
    """The checkpoint with the highest figure, the first of equals; None where none has one."""
    values = {path: value for path, value in known.items() if value is not None}
    return max(values, key=values.__getitem__, default=None)


def prune(folder: Path, keep: int, by: str = REWARD) -> None:
    """Deletes all but the last `keep` checkpoints and the one whose figure `by` is the highest.

    Those that `figures` leaves out are left to their owner.
    """
    known = figures(folder, by)
    kept = best(known)
    for path in list(known)[:-keep]:
        if path != kept:
            _discard(path)
    for path in folder.glob("step_*.stale"):
        shutil.rmtree(path)


def retire(folder: Path, after: int) -> list[Path]:
    """Sets aside checkpoints of steps later than `after`: a run goes on from there another way.

    They are deleted when the next checkpoint is safe.
    """
    later = [path for path in steps(folder) if int(path.name.removeprefix("step_")) > after]
    return [_set_aside(path) for path in later]


def _set_aside(checkpoint: Path) -> Path:
    stale = checkpoint.with_name(checkpoint.name + ".stale")
    shutil.rmtree(stale, ignore_errors=True)
    os.replace(checkpoint, stale)
    return stale


def _discard(checkpoint: Path) -> None:
    """Renamed first: a kill half-way leaves nothing that looks like a checkpoint."""
    shutil.rmtree(_set_aside(checkpoint))


def _write(path: Path, blocks: Iterator[memoryview]) -> dict[str, Any]:
    """A new file with these bytes, on the disk and not only in memory when this returns."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for block in blocks:
            while block:
                written = os.write(handle, block[:_BLOCK])
                digest.update(block[:written])
                size, block = size + written, block[written:]
                beat()
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _after(head: bytes, blocks: Iterator[memoryview]) -> Iterator[memoryview]:
    yield memoryview(head)
    yield from blocks


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().reshape(-1).cpu().contiguous()
    return memoryview(flat.view(torch.uint8).numpy())


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
