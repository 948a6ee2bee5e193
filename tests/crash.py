"""Kills a two-rank run again and again and holds what is left of it to an uninterrupted one.

    PYTHONPATH=. python tests/crash.py [KILLS] [--seed S] [--keep FOLDER]

Ranks get SIGKILL at random moments and at planted ones: during generation and scoring, between
optimizer steps, inside the writing of a checkpoint, around its renames, and while an old one is
deleted. Every life goes on from the newest checkpoint; a run that reaches its last step must have
the metrics.jsonl and the weights, moments and random numbers of the uninterrupted one, bit for bit.
Ranks are forked from this process, which has imported everything, so a kill costs seconds.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gearshift.engine import roles
from gearshift.engine.checkpoint import store
from gearshift.launch import session, train
from tests.tiny import job as tiny_job
from tests.tiny.on_ranks import free_port

RANKS, STEPS, LIFE_S = 2, 6, 300.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: object, name: str, count: int, act: Callable[[], None]) -> None:
    """Does `act` at the start of the `count`-th call of owner.name."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **named):
        calls[0] += 1
        if calls[0] == count:
            act()
        return original(*arguments, **named)

    setattr(owner, name, counted)


def soon(draw: random.Random) -> Callable[[], None]:
    """Dies a few milliseconds later, in the midst of what was called."""
    delay = draw.uniform(0.0, 0.03)
    return lambda: threading.Timer(delay, die).start()


def half_written(draw: random.Random) -> None:
    """Dies with a part of some file of a checkpoint written."""
    skip = draw.randrange(6)

    def torn(head, blocks, original=store._after):
        nonlocal skip
        for block in original(head, blocks):
            yield block[: len(block) // 2] if not skip else block
            if not skip:
                die()
        skip -= 1

    store._after = torn


def at_rename(draw: random.Random) -> None:
    """Dies just before or after a file or a folder gets its name."""
    count, after = draw.randrange(1, 9), draw.random() < 0.5
    original = os.replace

    def renamed(source, target):
        nonlocal count
        count -= 1
        if not count and not after:
            die()
        original(source, target)
        if not count:
            die()

    os.replace = renamed


# What is planted in one rank before it starts. "any time" is the parent's.
MOMENTS: dict[str, Callable[[random.Random], None]] = {
    "generation": lambda d: on_call(roles.Actor, "generate", d.randrange(1, 4), soon(d)),
    "scoring": lambda d: on_call(roles.Actor, "logprobs", d.randrange(1, 4), soon(d)),
    "between optimizer steps": lambda d: on_call(roles.Trained, "step", d.randrange(2, 9), die),
    "writing a checkpoint": half_written,
    "reaching the disk": lambda d: on_call(os, "fsync", d.randrange(1, 20), die),
    "renaming": at_rename,
    "deleting": lambda d: on_call(shutil, "rmtree", d.randrange(1, 4), die),
    "any time": lambda d: None,
}


@dataclass
class Tally:
    """What happened so far. kills: by moment. behind: resumed runs that lost a whole checkpoint."""

    kills: dict[str, int] = field(default_factory=dict)
    lives: int = 0
    finished: int = 0
    differing: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.kills.values())


