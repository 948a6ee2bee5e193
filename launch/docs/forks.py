"""Work in processes of its own, as ranks, with limits of time and memory."""

import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

MEMORY = 6 << 30  # bytes that a process may have of its own
GRACE_S = 8.0  # for the others, once a rank has failed


def forked(
    seconds: float, work: Callable[[], int], folder: Path, ranks: int = 1
) -> tuple[list[int], str]:
    """(exit statuses, what was printed) of `work` in `ranks` processes, ended after `seconds`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    children, end = [], time.monotonic() + seconds
    log = folder / "log"
    log.unlink(missing_ok=True)
    sys.stdout.flush()
    for rank in range(ranks):
        children.append(os.fork())
        if not children[-1]:
            be_a_rank(work, folder, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    statuses: dict[int, int] = {}
    while len(statuses) < ranks:
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
                end = min(end, time.monotonic() + GRACE_S) if statuses[child] else end
        if time.monotonic() > end:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[child] for child in children], log.read_text(errors="replace")


def be_a_rank(work: Callable[[], int], folder: Path, place: dict[str, str]) -> None:
    """Runs `work` in this process, which was forked for it; never returns."""
    status = 1
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.environ |= place
        os.chdir(folder)
        status = work()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
