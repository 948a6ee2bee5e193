"""A rank that dies or stalls ends the others, and is named.

Without it the others wait in a collective until its timeout, which names the collective, not who
was missing. Every rank writes what it is doing to a store that rank 0 holds and reads what the
others wrote; a rank that stands still for longer than `timeout` is to blame.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from gearshift.engine.cluster import claim, distributed, guard, progress
from gearshift.engine.cluster.rendezvous import machine

_FAULT = 1  # exit status
_LEFT = "left"  # the phase of a rank that ends in good order, or has printed its own error
_RANKS_PER_SECOND = 64  # how many ranks' worth of beats each rank reads; more ranks: more rarely
# A rank whose connection broke looks so many intervals for the one that is gone, and compares with
# what it knew after so many: what was read before may lack the last word of the one that died.
_LOOKS, _SETTLED = 6, 2.5


@dataclass(frozen=True)
class Beat:
    """What a rank announced last."""

    rank: int
    host: str
    space: str  # of process numbers
    pid: int
    phase: str
    phases: int  # of progress.py: this and the next stand still while the rank waits or hangs
    beats: int
    announced: int  # how often; stands still when the whole process does
    at: str  # where the main thread was

    @property
    def here(self) -> bool:
        return (self.host, self.space) == machine()

    @property
    def reached(self) -> tuple[int, int]:
        return self.phases, self.beats

    def dead(self) -> bool:
        """Whether the process has ended; known only of this machine's, or this container's."""
        if not self.here:
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def described(self, what: str) -> str:
        who = f"rank {self.rank} (pid {self.pid} on {self.host})"
        return f"{who} {what}; it was in {self.phase}, at {self.at}"


@dataclass
class _Seen:
    beat: Beat
    announced: float  # when `beat.announced` last changed, and
    moved: float  # when `beat.reached` did, by this process's monotonic clock


class Watchdog:
    """Two daemon threads of each rank: one reads and writes the store and may block, one judges.

    timeout: seconds that a rank may stand still. folder: of the run; the stacks of all ranks go to
    its logs/rank_00000.txt when the run is ended. World-collective to make.
    """

    def __init__(self, timeout: float, folder: Path):
        self.timeout, self.folder = timeout, folder
        self.interval = min(max(1.0, distributed.world_size() / _RANKS_PER_SECOND), timeout / 10)
        self._count, self._parent = 0, os.getppid()
        self._seen: dict[int, _Seen] = {}
        self._read_at = 0.0  # when all beats were last read
        self._blaming, self._gone = threading.Event(), threading.Event()
        self._store = _open_store()
        self._announce()
        distributed.barrier()  # everybody has announced once
        self._read_all()
        tasks = (self._exchange, self._judge)
        self._threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()
        # Later than the others name it, so that they do not find it dead instead.
        command = [sys.executable, "-P", guard.__file__, str(timeout + 3 * self.interval)]
        self._guard = None
        if distributed.world_size() > 1:
            mute = subprocess.DEVNULL
            self._guard = subprocess.Popen(command, stdin=mute, stdout=mute, stderr=mute)

    def leave(self, *, failing: bool = False) -> None:
        """Ends the watching of this rank, so that no other rank reports it as lost.

        failing: this rank ends alone, with an error that it has printed. Otherwise all ranks call
        this together, at the end of the run: then it is a collective.
        """
        self._blaming.set()
        self._gone.set()
        if self._guard:
            self._guard.kill()
            self._guard.wait()
        for thread in self._threads:
            thread.join(self.interval)
        progress.enter(_LEFT)
        if not failing:
            distributed.barrier()  # rank 0 must not take the store away while another reads it
            return
        with suppress(dist.DistError, RuntimeError):
            self._announce()
        if distributed.world_size() > 1:
            time.sleep(2 * self.interval)  # until the others have read it

    def blame(self) -> str | None:
        """Who is gone, for a rank whose connection broke; None where all left in good order.

        Takes seconds, in which the launcher may already send SIGTERM: it is not heard from here on.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._blaming.set()
        start, before = time.monotonic(), dict[int, Beat]()
        while time.monotonic() < start + _LOOKS * self.interval:
            dead = self._dead()
            if dead:
                return dead.described("died")
            if not before and time.monotonic() > start + _SETTLED * self.interval:
                before = {rank: seen.beat for rank, seen in self._seen.items()}
            time.sleep(self.interval / 4)
        silent = [
            b
            for b in self._others()
            if b.announced == before[b.rank].announced and b.phase != _LEFT
        ]
        return silent[0].described("is gone") if silent else None

    def _others(self) -> list[Beat]:
        mine = distributed.rank()
        return [seen.beat for rank, seen in sorted(self._seen.items()) if rank != mine]

    def _dead(self) -> Beat | None:
        """A rank of this machine that ended without announcing it, by the last reading."""
        dead = next((b for b in self._others() if b.phase != _LEFT and b.dead()), None)
        if dead is None or dead.rank == 0:  # with rank 0 its store is gone: no reading will come
            return dead
        since = time.monotonic()
        while self._read_at < since and time.monotonic() < since + 3 * self.interval:
            time.sleep(self.interval / 10)
        return dead if self._seen[dead.rank].beat.phase != _LEFT else None

    def _exchange(self) -> None:
        # Where rank 0 is gone, what was announced last is known.
        with suppress(dist.DistError, RuntimeError):
            while not self._gone.wait(self.interval):
                self._announce()
                self._read_all()

    def _announce(self) -> None:
        self._count += 1
        mine = [*machine(), os.getpid(), *progress.current(), self._count]
        self._store.set(_key(distributed.rank()), json.dumps([*mine, progress.main_thread_at()]))

    def _read_all(self) -> None:
        texts = self._store.multi_get([_key(rank) for rank in range(distributed.world_size())])
        now = time.monotonic()
        for rank, text in enumerate(texts):
            beat, old = Beat(rank, *json.loads(text)), self._seen.get(rank)
            announced = old.announced if old and old.beat.announced == beat.announced else now
            moved = old.moved if old and old.beat.reached == beat.reached else now
            self._seen[rank] = _Seen(beat, announced, moved)
        self._read_at = now

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._blaming.wait(self.interval):
            before, looked = looked, time.monotonic()
            if looked - before > self.timeout / 2:
                self._begin_anew(looked)
            self._follow_launcher()
            verdict = self._verdict()
            if verdict and not self._blaming.is_set():
                self._end(verdict)

    def _verdict(self) -> str | None:
        """Why the run must end, if it must."""
        dead = self._dead()
        if dead:
            return dead.described("died")
        now = time.monotonic()
        seen = [self._seen[rank] for rank in sorted(self._seen)]
        # Rank 0 first: while it is silent nothing is known of the others.
        silent = [s.beat for s in seen if now - s.announced > self.timeout]
        if silent:
            return silent[0].described(f"did not answer for {self.timeout:g} s")
        if any(now - s.moved <= self.timeout for s in seen):
            return None
        last = min(seen, key=lambda s: s.beat.reached)  # the others wait for it
        if now - last.announced > _LOOKS * self.interval / 2:
            return last.beat.described(f"did not answer for {self.timeout:g} s")
        return last.beat.described(f"made no progress for {self.timeout:g} s")

    def _begin_anew(self, now: float) -> None:
        """This process was stopped and goes on, as a suspended job does: so may all have been."""
        for seen in list(self._seen.values()):
            seen.announced = seen.moved = now

    def _write(self, verdict: str) -> Path:
        """For those who see the run folder, but not what is printed; returns where it is."""
        logs = self.folder / "logs"
        with suppress(OSError):
            logs.mkdir(parents=True, exist_ok=True)
            with (logs / f"rank_{distributed.rank():05d}.txt").open("w", encoding="utf-8") as log:
                log.write(f"{verdict}\n")
                log.flush()
                faulthandler.dump_traceback(log, all_threads=True)
        return logs

    def _end(self, verdict: str) -> None:
        logs = self._write(verdict)
        report_fault(
            f"{verdict}. Stacks are in {logs}; raise run.hang_timeout_s if it was only slow"
        )
        time.sleep(2 * self.interval)  # the launcher ends all when the first leaves: let them write
        claim.release()
        os._exit(_FAULT)

    def _follow_launcher(self) -> None:
        """A launcher that was killed leaves its ranks alone: they stop as if it had asked them to.

        A shell that ends is none: what it left in the background goes on.
        """
        if distributed.has_launcher() and os.getppid() != self._parent:
            self._parent = os.getppid()
            os.kill(os.getpid(), signal.SIGTERM)


def report_fault(message: str) -> None:
    """One line on stderr."""
    line = f"gearshift: fault (rank {distributed.rank()}): {message}"
    with suppress(OSError):  # the launcher that reads it may be gone
        print(line, file=sys.stderr, flush=True)


def _open_store() -> dist.Store:
    """Of our own: a launcher's may go before its ranks do. Held by rank 0 on any free port."""
    forever = timedelta(days=365)
    host, size = os.environ["MASTER_ADDR"], distributed.world_size()
    if distributed.is_main():
        store = dist.TCPStore(host, 0, size, True, forever, wait_for_workers=False)
        distributed.all_gather_objects(store.port)
        return store
    port = distributed.all_gather_objects(None)[0]
    return dist.TCPStore(host, port, size, False, forever, wait_for_workers=False)


def _key(rank: int) -> str:
    return f"beat/{rank}"


_running: Watchdog | None = None


def start(timeout: float, folder: Path) -> None:
    """Watches this run until `leave`; a timeout of 0 does not. World-collective."""
    global _running
    _running = Watchdog(timeout, folder) if timeout else None


def leave(*, failing: bool = False) -> None:
    """As Watchdog.leave, if there is one."""
    if _running:
        _running.leave(failing=failing)


def blame() -> str | None:
    """As Watchdog.blame, if there is one; what it says is in the run folder, too."""
    found = _running.blame() if _running else None
    if _running and found:
        _running._write(found)
    return found
