"""What benches on several ranks share: starting them, and a model in ZeRO-3 partitions."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn


def start(part: str, args: argparse.Namespace, launcher: Sequence[str] | None = None) -> int:
    """Runs `gearshift bench PART` with the same arguments on `args.ranks` processes; returns their
    status.

    launcher: words between the interpreter and the command; none: torchrun's.
    """
    words = []
    for key, value in vars(args).items():
        if value is None or value is False or value == []:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    if launcher is None:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
        launcher = (*launcher, str(args.ranks))
    command = [sys.executable, *launcher, "-m", "gearshift.launch.cli", "bench", part, *words]
    return subprocess.run(command).returncode


def partition(model: nn.Module, dtype: str, **zero: int) -> Any:
    """A DeepSpeed engine at stage 3 around `model`, without an optimizer.

    dtype: float32 or bfloat16. zero: further keys of zero_optimization.
    """
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3} | zero,
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine
