"""Ending a run early but whole: by a signal, or before its time on the machine is up."""

import os
import re
import signal
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
# What ranks agree on is a number: the highest that any of them has.
REASONS = ("", "run.save_by", "the file `stop`", *SIGNALS)


class Interrupt:
    """Knows whether the run should end after the step that is under way.

    Between `listen` and `restore`, a signal out of SIGNALS asks for that, and so does the deadline;
    a second SIGINT raises KeyboardInterrupt at once. deadline: Unix time by which the last step
    must have ended, or None.
    announce: whether this rank prints that it was asked. request: a file that asks for it by being
    there, for those whom no signal reaches; `listen` and `restore` remove it.
    """

    def __init__(self, deadline: float | None, *, announce: bool, request: Path | None = None):
        self.deadline, self.announce, self.request = deadline, announce, request
        self._asked = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Takes over the signals of this process; only its main thread can."""
        self._forget()
        for name in SIGNALS:
            number = getattr(signal, name)
            self._before[number] = signal.signal(number, self._hear)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._forget()

    def _forget(self) -> None:
        if self.request:
            self.request.unlink(missing_ok=True)

    def reason(self, step_s: float) -> int:
        """Index into REASONS; 0: go on. step_s: seconds that the next step may take."""
        if not self._asked and self.request and self.request.exists():
            self._asked = REASONS.index("the file `stop`")
        if self._asked:
            return self._asked
        late = self.deadline is not None and time.time() + step_s > self.deadline
        return REASONS.index("run.save_by") if late else 0

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        if self.announce and not self._asked:
            # Not print: the signal may have come in the middle of one. The launcher may be gone.
            with suppress(OSError):
                os.write(2, f"{name}: ending after this step, with a checkpoint\n".encode())
        self._asked = max(self._asked, REASONS.index(name))


def agree_on_deadline(save_by: str | None) -> float | None:
    """The earliest deadline that a rank knows, on all of them. A collective; raises ConfigError.

    Not every rank needs to know one: deepspeed passes no variable of Slurm's to other nodes.
    """
    known = distributed.all_gather_objects(parse_deadline(save_by, time.time()))
    deadline = min((at for at in known if at is not None), default=None)
    if save_by is not None and deadline is None:
        problem, fix = "SLURM_JOB_END_TIME is not set", "give a time, as 08:00"
        raise ConfigError("run.save_by", problem, fix, repr(save_by))
    return deadline


def parse_deadline(save_by: str | None, now: float) -> float | None:
    """Unix time of run.save_by: "2026-11-23 08:00", "08:00" (the next one) or "slurm-10".

    Local time; "slurm-10" is ten minutes before the end of the Slurm job, None where Slurm has not
    told this process. Raises ConfigError.
    """
    if save_by is None:
        return None
    minutes = re.fullmatch(r"slurm-(\d+(?:\.\d+)?)", save_by)
    if minutes:
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        return int(end) - 60 * float(minutes[1]) if end.isdigit() else None
    today = datetime.fromtimestamp(now)
    try:
        if re.fullmatch(r"\d\d?:\d\d", save_by):
            clock = datetime.strptime(save_by, "%H:%M").time()
            when = datetime.combine(today, clock)
            return (when if when > today else when + timedelta(days=1)).timestamp()
        return datetime.fromisoformat(save_by).timestamp()
    except ValueError:
        fix = "write 08:00, 2026-11-23 08:00 or slurm-10"
        raise ConfigError("run.save_by", "not a time", fix, repr(save_by)) from None
