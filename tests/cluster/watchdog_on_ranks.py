"""What one rank does while another of two freezes, hangs, dies or fails; see test_watchdog.py."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from gearshift.engine.cluster import distributed, progress, watchdog


def main(folder: Path, culprit: int, fault: str) -> None:
    dist.init_process_group("gloo")
    watchdog.start(3.0, folder)
    progress.enter("generate")
    distributed.barrier()
    progress.enter("rewards")
    if distributed.rank() == culprit:
        time.sleep(1.5)  # a beat or two: where it was is then known
        FAULTS[fault]()
    else:
        progress.enter("logprobs")
    distributed.global_sum(torch.ones(1))  # the others wait here
    watchdog.leave()


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def reward_that_never_answers() -> None:
    for _ in range(25):  # longer than the timeout, but alive
        time.sleep(0.2)
        progress.beat()
    print("slow", flush=True)
    time.sleep(600)


def own_error() -> None:
    watchdog.leave(failing=True)
    print("mine", flush=True)
    os._exit(2)


def work() -> None:
    """Says when it begins, works for longer than the timeout, and says that it is done."""
    folder = Path(sys.argv[1])
    (folder / "started").touch()
    for _ in range(25):
        time.sleep(0.2)
        progress.beat()
    (folder / "done").touch()


FAULTS = {
    "work": work,
    "freeze": freeze,
    "die": die,
    "hang": reward_that_never_answers,
    "own error": own_error,
    "nothing": lambda: None,
}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except RuntimeError:
        found = watchdog.blame()
        watchdog.report_fault(found or "nobody")
        os._exit(1)
