"""Names in a profiler's trace: the phases of a step, and the pieces inside them.

While no step is profiled, a mark costs one comparison.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

PHASE = "phase "  # begins the name of a phase's range

T = TypeVar("T")
_device: torch.device | None = None  # of the step that is profiled


@contextmanager
def marking(device: torch.device) -> Iterator[None]:
    """Marks are made inside."""
    global _device
    _device = device
    try:
        yield
    finally:
        _device = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The range of a phase. It begins and ends with an idle device, so that what the phase launched
    ran inside it."""
    if _device is None:
        yield
        return
    _settle()
    with _range(f"{PHASE}{name}"):
        yield
        _settle()


def each(name: str, items: Iterable[T]) -> Iterable[T]:
    """The items; what is done with the first, until the next is asked for, is the range NAME 0."""
    return items if _device is None else _each(name, items)


def _each(name: str, items: Iterable[T]) -> Iterator[T]:
    for number, item in enumerate(items):
        with _range(f"{name} {number}"):
            yield item


@contextmanager
def _range(name: str) -> Iterator[None]:
    """A range of torch.profiler; on CUDA also of NVTX, for NVIDIA's own tools."""
    cuda = _device is not None and _device.type == "cuda"
    if cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if cuda:
            torch.cuda.nvtx.range_pop()


def _settle() -> None:
    if _device is not None and _device.type == "cuda":
        torch.cuda.synchronize(_device)
