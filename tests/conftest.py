"""Test-wide set-up. Runs before any kernel is imported."""

import os
from functools import cache
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Triton kernels then run on CPU tensors, in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from gearshift.kernels import kl_gae

    kl_gae.SCAN_BLOCK = 64  # the interpreter scans in a loop of Python, a millisecond an element

torch.set_num_threads(1)  # threads of tiny models only contend on a small machine


@cache
def _starts_processes(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return any(word in text for word in ("subprocess", "on_ranks", "crash("))


def pytest_collection_modifyitems(items: list) -> None:
    """Files whose cases start processes, and wait for them, come first, the one of hosts before
    all: what is left to the end is short, and both test processes have work until then."""
    items.sort(
        key=lambda item: (item.path.name != "test_hosts.py", not _starts_processes(item.path))
    )
