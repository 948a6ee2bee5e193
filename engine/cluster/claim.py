"""A run's hold on its folder: one run at a time, in a folder that every rank sees.

The hold is a lease of filelock's: a file that rank 0 touches every few seconds. A run that was
killed lets go at once where its process can be seen to be gone, and elsewhere within a lease.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError, refuse_if

LOCK, HOLDER = "lock", "lock.json"
_LEASE_S, _BEAT_S = 30.0, 1.0
_SIGHT_S = 10.0  # until a new file is seen by all hosts of a network file system

_held: tuple[SoftFileLease, list[Path]] | None = None  # on rank 0; with the folders it made


def take(folder: Path) -> bool:
    """Holds `folder` until `release`; returns whether it is new. A collective; raises ConfigError.

    Refused where another run holds it, and where a rank does not see what rank 0 writes there.
    """
    global _held
    mine: tuple[str, bool] | ConfigError | None = None
    if distributed.is_main():
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lease = _acquire(folder)
            _held = lease, made
            mine = str(lease.token), bool(made)
        except ConfigError as error:
            mine = error
        except OSError as error:
            why = f"cannot be written: {error.strerror or error}"
            mine = ConfigError("run.dir", why, "choose another folder", repr(str(folder)))
    answer = distributed.all_gather_objects(mine)[0]
    if isinstance(answer, ConfigError):
        raise answer
    token, new = answer
    seen = distributed.all_gather_objects((distributed.host(), _sees(folder / LOCK, token)))
    blind = next((host for host, sees in seen if not sees), None)
    problem = f"{blind} does not see what {seen[0][0]} writes there"
    fix = "use a folder of a file system that all hosts share"
    refuse_if(blind, "run.dir", problem, fix, repr(str(folder)))
    return new


def release() -> None:
    """Lets go, if this process holds a folder; one that it made and nothing was put in is gone."""
    global _held
    if _held is None:
        return
    (lease, made), _held = _held, None
    with suppress(OSError):
        Path(lease.lock_file).with_name(HOLDER).unlink()
    lease.release()
    with suppress(OSError):
        for path in made:
            path.rmdir()


def _acquire(folder: Path) -> SoftFileLease:
    lease = SoftFileLease(
        folder / LOCK,
        lease_duration=_LEASE_S,
        heartbeat_interval=_BEAT_S,
        on_compromise=_lost,
        thread_local=False,  # the watchdog's thread may release it
    )
    touched = _touched(folder)
    while not lease.is_locked:
        try:
            lease.acquire(timeout=3 * _BEAT_S)
        except Timeout:
            now = _touched(folder)
            if None not in (touched, now) and now != touched:  # its holder lives
                raise _refusal(folder) from None
            touched = now
    me = {"host": distributed.host(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    (folder / HOLDER).write_text(json.dumps(me) + "\n")
    return lease


def _touched(folder: Path) -> int | None:
    with suppress(OSError):
        return (folder / LOCK).stat().st_mtime_ns
    return None


def _refusal(folder: Path) -> ConfigError:
    who = "another run"
    with suppress(OSError, ValueError, KeyError):
        holder = json.loads((folder / HOLDER).read_bytes())
        who = f"pid {holder['pid']} on {holder['host']}, since {holder['since']}"
    fix = f"end that run or choose another folder; a dead run's hold is over after {_LEASE_S:g} s"
    return ConfigError("run.dir", f"is in use by {who}", fix, repr(str(folder)))


def _sees(lock: Path, token: str) -> bool:
    deadline = time.monotonic() + _SIGHT_S
    while True:
        with suppress(OSError):
            os.listdir(lock.parent)  # network file systems keep what was not there in mind
            if token in lock.read_text():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _lost(loss) -> None:
    """This process stood still for longer than a lease, and another run took the folder."""
    if loss.reason == "owner-changed":
        os.write(2, b"gearshift: fault: another run took the run folder over; this one ends\n")
        os._exit(1)
