"""How `gearshift bench kernels` takes time and memory: interleaved, beside measured ceilings."""

import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Run = Callable[[], object]

CPU_SECONDS = 0.2  # of repetitions per visit, and at least three of them
DRIFT = 0.03  # two visits, or two calibrations, further apart than this are not one machine


class Timing(NamedTuple):
    """Milliseconds: median, 20th and 80th percentile of all repetitions of both visits; drift is
    how far the two visits' medians lie apart, relative to the smaller."""

    median: float
    low: float
    high: float
    drift: float
    repetitions: int


class Ceiling(NamedTuple):
    """What this machine reached: a copy (bytes read + bytes written), a matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def drift(self, later: "Ceiling") -> float:
        """The larger relative difference of the two rates."""
        return max(abs(b / a - 1) for a, b in zip(self, later, strict=True))


def interleaved(runs: dict[str, Run], device: torch.device) -> dict[str, Timing]:
    """Times all runs in the order A B C C B A, after a warm-up of each."""
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for order in (list(runs), list(runs)[::-1]):
        for name in order:
            samples[name].append(repetitions(runs[name], device))
    return {name: summary(*visits) for name, visits in samples.items()}


def repetitions(run: Run, device: torch.device) -> list[float]:
    """Milliseconds of each repetition: device events with a flushed L2 cache on a GPU, CPU time of
    this process elsewhere (the wall clock of a busy machine measures its neighbours)."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=250, return_mode="all")
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1e3 * CPU_SECONDS:
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    return times


def summary(first: list[float], second: list[float]) -> Timing:
    medians = [statistics.median(visit) for visit in (first, second)]
    times = sorted(first + second)
    low, high = (times[min(len(times) - 1, int(len(times) * share))] for share in (0.2, 0.8))
    smallest = max(min(medians), 1e-9)
    drift = (max(medians) - min(medians)) / smallest
    return Timing(statistics.median(times), low, high, drift, len(times))


def peak_extra_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory in use while `run` ran, results included, above what was in use before.

    The allocator's own count on a GPU. Resident pages of the process elsewhere; None where the
    system does not let a process start their peak anew (proc(5), clear_refs).
    """
    gc.collect()
    if device.type != "cuda":
        return _resident_growth(run, device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident_growth(run: Run, device: torch.device) -> int | None:
    # Not above: the GPU check times kernels where psutil and numpy may be missing.
    from gearshift.engine.metrics import peak_can_be_reset, peak_memory, reset_peak_memory

    if not peak_can_be_reset():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # pages kept from earlier runs would hide those of this one
    reset_peak_memory(device)
    before = peak_memory(device)
    run()
    return round(1e9 * (peak_memory(device) - before))


def calibrate(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Best of the repetitions, on random data: products of zeros run faster than real ones."""
    cuda = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    source = torch.empty((1 << 30 if cuda else 1 << 24), dtype=torch.float32, device=device)
    source.uniform_(generator=generator)
    target = torch.empty_like(source)
    copy = min(repetitions(functools.partial(target.copy_, source), device))
    bytes_moved = 2 * source.nbytes
    del source, target
    side = 8192 if cuda else 512
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = min(repetitions(functools.partial(torch.mm, a, b), device))
    return Ceiling(1e3 * bytes_moved / copy, 1e3 * 2 * side**3 / product)
