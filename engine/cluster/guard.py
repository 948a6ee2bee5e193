"""Ends the process that started it where somebody has stopped that one: `python guard.py SECONDS`.

A stopped rank is deaf to SIGTERM, and only its own machine can send it SIGKILL. Its launcher there
would wait for it for ever, and with that the whole job. It counts its own looks, not seconds: in a
job that is suspended as a whole the guard does not look either.
"""

import os
import sys
import time

import psutil

_LOOK_S = 1.0


def main(patience: float) -> None:
    guarded, looks = psutil.Process(os.getppid()), 0
    while os.getppid() == guarded.pid and looks * _LOOK_S < patience:
        time.sleep(_LOOK_S)
        looks = looks + 1 if guarded.status() == psutil.STATUS_STOPPED else 0
    if os.getppid() == guarded.pid:
        guarded.kill()


if __name__ == "__main__":
    main(float(sys.argv[1]))
