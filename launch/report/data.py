"""A run folder, read for its report."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gearshift.engine.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds; what is missing is empty."""

    folder: Path
    metrics: list[dict[str, Any]]  # one object per step
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    config_text: str  # config.yaml as it is, with the origin of each value
    environment: dict[str, Any]

    def setting(self, key: str) -> Any:
        """The value at a dotted key of the configuration, or None."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def series(self, key: str) -> list[float | None]:
        """One entry per step; None where the step has no finite number.

        Without a reference the KL to it is written as 0, and is none.
        """
        if key == "objective/kl" and self.setting("ppo.kl_coef") == 0:
            return [None] * len(self.metrics)
        return [_number(line.get(key)) for line in self.metrics]

    def keys(self, prefix: str) -> list[str]:
        """Metric names that begin with `prefix`, in order of appearance."""
        return list(dict.fromkeys(k for line in self.metrics for k in line if k.startswith(prefix)))

    @property
    def steps(self) -> list[int]:
        return [int(line["step"]) for line in self.metrics]


@dataclass(frozen=True)
class Point:
    """One or several consecutive steps of one metric."""

    mean: float
    low: float
    high: float


def load_run(folder: Path) -> Run:
    """Reads a run folder; raises ValueError where there is none or a file is broken."""
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(
            str(folder), "no metrics.jsonl in it", "give the folder of a run (run.dir)"
        )
    config_text = _text(folder / "config.yaml")
    try:
        config = yaml.safe_load(config_text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(
            str(folder / "config.yaml"), f"not YAML: {str(error).splitlines()[0]}"
        ) from error
    return Run(
        folder=folder,
        metrics=[line for line in _lines(folder / "metrics.jsonl") if "step" in line],
        samples=[line for line in _lines(folder / "samples.jsonl") if "step" in line],
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        environment=_json(folder / "environment.json"),
    )


def spans(count: int, most: int) -> list[range]:
    """`count` steps as at most `most` runs of consecutive ones, all but the last equally long."""
    width = max(1, math.ceil(count / most))
    return [range(i, min(i + width, count)) for i in range(0, count, width)]


def condense(series: list[float | None], groups: list[range]) -> list[Point | None]:
    """Mean and extremes of each group of steps; None where it has no number."""
    points = []
    for group in groups:
        known = [series[i] for i in group if series[i] is not None]
        points.append(
            Point(math.fsum(known) / len(known), min(known), max(known)) if known else None
        )
    return points


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(str(path), f"not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    # Not str.splitlines: text may hold the separators U+2028 and U+0085, which JSON leaves as is.
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return  # the run is still writing it
            raise ConfigError(f"{path}:{number}", f"not JSON: {error}") from error
        if isinstance(content, dict):
            yield content