def rank_main(rank: int, port: str, arguments: list[str], log: Path) -> None:
    """A forked rank: the main job, as a launcher would start it."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    status = 1
    try:
        status = train.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(status)


def live(folder: Path, moment: str | None, draw: random.Random) -> str:
    """Starts the run in `folder`/run, logs to `folder`; returns "finished" or "killed".

    moment: where one rank dies, None: nowhere. Raises RuntimeError where the run itself fails.
    """
    port, victim = free_port(), draw.randrange(RANKS)
    folder.mkdir(exist_ok=True)
    for log in folder.glob("rank*.log"):
        log.unlink()
    arguments = ["--config", str(folder.parent / "run.yaml"), "--run.dir", str(folder / "run")]
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            if moment and rank == victim:
                MOMENTS[moment](draw)
            rank_main(rank, port, arguments, folder / f"rank{rank}.log")
        children.append(child)
    at = time.monotonic() + draw.uniform(1.0, 6.0) if moment == "any time" else None
    return await_end(children, children[victim], at, folder)


def await_end(children: list[int], victim: int, at: float | None, folder: Path) -> str:
    """Waits for both ranks; kills the victim at time `at`, and a rank whose peer is gone."""
    alive, codes, end = set(children), {}, time.monotonic() + LIFE_S
    while alive:
        for child in list(alive):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                alive.discard(child)
                codes[child] = os.waitstatus_to_exitcode(status)
        gone = next((c for c in children if codes.get(c, 0) != 0), None)
        late = time.monotonic() > end
        if alive and at is not None and time.monotonic() > at:
            os.kill(victim, signal.SIGKILL)
            at = None
        if gone or late:
            for child in alive:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
        if late:
            raise RuntimeError(f"a life of more than {LIFE_S:.0f} s; see {folder}")
    if codes[victim] == -signal.SIGKILL:
        return "killed"
    if any(codes.values()):
        raise RuntimeError(f"ranks ended with {list(codes.values())}; see {folder}/rank*.log")
    return "finished"


def facts(run: Path) -> tuple[list[dict], dict[str, str]]:
    """metrics.jsonl without clocks and memory, and the checksums of the last checkpoint's files."""
    last = store.steps(run / "checkpoints")[-1]
    files = store.read_manifest(last)["files"]
    assert last.name == f"step_{STEPS:06d}"
    kept = {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}
    return tiny_job.learned(run), kept


def newest(run: Path) -> str:
    found = store.steps(run / "checkpoints")
    return found[-1].name if found else ""


def resumed(folder: Path) -> str:
    """The checkpoint that the last life in `folder` went on from, as it said; "" if it did not."""
    told = (folder / "rank0.log").read_text().splitlines()
    from_ = [line for line in told if line.startswith("resumed from")]
    return Path(from_[-1]).name if from_ else ""


def torture(home: Path, kills: int, seed: int, changes: dict[str, dict]) -> Tally:
    """Kills `kills` times, then lets the last run finish. changes: keys of the run, by section."""
    draw, tally = random.Random(seed), Tally()
    settings = {"steps": STEPS, "save_every": 1, "export": False, "seed": seed}
    sections = {role: {"deepspeed": f"{role}_zero3.json"} for role in ("actor", "critic")}
    sections |= {"run": settings, "ppo": {"kl_controller": "adaptive"}}
    for section, keys in changes.items():
        sections.setdefault(section, {}).update(keys)
    tiny_job.write(home, **sections)
    assert live(home / "whole", None, draw) == "finished"
    expected = facts(home / "whole" / "run")
    while True:
        folder = home / f"run{tally.finished}"
        before = newest(folder / "run")
        moment = pick(tally, draw) if tally.total < kills else None
        ended = live(folder, moment, draw)
        tally.lives += 1
        if resumed(folder) not in ("", before):
            tally.behind.append(f"{folder.name}: from {resumed(folder)}, not {before}")
        if ended == "killed":
            tally.kills[moment] = tally.kills.get(moment, 0) + 1
            continue
        if facts(folder / "run") != expected:
            tally.differing.append(folder.name)
        tally.finished += 1
        if moment is None:
            return tally


def pick(tally: Tally, draw: random.Random) -> str:
    """A moment that has had the fewest kills."""
    fewest = min(tally.kills.get(moment, 0) for moment in MOMENTS)
    return draw.choice([m for m in MOMENTS if tally.kills.get(m, 0) == fewest])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="work there and leave everything")
    parser.add_argument("--changes", metavar="JSON", default="{}", help="keys by section")
    args = parser.parse_args(argv)
    assert session.Session  # imported for the ranks, which are forked from here
    train.quiet_libraries()
    start = time.monotonic()
    home = Path(args.keep or tempfile.mkdtemp(prefix="gearshift-crash-"))
    home.mkdir(parents=True, exist_ok=True)
    tally = torture(home, args.kills, args.seed, json.loads(args.changes))
    result = vars(tally) | {"killed": tally.total, "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(result))
    failed = bool(tally.differing or tally.behind)
    if not (failed or args.keep):
        shutil.rmtree(home)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
