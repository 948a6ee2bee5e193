"""Test-wide set-up. Runs before any kernel is imported."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels then run on CPU tensors, in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from gearshift.kernels import kl_gae

    kl_gae.SCAN_BLOCK = 64  # the interpreter scans in a loop of Python, a millisecond an element

SHARE_A_RUN = tuple(f"checkpoint/test_{name}.py" for name in ("save", "export", "resume"))

torch.set_num_threads(1)  # threads of tiny models only contend on a small machine


@cache
def _starts_processes(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return any(word in text for word in ("subprocess", "on_ranks", "crash("))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process takes whole files, whose cases share models and ranks; these three share a run."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return "one run" if scope.endswith(SHARE_A_RUN) else scope

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list) -> None:
    """Files whose cases start processes, and wait for them, come first, the one of hosts before
    all: what is left to the end is short, and both test processes have work until then."""
    items.sort(
        key=lambda item: (item.path.name != "test_hosts.py", not _starts_processes(item.path))
    )
