"""Scores with a reference on disk under a limit that is smaller than its weights.

    python spill_on_ranks.py OUT MODEL

OUT/disk holds the weights. OUT/rank0.jsonl: bytes of the weights, of the limit on what this process
may add, of the most that it added, and of what it read; and what loading into memory said.
"""

import json
import resource
import sys
import threading
from pathlib import Path

import torch

from gearshift.engine.cluster import distributed
from tests.models.load_on_ranks import PeakMemory
from tests.streaming.engine_on_ranks import engine_of, scores

LIMIT = 100e6  # bytes of data that the process may add


def data_bytes() -> int:
    """What RLIMIT_DATA counts: private memory that can be written, in use or not."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmData" in x)
    return int(line.split()[1]) * 1024


def main(out: Path, model: Path) -> None:
    threading.stack_size(2**20)  # the limit counts whole stacks
    distributed.start(1)
    expected = scores(engine_of(model, "policy", "device", out / "disk"), "policy", 3)
    watch = PeakMemory()
    watch.start()
    engine = engine_of(model, "policy", "disk", out / "disk")
    # Only now: the limit would count the checkpoint's file, which is mapped while it is read.
    limit = int(data_bytes() + LIMIT)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    error = max(float((scores(engine, "policy", 3) - expected).abs().max()) for _ in range(3))
    row = {
        "whole": sum(part.nbytes for guest in engine.guests for part in guest.parts),
        "limit": LIMIT,
        "peak": watch.stop(),
        "read": engine.store.bytes_read,
        "passes": engine.traffic.passes,
        "error": error,
    }
    try:
        engine_of(model, "policy", "host", out / "disk")
    except RuntimeError as refused:
        row["in memory"] = str(refused)
    (out / "rank0.jsonl").write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main(*map(Path, sys.argv[1:]))
