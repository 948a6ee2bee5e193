"""Memory of this host that the processes of this job may use, in a container or under Slurm."""

from collections.abc import Iterator
from pathlib import Path

import psutil

# What a control group may use and uses now, in version 2 and in version 1, and its pages of files,
# which are given up when memory is wanted.
_NAMES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def host_memory(root: Path = Path("/")) -> float:
    """Bytes that the processes of this node may use together.

    root: of the file system in which proc and sys are.
    """
    return min(float(psutil.virtual_memory().total), *(limit for limit, _ in _groups(root)))


def free_memory(root: Path = Path("/")) -> float:
    """Bytes of these that nothing but pages of files uses now."""
    left = (limit - used for limit, used in _groups(root))
    return min(float(psutil.virtual_memory().available), *left)


def _groups(root: Path) -> Iterator[tuple[float, float]]:
    """(limit, bytes in use) of every control group that bounds this process."""
    yield float("inf"), 0.0
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, group = line.split(":", 2)
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        if controllers and "memory" not in controllers.split(","):
            continue
        # Every group inside which this one is bounds it, too.
        inner = base / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base):
                yield from (_bound(folder, *names) for names in _NAMES)


def _bound(folder: Path, limit: str, used: str, files: tuple[str, ...]) -> tuple[float, float]:
    stat = folder / "memory.stat"
    lines = stat.read_text().splitlines() if stat.exists() else []
    pages = dict(line.split() for line in lines)
    spare = sum(float(pages.get(name, 0)) for name in files)
    in_use = _number(folder / used, otherwise=0.0)
    return _number(folder / limit, otherwise=float("inf")), max(0.0, in_use - spare)


def _number(path: Path, *, otherwise: float) -> float:
    text = path.read_text().strip() if path.exists() else ""
    return float(text) if text.isdecimal() else otherwise
