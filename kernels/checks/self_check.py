"""The kernels prove themselves on this machine's GPU before a run relies on them.

Every op that Triton would compute is run once on small fresh inputs, forward and backward, against
float64 (case.py). A driver, compiler or architecture that gets one of them wrong then stops
the run in seconds and by name, not in a loss curve a day later.
"""

import os
import time

import torch

from gearshift.kernels import dispatch
from gearshift.kernels.checks import attention as check_attention
from gearshift.kernels.checks import head as check_head
from gearshift.kernels.checks import optimizer as check_optimizer
from gearshift.kernels.checks import tokens as check_tokens
from gearshift.kernels.checks.case import Case, Size, verify

CASES: tuple[Case, ...] = (
    check_head.CASES + check_tokens.CASES + check_attention.CASES + check_optimizer.CASES
)

# Odd sizes: a vocabulary that no block divides, responses over a block of 1024, two chunks of rows,
# and rows enough in each that a program goes through a row alone.
SMALL = Size(
    rows=1800, hidden=64, vocab=5003, batch=6, response=1100, context=200, logits_bytes=24 << 20
)
SEED = 20260


def self_check(device: torch.device, size: Size = SMALL) -> str | None:
    """Checks all ops on `device`; returns a line for the console.

    None where nothing was checked: PyTorch computes the ops (no GPU, or GEARSHIFT_KERNELS=torch),
    or GEARSHIFT_SELF_CHECK=0. Takes about a second once the kernels are compiled; leaves torch's
    own random generators alone. Raises RuntimeError naming an op that is wrong or does not run.
    """
    if os.environ.get("GEARSHIFT_SELF_CHECK") == "0":
        return None
    if dispatch.resolve("auto", device) == "torch":
        return None
    started = time.perf_counter()
    generator = torch.Generator(device).manual_seed(SEED)
    for case in CASES:
        problem = _problem(case, size, generator)
        if problem:
            raise RuntimeError(
                f"kernel {case.name} failed its check on {_name(device)}: {problem}. Set "
                "GEARSHIFT_KERNELS=torch to train without Triton kernels, and report it"
            )
    seconds = time.perf_counter() - started
    return f"kernels: {len(CASES)} checks passed on {_name(device)} in {seconds:.1f} s"


def _problem(case: Case, size: Size, generator: torch.Generator) -> str | None:
    try:
        return verify(case, size, torch.bfloat16, generator, "triton")[1]
    except Exception as error:  # of the compiler or the driver: which op it was must be said
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
