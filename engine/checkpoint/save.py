"""Saving a run while it goes on, and taking it up again exactly where it was.

A checkpoint is a folder `step_000020` with one safetensors file per rank and trained role, and
JSON for everything else; docs/checkpoints.md lists them. Ranks tell by files that their part is
written, so the threads that write need no collective.
"""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gearshift.engine.checkpoint import state as run_state
from gearshift.engine.checkpoint import store
from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.memory import free_memory
from gearshift.engine.phase import Phase
from gearshift.engine.ppo import PPOTrainer
from gearshift.engine.zero import state as zero_state

# For every rank's part. A rank that died ends the job sooner, and one that failed says so.
PEERS_TIMEOUT_S = 3600.0
# The same where the run is ended by a fault: their parts are as large as ours, which is written.
_PEERS_GRACE_S = 120.0
# Of the host memory that is free, what a copy of the state may take.
_COPY_SHARE = 0.5

Tensors = tuple[dict[str, torch.Tensor], dict[str, list[int]]]  # by key; (start, count) by name


@dataclass
class Job:
    """One rank's part of one checkpoint: the tensors of each file, and plain values by file."""

    target: Path
    tensors: dict[str, Tensors]
    values: dict[str, Any]
    summary: dict[str, Any]  # for the manifest
    copied: bool = False  # the tensors are copies, which a thread may write
    cancelled: threading.Event = field(default_factory=threading.Event)
    written: Future | None = None  # None, or why not
    published: Future | None = None  # the same, of the whole checkpoint; on rank 0


class Checkpoints:
    """A run's checkpoints: `take` one when a step is done, `publish` it when the step is logged.

    All methods are collectives, but `publish`, `failed` and `wait`. A checkpoint that cannot be
    written is told of once, dropped, and leaves `retry` set; the run goes on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        background: bool,
        by: str = store.REWARD,
        about: Mapping[str, Any] | None = None,
        tell: Callable[[str], None] = print,
    ):
        """keep: how many of the last stay, besides the one whose figure `by` is the highest.

        background: copy the state to host memory where it fits, and let a thread write it.
        about: plain values to save along: configuration, versions. tell: says a warning.
        """
        self.folder, self.keep, self.background, self.by = folder, keep, background, by
        self.about, self.tell = dict(about or {}), tell
        self.retry = False
        self._job: Job | None = None
        self._failing = self._told_of_memory = False

    def take(
        self, trainer: PPOTrainer, stateful: Mapping[str, Any], reward: float | None = None
    ) -> None:
        """Takes the state of this moment, after the checkpoint before is on the disk.

        stateful: whatever else has a state_dict of plain values: the data streams.
        reward: the figure `by` of this step, for keeping the best.
        """
        self.settle()
        target = store.step_folder(self.folder, trainer.steps_done)
        refused = _anywhere(_attempt(_make_room, target) if distributed.is_main() else None)
        if refused:
            self._give_up(target, refused)
            return
        self.retry = False
        self._job = job = self._gather(target, trainer, stateful, reward)
        if self.background and self._fits(job):
            job.copied = True
            for name, (views, places) in job.tensors.items():
                job.tensors[name] = _copied(views), places
            job.written = _in_thread(_write_part, job)
            return
        job.written = _at_once(_write_part, job)
        if _anywhere(job.written.result()):
            self.settle()

    def publish(self) -> None:
        """Lets what was taken become a checkpoint, as soon as every rank has written its part.

        Called after every step; it does nothing where none was taken since.
        """
        job = self._job
        if job is None or job.published is not None or not distributed.is_main():
            return
        job.published = (_in_thread if job.copied else _at_once)(self._finish, job)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint under way cannot be written."""
        stages = (self._job.written, self._job.published) if self._job else ()
        return any(stage is not None and stage.done() and stage.result() for stage in stages)

    def settle(self) -> None:
        """Waits for the checkpoint under way."""
        job, self._job = self._job, None
        if job is None:
            return
        assert job.written, "taken without being written"
        reason = _anywhere(job.written.result())
        if reason:
            job.cancelled.set()
        own = job.published.result() if job.published else None
        reason = reason or _anywhere(own)
        if reason:
            self._give_up(job.target, reason)
        else:
            self._failing = False

    def wait(self) -> None:
        """Waits for what this rank does for the checkpoint under way, well or not.

        No collective: for a run that is ended by a fault, so that what was taken is not lost.
        """
        job = self._job
        if job is None or job.written is None:
            return
        if job.written.exception() or job.written.result():
            return
        if job.published is not None:
            with suppress(TimeoutError):
                job.published.exception(_PEERS_GRACE_S)

    def _gather(
        self,
        target: Path,
        trainer: PPOTrainer,
        stateful: Mapping[str, Any],
        reward: float | None,
    ) -> Job:
        rank = f"rank{distributed.rank():04d}"
        roles = run_state.trained(trainer)
        tensors = {
            f"{name}.{rank}.safetensors": zero_state.tensors(role.engine)
            for name, role in roles.items()
        }
        values = {f"random.{rank}.json": run_state.random_state()}
        state = run_state.collect(trainer, stateful)
        if distributed.is_main():
            values["state.json"] = state | {"about": self.about}
        summary = {
            "step": trainer.steps_done,
            "world_size": distributed.world_size(),
            "roles": list(roles),
            "reward": reward,
            "reward_is": self.by,
        }
        return Job(target, tensors, values, summary)

    def _fits(self, job: Job) -> bool:
        """Whether every rank's copy of its state fits into the memory that its host has free."""
        need = sum(t.nbytes for views, _ in job.tensors.values() for t in views.values())
        free = free_memory() / distributed.ranks_per_node()
        lacking = distributed.global_max(torch.tensor(int(need > _COPY_SHARE * free)))
        if lacking and not self._told_of_memory:
            self._told_of_memory = True
            self.tell(
                f"run.async_save: no room for a copy of the training state ({need / 1e9:.1f} GB a "
                f"rank, {free / 1e9:.1f} GB free); checkpoints are written while the run waits"
            )
        return not lacking

    def _finish(self, job: Job) -> None:
        """On rank 0: joins the parts of all ranks to a checkpoint, and deletes old ones."""
        source = store.partial(job.target)
        parts = [_part(source, rank) for rank in range(distributed.world_size())]
        store.await_files(parts, job.cancelled.is_set, PEERS_TIMEOUT_S)
        files: dict[str, Any] = {}
        for part in parts:
            files |= json.loads(part.read_bytes())
            part.unlink()
        store.publish(job.target, job.summary | {"files": files})
        store.prune(self.folder, self.keep, self.by)

    def _give_up(self, target: Path, reason: str) -> None:
        if distributed.is_main():
            shutil.rmtree(store.partial(target), ignore_errors=True)
        self.retry = True
        if not self._failing:  # the next steps try again, and would say so every time
            self.tell(f"checkpoint {target.name} not written, the run goes on: {reason}")
        self._failing = True


