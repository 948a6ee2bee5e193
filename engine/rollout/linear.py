"""Linear layers while generating: PyTorch's own, without DeepSpeed's wrapper.

DeepSpeed replaces `torch.nn.functional.linear` for the whole process once a ZeRO-3 engine exists,
by an autograd function that recomputes what training must not keep. Generation has no backward and
pays for it: about an eighth of a decode step on CPU. The replacement is left in place for training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

_ZERO3_WRAPPER = "deepspeed.runtime.zero.linear"
# oneDNN's product is a sixth faster where 4 to 64 rows meet a vocabulary of 49,152, and was taken
# out again: its one running sum puts 1.4e-5 between a log-prob of SmolLM2-135M and float64, where
# MKL's partial sums put 0.6e-5, and rollout log-probs are held to 1e-5 of `generate`'s.
_builtin = torch._C._nn.linear


@contextmanager
def fast_linear() -> Iterator[None]:
    """nn.functional.linear is PyTorch's own, for the whole process.

    Put back on leaving. One that neither PyTorch nor DeepSpeed put there is left alone.
    """
    found = F.linear
    if getattr(found, "__module__", None) == _ZERO3_WRAPPER:
        F.linear = _builtin
    try:
        yield
    finally:
        F.linear = found
