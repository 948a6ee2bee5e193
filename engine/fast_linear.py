"""Linear layers while generating: without DeepSpeed's wrapper, by oneDNN where a few rows meet.

DeepSpeed replaces `torch.nn.functional.linear` for the whole process once a ZeRO-3 engine exists,
by an autograd function that recomputes what training must not keep. Generation has no backward and
pays for it: about an eighth of a decode step on CPU. The replacement is left in place for training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_ZERO3_WRAPPER = "deepspeed.runtime.zero.linear"
_builtin = torch._C._nn.linear
# PyTorch's fp32 products call MKL, which packs the weight anew in every call: with 4 to 64 rows
# oneDNN's took 0.5 to 0.9 times as long where the weight is large, and longer elsewhere (weights of
# 1536 x 576 and 49152 x 576, one core of a Xeon with AMX).
ONEDNN_ROWS = range(4, 65)
ONEDNN_WEIGHT = 400_000  # elements
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """nn.functional.linear without gradient, on CPU."""
    if (
        weight.numel() >= ONEDNN_WEIGHT
        and input.numel() // input.shape[-1] in ONEDNN_ROWS
        and weight.dtype == input.dtype == torch.float32
    ):
        return _onednn(input, weight, bias, "none", [], None)
    return _builtin(input, weight, bias)


@contextmanager
def fast_linear(device: torch.device) -> Iterator[None]:
    """nn.functional.linear is the fastest for inference on `device`, for the whole process.

    Put back on leaving. One that neither PyTorch nor DeepSpeed put there is left alone.
    """
    found = F.linear
    if found is not _builtin and getattr(found, "__module__", None) != _ZERO3_WRAPPER:
        yield
        return
    usable = device.type == "cpu" and _onednn is not None and torch.backends.mkldnn.is_available()
    F.linear = by_onednn if usable else _builtin
    try:
        yield
    finally:
        F.linear = found
