"""Linear layers while generating: PyTorch's own, and a head of fp32 logits.

DeepSpeed replaces `torch.nn.functional.linear` for the whole process once a ZeRO-3 engine exists,
by an autograd function that recomputes what training must not keep. Generation has no backward and
pays for it: about an eighth of a decode step on CPU. The replacement is left in place for training.

A 16-bit head would round its logits, where training keeps them in fp32 (kernels/head): log-probs of
the two gears would differ by more than their hidden states explain.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.kernels.head.projection import fp32_logits

_ZERO3_WRAPPER = "deepspeed.runtime.zero.linear"
# oneDNN's product is a sixth faster where 4 to 64 rows meet a vocabulary of 49,152, and was taken
# out again: its one running sum puts 1.4e-5 between a log-prob of SmolLM2-135M and float64, where
# MKL's partial sums put 0.6e-5, and rollout log-probs are held to 1e-5 of `generate`'s.
_builtin = torch._C._nn.linear


@contextmanager
def generation_linear(module: nn.Module) -> Iterator[None]:
    """nn.functional.linear is PyTorch's own, for the whole process, but for the module's head where
    that is of 16 bits: it gives fp32.

    Put back on leaving. One that neither PyTorch nor DeepSpeed put there is left alone.
    """
    found = F.linear
    ours = found is _builtin or getattr(found, "__module__", None) == _ZERO3_WRAPPER
    if ours:
        F.linear = _with_wide_head(module) if _is_half(module) else _builtin
    try:
        yield
    finally:
        F.linear = found


def _is_half(module: nn.Module) -> bool:
    return module.get_output_embeddings().weight.dtype in (torch.float16, torch.bfloat16)


def _with_wide_head(module: nn.Module):
    head = module.get_output_embeddings().weight

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is not head:
            return _builtin(x, weight, bias)
        return fp32_logits(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])

    return linear
