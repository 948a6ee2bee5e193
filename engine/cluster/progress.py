"""What this process is doing: a phase and a counter that moves while it works.

Process-wide, as a stack trace is: the phases of a step, the pieces inside them and the sampler's
progress all note it here, and watchdog.py tells the other ranks. Noting costs two assignments.
"""

import sys
import threading
from pathlib import Path

_phase = "start"
_phases = 0
_beats = 0  # in this phase


def enter(phase: str) -> None:
    """The process begins `phase`."""
    global _phase, _phases, _beats
    _phase, _phases, _beats = phase, _phases + 1, 0


def beat() -> None:
    """A piece of the phase is done: the process is alive, however long the phase takes."""
    global _beats
    _beats += 1


def current() -> tuple[str, int, int]:
    """The phase, the number of phases so far, and the beats in this one."""
    return _phase, _phases, _beats


def main_thread_at(depth: int = 6) -> str:
    """Where the main thread is, innermost call first: "total.py:71 scores < ppo.py:90 step"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls: list[str] = []
    while frame and len(calls) < depth:
        code = frame.f_code
        calls.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(calls)
