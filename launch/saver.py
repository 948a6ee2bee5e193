"""When a run saves, and when it ends before its last step."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gearshift.engine.checkpoint import store
from gearshift.engine.checkpoint.save import Checkpoints
from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.interrupt import REASONS, Interrupt
from gearshift.engine.config.schema import RunConfig
from gearshift.engine.guards import GuardStop
from gearshift.engine.ppo import PPOTrainer
from gearshift.launch.console import Console

# Errors after which a checkpoint that is being written can still become whole: these are raised
# while every rank is alive. Where a rank has died, its part of the checkpoint would never come.
_OWN_FAULTS = (ValueError, OSError, GuardStop, torch.OutOfMemoryError)


class Saver:
    """Takes the checkpoints of a run and ends it early on a signal or a deadline.

    A context manager around the training loop: inside it, a signal (SIGINT, SIGTERM, SIGUSR1) ends
    the run after the current step instead of at once. Which steps are saved is in `run`:
    save_every, save_minutes, save_last. Where an error ends the loop, leaving the context first
    waits for the checkpoint that is being written.

    ended: why the run is to end after this step, or None; the same on every rank.
    """

    def __init__(
        self,
        run: RunConfig,
        trainer: PPOTrainer,
        stateful: Mapping[str, Any],
        about: Mapping[str, Any],
        console: Console,
        deadline: float | None = None,
        best_by: str | None = None,
    ):
        """deadline: Unix time by which the last step must have ended.

        best_by: figure of evaluations whose best checkpoint stays; a step that has it is saved.
        None: the best by reward stays.
        """
        self.best_by, self._eval_s = best_by, 0.0
        self.run, self.trainer, self.stateful = run, trainer, stateful
        self.checkpoints = Checkpoints(
            Path(run.dir) / "checkpoints",
            keep=run.keep_checkpoints,
            background=run.async_save,
            by=best_by or store.REWARD,
            about=about,
            tell=console.warn,
        )
        main = distributed.is_main()
        request = Path(run.dir) / "stop" if main else None
        self.interrupt = Interrupt(deadline, announce=main, request=request)
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

    def after_step(self, figures: dict[str, float], *, last: bool) -> None:
        """Saves a checkpoint where one is due, and adds its seconds to `figures`. A collective.

        last: whether the run ends with this step.

        The caller then writes the step's log line, then calls `publish`, which makes the checkpoint
        visible: a run that resumes from it finds every log line up to its step.
        """
        reason, due, failed = self._agree(figures, last)
        self.ended = REASONS[reason] or None
        if failed:
            self.checkpoints.settle()
        if not (due or self.ended or self.checkpoints.retry):
            return
        start = time.perf_counter()
        reward = figures.get(self.checkpoints.by, math.nan)
        kept = reward if math.isfinite(reward) else None
        self.checkpoints.take(self.trainer, self.stateful, kept)
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

    def _agree(self, figures: Mapping[str, float], last: bool) -> tuple[int, bool, bool]:
        """(why to end, whether to save, whether a checkpoint failed), the same on every rank."""
        now = time.monotonic()
        spent = figures.get("timing_s/eval", 0.0)
        self._eval_s = max(self._eval_s, spent)
        # The next step may evaluate, though this one did not.
        reason = self.interrupt.reason(now - self._stepped_at - spent + self._eval_s)
        self._stepped_at = now
        due = self._due(now) or self.best_by in figures or last and self.run.save_last
        words = torch.tensor([reason, due, self.checkpoints.failed], dtype=torch.int32)
        reason, due, failed = distributed.global_max(words).tolist()
        return reason, bool(due), bool(failed)

    def _due(self, now: float) -> bool:
        run, step = self.run, self.trainer.steps_done
        late = run.save_minutes and now - self._saved_at >= 60 * run.save_minutes
        return bool((run.save_every and step % run.save_every == 0) or late)
