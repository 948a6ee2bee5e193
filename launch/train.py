"""The main job: `deepspeed launch/train.py --config FILE [--section.key value ...]`.

Runs the same under torchrun, srun, mpirun or plain python. Exit codes: 0 done, 2 the user's
mistake (one line, no traceback), 1 a fault.
"""

import logging
import os
import sys
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from gearshift.engine.cluster import claim, distributed, progress, rendezvous, watchdog
from gearshift.engine.config import check as config_check
from gearshift.engine.config import load as config_load
from gearshift.engine.config.load import Resolved

if TYPE_CHECKING:
    from gearshift.launch.session import Session
from gearshift.engine.guards import GuardStop
from gearshift.launch import exhausted, pretraining

USAGE = "usage: deepspeed launch/train.py --config FILE [--section.key value ...] [--print-config]"
# Seconds that a rank other than 0 waits before it prints an error: most errors are seen by all
# ranks, and the launcher ends the others once the first has left.
_WAIT_FOR_OTHERS_S = 10


def main(argv: list[str] | None = None) -> int:
    """Reports a user's mistake in one line; everything else keeps its traceback."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        if os.environ.get("GEARSHIFT_TRACEBACK"):
            raise
        print_mistake(" ".join(str(error).split()))
        watchdog.leave(failing=True)
        return 2
    except (GuardStop, exhausted.OutOfMemory) as stop:
        if os.environ.get("GEARSHIFT_TRACEBACK"):
            raise
        print_mistake(str(stop))
        watchdog.leave(failing=True)
        return 1
    except RuntimeError as error:
        if not distributed.peer_left(error):
            raise
        missing = watchdog.blame()
        if missing:
            watchdog.report_fault(missing)
            return 1
        time.sleep(_WAIT_FOR_OTHERS_S)
        raise
    except KeyboardInterrupt:
        return 130
    finally:
        claim.release()


def print_mistake(mistake: str) -> None:
    """One line on stderr; by rank 0 alone where all ranks see the same mistake."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(_WAIT_FOR_OTHERS_S)
        if rendezvous.another_tells():  # on another host: its launcher does not end this rank
            return
    where = f" (rank {rank} on {distributed.host()})" if rank else ""
    with suppress(OSError):  # the launcher that reads it may be gone
        print(f"gearshift: error{where}: {mistake}", file=sys.stderr, flush=True)


def run(argv: list[str]) -> int:
    path, overrides, printing = parse(argv)
    resolved = config_load.load(path, overrides)
    if printing:
        print(config_load.dump(resolved), end="")
        return 0
    config = resolved.config
    try:
        session = open_session(resolved)
        config = session.config  # with what the plan chose
        session.train()
    except torch.OutOfMemoryError as error:
        raise exhausted.explained(error, progress.current()[0], config) from error
    watchdog.leave()
    return 0


def open_session(resolved: Resolved) -> "Session":
    """A run that is ready to train, under whatever launcher; a collective over its ranks."""
    quiet_libraries()
    distributed.adopt_launcher_environment()
    if os.environ["RANK"] != "0":
        logging.getLogger("gearshift").setLevel(logging.ERROR)  # rank 0 warns for all
    if resolved.config.run.task == "critic":
        resolved = pretraining.settle(resolved)
    warned = config_check.check(resolved.config, int(os.environ["WORLD_SIZE"]))
    from gearshift.launch.session import Session  # after the cheap checks: it imports everything

    return Session(resolved, warned)


def parse(argv: list[str]) -> tuple[str | None, list[str], bool]:
    """(config file, overrides, whether to print them); a launcher's --local_rank is dropped."""
    path, printing, rest = None, False, []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            _ = value or next(words, "")
        elif name in ("--help", "-h"):
            print(f"{USAGE}\nevery key: docs/config.md")
            raise SystemExit(0)
        elif name == "--config":
            path = value or next(words, None)
            if path is None:
                raise ValueError("--config: give a YAML file")
        elif name == "--print-config":
            printing = True
        else:
            rest.append(word)
    if path is None and not rest:
        raise ValueError(f"--config: missing; {USAGE}")
    return path, rest, printing


def quiet_libraries() -> None:
    """Imports the libraries without their chatter; their own variables bring it back."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.disable(logging.WARNING)
    from deepspeed.utils import logger
    from transformers.utils.logging import disable_progress_bar

    logging.disable(logging.NOTSET)
    logger.setLevel(os.environ.get("DS_LOG_LEVEL", "ERROR").upper())
    disable_progress_bar()


if __name__ == "__main__":
    status = main()
    if status == 0:
        distributed.stop()
    sys.exit(status)
