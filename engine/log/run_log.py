"""What rank 0 writes of a run: metrics.jsonl, samples.jsonl and the trackers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gearshift.engine.config.schema import RunConfig
from gearshift.engine.log.trackers import open_trackers


def nearest_existing(path: Path) -> Path:
    """`path`, or the closest of its parents that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


class RunLog:
    """One JSON object a line, each written in one piece as soon as it is known.

    Only rank 0 makes one.

    config: names the folder and the trackers.
    settings: the whole configuration as plain values, handed to the trackers.
    resumed_step: the checkpoint's step; lines of later steps, and a torn last line, are cut. 0:
    there is none, so what a run that was killed has left is cut whole.
    """

    def __init__(
        self, config: RunConfig, settings: Mapping[str, Any] | None = None, *, resumed_step: int = 0
    ):
        self.folder = Path(config.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: _LineFile(self.folder / f"{name}.jsonl", resumed_step or -1)
            for name in ("metrics", "samples")
        }
        self._trackers = open_trackers(config, settings or {}, resumed_step + 1)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes one step's figures; NaN and infinities are written as null."""
        self._files["metrics"].write(
            {"step": step} | {k: v for k, v in figures.items() if k != "step"}
        )
        for tracker in self._trackers:
            tracker.log(step, figures)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes rows of {"prompt", "response", "score"}; a prompt is a string or a chat. Rows of
        held-out prompts have their dataset's name under "eval"."""
        for row in rows:
            self._files["samples"].write({"step": step} | row)

    def sync(self) -> None:
        """Returns when the lines so far are on the disk: a checkpoint must not outlive its log."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close()


class _LineFile:
    """A JSONL file that only ever holds whole lines."""

    def __init__(self, path: Path, last_step: int):
        _cut(path, last_step)
        self._file = path.open("ab", buffering=0)

    def write(self, content: dict[str, Any]) -> None:
        # JSON has no word for NaN and infinity: they become null.
        read = json.loads(json.dumps(content), parse_constant=lambda word: None)
        line = json.dumps(read, ensure_ascii=False, allow_nan=False) + "\n"
        # One unbuffered write: a reader, or a kill, never sees half a line of ours. Lone
        # surrogates, which a byte-level tokenizer can decode to, are not UTF-8.
        self._file.write(line.encode("utf-8", "replace"))

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, last_step: int) -> None:
    """Drops lines after `last_step` and everything after the first line that is no JSON."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        step = _step_of(line)
        if step is None:
            break
        if step <= last_step:
            kept.append(line)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_bytes(b"".join(kept))
    os.replace(fresh, path)


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
