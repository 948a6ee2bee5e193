"""When a run saves, and when it ends before its last step."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gearshift.engine.checkpoint.save import Checkpoints
from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.interrupt import REASONS, Interrupt
from gearshift.engine.config.schema import RunConfig
from gearshift.engine.guards import GuardStop
from gearshift.engine.ppo import PPOTrainer
from gearshift.launch.console import Console

# What ends a run while its ranks are all there: of a rank that is gone no part would come.
_OWN_FAULTS = (ValueError, OSError, GuardStop, torch.OutOfMemoryError)


class Saver:
    """Saves as `run` says while it is open; signals then end the run after a step.

    A fault that ends the run lets a checkpoint under way reach the disk first.

    ended: why the run is to end early, None while it is not; the same on every rank.
    """

    def __init__(
        self,
        run: RunConfig,
        trainer: PPOTrainer,
        stateful: Mapping[str, Any],
        about: Mapping[str, Any],
        console: Console,
        deadline: float | None = None,
    ):
        """deadline: Unix time by which the last step must have ended."""
        self.run, self.trainer, self.stateful = run, trainer, stateful
        self.checkpoints = Checkpoints(
            Path(run.dir) / "checkpoints",
            keep=run.keep_checkpoints,
            background=run.async_save,
            about=about,
            tell=console.warn,
        )
        self.interrupt = Interrupt(deadline, announce=distributed.is_main())
        self.ended: str | None = None
        self._saved_at = self._stepped_at = time.monotonic()

    def __enter__(self) -> "Saver":
        self.interrupt.listen()
        self._saved_at = self._stepped_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, _OWN_FAULTS):
            self.checkpoints.wait()
        self.interrupt.restore()

    def after_step(self, figures: dict[str, float]) -> None:
        """Takes a checkpoint where one is due, and puts its seconds into `figures`. A collective.

        The log is to be written next, then `publish` called: a run that goes on from a checkpoint
        finds every line up to it.
        """
        reason, due, failed = self._agree()
        self.ended = REASONS[reason] or None
        if failed:
            self.checkpoints.settle()
        if not (due or self.ended or self.checkpoints.retry):
            return
        start = time.perf_counter()
        self.checkpoints.take(self.trainer, self.stateful, _finite(figures))
        self._saved_at = time.monotonic()
        figures["timing_s/checkpoint"] = time.perf_counter() - start

    def publish(self) -> None:
        self.checkpoints.publish()

    def finish(self, *, stopping: bool) -> None:
        """Waits until the last checkpoint is on the disk; one that failed is tried once more.

        Not where a guard is `stopping` the run: what it would save now is the step that it stops.
        """
        self.checkpoints.settle()
        if self.checkpoints.retry and not stopping:
            self.checkpoints.take(self.trainer, self.stateful)
            self.checkpoints.publish()
            self.checkpoints.settle()

    def _agree(self) -> tuple[int, bool, bool]:
        """(why to end, whether to save, whether a checkpoint failed), the same on every rank."""
        now = time.monotonic()
        reason = self.interrupt.reason(now - self._stepped_at)
        self._stepped_at = now
        words = torch.tensor([reason, self._due(now), self.checkpoints.failed], dtype=torch.int32)
        reason, due, failed = distributed.global_max(words).tolist()
        return reason, bool(due), bool(failed)

    def _due(self, now: float) -> bool:
        run, step = self.run, self.trainer.steps_done
        late = run.save_minutes and now - self._saved_at >= 60 * run.save_minutes
        last = run.save_last and step == run.steps
        return bool(last or (run.save_every and step % run.save_every == 0) or late)


def _finite(figures: Mapping[str, float]) -> float | None:
    reward = figures.get("objective/rlhf_reward", math.nan)
    return reward if math.isfinite(reward) else None
