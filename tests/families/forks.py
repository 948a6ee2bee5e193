"""Work in processes that are forked as ranks, with a limit of time."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from gearshift.engine.cluster.rendezvous import free_port

# What the others are granted once a rank has failed, before they are killed.
GRACE_S = 5.0


def forked(
    seconds: float,
    work: Callable[[], int],
    log: Path,
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
) -> list[int]:
    """The exit statuses of `work` in `ranks` processes, negative for a signal's; what is left of
    them after `seconds` is killed.

    log: takes what they print. environment: of a rank, beside what makes it one; None: this one's.
    """
    own = dict(os.environ if environment is None else environment)
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    children, end = [], time.monotonic() + seconds
    sys.stdout.flush()
    for rank in range(ranks):
        children.append(os.fork())
        if not children[-1]:
            _be_a_rank(work, log, own | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    statuses: dict[int, int] = {}
    while len(statuses) < ranks:
        for child in set(children) - statuses.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    end = min(end, time.monotonic() + GRACE_S)
        if time.monotonic() > end:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)
    return [statuses[child] for child in children]


def _be_a_rank(work: Callable[[], int], log: Path, environment: dict[str, str]) -> None:
    """Runs `work` in this process, which was forked for it; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, printed), (2, printed)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(environment)
        status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's is cleaned up twice
