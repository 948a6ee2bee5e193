"""Kills the rank of another host at random moments, and tells how each job ended.

    PYTHONPATH=. python tests/cluster/kills.py [TRIES] [--seed S] [--minutes M]

Two hosts, as in test_hosts.py. A try ends a run of STEPS steps that saves every one by SIGKILL to
the second host's rank, at a moment drawn from when the ranks start to the last step, and then gives
the same command again. Right is: the rank (before ranks have met, its host) is named, nothing is
left on either host, and the run is, to the bit, that of one host which was not disturbed. The exit
status is 1 where a try was not.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.test_hosts import Hosts, lacking, one_host
from tests.tiny import job as tiny_job

STEPS, PATIENCE_S, PATIENCE_EMPTY_S = 12, 600, 60
# With a watchdog, which names the rank; so patient that a slow machine is not taken for a dead one.
SETTINGS = {"steps": STEPS, "save_every": 1, "hang_timeout_s": 600}


def outcome(run: Path) -> tuple[list[dict], list[str]]:
    """All that a finished run computed: figures, and hashes of the exported weights."""
    files = sorted(run.glob("export/*/*.safetensors"))
    return tiny_job.learned(run), [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def after_steps(run: Path, count: int, launcher) -> bool:
    """Waits for `count` lines of metrics.jsonl; False where the job ended before."""
    metrics, end = run / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        if launcher.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def killed_rank(hosts: Hosts, launcher) -> int:
    """The second host's rank, as soon as there is one."""
    while launcher.poll() is None:
        try:
            return hosts.rank(1)
        except ValueError:
            time.sleep(0.1)
    raise RuntimeError("the job ended before it had ranks")


def who_is_named(log: str) -> str:
    """The word of the table; of a rank that dies before ranks have met only the host is known."""
    if re.search(r"fault \(rank 0\): rank 1 \(pid \d+ on n1\)|rank 1 of n1 did not come", log):
        return "rank"
    return "host" if "launch: host n1 has failed" in log and "step  1/" not in log else ""


def attempt(hosts: Hosts, folder: Path, rng: random.Random, expected) -> tuple[str, bool]:
    """(a row of the table, whether all was right)."""
    job, run = tiny_job.write(folder, run=SETTINGS), folder / "run"
    steps, more = rng.randrange(STEPS - 1), rng.random() * 3
    launcher = hosts.launch(job, folder / "log")
    pid = killed_rank(hosts, launcher)
    if steps and not after_steps(run, steps, launcher):
        return f"| {steps} + {more:.1f} s | ended before it was killed | | | |", False
    time.sleep(more)
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    status = launcher.wait(PATIENCE_S)
    seconds = time.monotonic() - begun
    named = who_is_named((folder / "log").read_text())
    while not (empty := hosts.empty()) and time.monotonic() < begun + seconds + PATIENCE_EMPTY_S:
        time.sleep(1)
    done = len(tiny_job.learned(run)) if (run / "metrics.jsonl").exists() else 0
    again = hosts.launch(job, folder / "log2").wait(PATIENCE_S)
    same = again == 0 and outcome(run) == expected
    right = status == 1 and bool(named) and empty and same
    words = [named or "NO", *("yes" if is_so else "NO" for is_so in (empty, same))]
    moment = f"start + {more:.1f} s" if not steps else f"step {done}"
    return f"| {moment} | {status} | {seconds:.0f} | {' | '.join(words)} |", right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tries", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    if why := lacking():
        sys.exit(f"kills.py {why}")
    end, wrong, tried = time.monotonic() + 60 * arguments.minutes, 0, 0
    print("| killed after | status | seconds to the end | named | nothing left | then the same |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="gearshift-") as scratch:
        base = Path(scratch)
        for name in ("one", "hosts"):
            (base / name).mkdir()
        job = tiny_job.write(base / "one", run=SETTINGS)
        one_host(job, base / "one" / "run")
        expected = outcome(base / "one" / "run")
        hosts = Hosts(base / "hosts")
        try:
            while tried < arguments.tries and time.monotonic() < end:
                folder = base / f"try{tried}"
                folder.mkdir()
                rng = random.Random(arguments.seed + tried)
                row, right = attempt(hosts, folder, rng, expected)
                print(row, flush=True)
                if not right:
                    print((folder / "log").read_text()[-3000:], file=sys.stderr, flush=True)
                wrong, tried = wrong + (not right), tried + 1
        finally:
            hosts("down")
    print(f"{tried} tries, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