def load(checkpoint: Path, trainer: PPOTrainer, stateful: Mapping[str, Any]) -> list[str]:
    """Restores a checkpoint that `resume.choose` found whole; returns remarks. A collective.

    Raises ValueError where it is of other models, data or another optimizer.
    """
    state = json.loads((checkpoint / "state.json").read_bytes())
    try:
        run_state.check_roles(state, trainer)
        run_state.restore(state, trainer, stateful)
        for name, role in run_state.trained(trainer).items():
            files = sorted(checkpoint.glob(f"{name}.rank*.safetensors"))
            zero_state.load(role.engine, role.schedule, state["roles"][name], files)
            # It makes moments on the device, which may not hold those of both roles.
            trainer.residence.enter(Phase.LOAD)
    except ValueError as error:  # they name what differs, we add the checkpoint
        raise ValueError(f"run.resume={str(checkpoint)!r}: {error}") from None
    saved, here = state["world_size"], distributed.world_size()
    if saved == here:
        own = checkpoint / f"random.rank{distributed.rank():04d}.json"
        run_state.restore_random(json.loads(own.read_bytes()))
        return []
    distributed.seed_everything(trainer.config.run.seed * 1_000_003 + trainer.steps_done)
    return [
        f"saved by {saved} ranks, taken up by {here}: weights, optimizers and data positions are "
        "exact, random generators are seeded anew"
    ]


def _write_part(job: Job) -> None:
    """This rank's files, then the list of them, which says that they are on the disk."""
    source, written = store.partial(job.target), {}
    for name in list(job.tensors):
        tensors, places = job.tensors.pop(name)  # a copy's memory is free until the next one
        written[name] = store.write_tensors(source / name, tensors, places)
    for name, value in job.values.items():
        written[name] = store.write_json(source / name, value)
    store.replace_json(_part(source, distributed.rank()), written)


def _part(source: Path, rank: int) -> Path:
    return source / f"part.rank{rank:04d}.json"


def _make_room(target: Path) -> None:
    for left in target.parent.glob("step_*.partial"):  # of a run that was killed
        shutil.rmtree(left)
    store.partial(target).mkdir(parents=True)


def _copied(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: view.to("cpu", copy=True) for key, view in views.items()}


def _anywhere(error: str | None) -> str | None:
    """The first rank's error, on every rank."""
    errors = enumerate(distributed.all_gather_objects(error))
    return next((f"rank {rank}: {found}" for rank, found in errors if found), None)


def _attempt(work: Callable, *arguments: Any) -> str | None:
    """Does it; returns what the disk had against it."""
    try:
        work(*arguments)
    except OSError as error:
        return str(error)
    return None


def _at_once(work: Callable, *arguments: Any) -> Future:
    done: Future = Future()
    done.set_result(_attempt(work, *arguments))
    return done


def _in_thread(work: Callable, *arguments: Any) -> Future:
    """A thread that does not outlive the run, as one of a pool would."""
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(_attempt(work, *arguments))
        except BaseException as error:  # raised again where the result is asked for
            done.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return done
