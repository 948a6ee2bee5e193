"""Experiment trackers by name: tensorboard, wandb, trackio. Imported only when asked for."""

import importlib.util
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import RunConfig


class Tracker(Protocol):
    """Where a step's figures also go."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError for a package that is missing, before any model is loaded."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            problem = f"{name!r} is not installed: pip install {name}"
            raise ConfigError("run.trackers", problem)


def open_trackers(
    config: RunConfig, settings: Mapping[str, Any], first_step: int
) -> "list[Tracker]":
    """Opens each of `config.trackers`.

    settings: the whole resolved configuration, for the trackers' own pages.
    first_step: the step that is logged next; a resumed run goes on in the same tracker run.
    """
    check_trackers(config.trackers)
    folder = Path(config.dir)
    opened: list[Tracker] = []
    for name in config.trackers:
        if name == "tensorboard":
            opened.append(_TensorBoard(folder, first_step))
        else:
            opened.append(_Online(name, folder, config.tracker_project, settings))
    return opened


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Without NaN and infinities, which the trackers' charts and JSON do not know."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a run that is resumed from an earlier step had logged after it.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in finite(figures).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Online:
    """wandb, and trackio, which shares its interface. The run folder's name is the run's."""

    def __init__(self, name: str, folder: Path, project: str, settings: Mapping[str, Any]):
        module = importlib.import_module(name)
        options: dict[str, Any] = {"project": project, "config": dict(settings)}
        run_id = _run_id(folder)
        if name == "wandb":
            options |= {"id": run_id, "name": folder.name, "dir": str(folder)}
        else:
            options["name"] = f"{folder.name}-{run_id}"  # by which trackio finds a run again
        self._run = module.init(resume="allow", **options)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(finite(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path) -> str:
    """What tells this run from others of its name; kept in the folder for a resumed one."""
    file = folder / "tracker_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()
