"""Linear layers while generating: PyTorch's own, narrow ones together, and a head of fp32 logits.

DeepSpeed replaces `torch.nn.functional.linear` for the whole process once a ZeRO-3 engine exists,
by an autograd function that recomputes what training must not keep. Generation has no backward and
pays for it: about an eighth of a decode step on CPU. The replacement is left in place for training.

A 16-bit head would round its logits, where training keeps them in fp32 (kernels/head): log-probs of
the two gears would differ by more than their hidden states explain.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.engine.gearbox.adapters import adapted_layers
from gearshift.kernels.head.projection import fp32_logits

_ZERO3_WRAPPER = "deepspeed.runtime.zero.linear"
# oneDNN's product is a sixth faster where 4 to 64 rows meet a vocabulary of 49,152, and was taken
# out again: its one running sum puts 1.4e-5 between a log-prob of SmolLM2-135M and float64, where
# MKL's partial sums put 0.6e-5, and rollout log-probs are held to 1e-5 of `generate`'s.
_builtin = torch._C._nn.linear
# Bytes of the weights of a group up to which one product of all is worth a copy of them. What is
# larger keeps a GPU busy by itself: q, k and v of a 7B model, 33 MB, take 25 us at 64 rows, where
# their bytes take 8; gate and up, 136 MB each, 36 where theirs take 32 (one H200).
NARROW = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that read the same input one after the other: q, k and v, say."""

    weights: list[Tensor]
    biases: list[Tensor]  # empty, or one of each
    weight: Tensor  # all of them, one below the other
    bias: Tensor | None

    def refresh(self) -> None:
        """Takes the layers' weights as they are now."""
        torch.cat(self.weights, out=self.weight)
        if self.bias is not None:
            torch.cat(self.biases, out=self.bias)

    @property
    def sizes(self) -> list[int]:
        return [len(weight) for weight in self.weights]


class Products:
    """What computes the linear layers of one generating module.

    grouped: layers that a probe saw reading the same input become one product, from a copy of their
    weights. Its results may differ from theirs in the last bit. Not where adapters are beside the
    weights: what reads the input of a layer next is its own adapter.
    """

    def __init__(self, module: nn.Module, *, grouped: bool):
        self.grouped = grouped and not any(adapted_layers(module))
        head = module.get_output_embeddings().weight
        self._wide_head = head if head.dtype in (torch.float16, torch.bfloat16) else None
        self._seen: list[tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._runs: list[list[tuple[Tensor, Tensor | None]]] = []
        self._groups: dict[int, Group] = {}  # by the id of each of its weights
        self._input: Tensor | None = None  # of the last group, while it has parts left
        self._version = 0  # of its values
        self._parts: dict[int, Tensor] = {}  # by weight: what its layer has not asked for yet

    @property
    def needed(self) -> bool:
        """Whether PyTorch's own would not do."""
        return self.grouped or self._wide_head is not None

    @property
    def nbytes(self) -> int:
        """Of the copies held now."""
        return sum(group.weight.nbytes for group in self._distinct())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A forward inside shows which layers read the same input."""
        self._seen = []
        try:
            yield
            self._runs = _runs(self._seen) if self.grouped else []
        finally:
            self._seen = None

    def refresh(self) -> None:
        """Takes the weights as they are now; makes room for them where there is none."""
        if not self._groups:
            for run in self._runs:
                group = _group(run)
                self._groups |= dict.fromkeys(map(id, group.weights), group)
        for group in self._distinct():
            group.refresh()

    def release(self) -> None:
        """Gives the memory of the copies back."""
        self._groups.clear()
        self._parts.clear()
        self._input = None

    def _distinct(self) -> list[Group]:
        return list({id(group): group for group in self._groups.values()}.values())

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._seen is not None:
            self._seen.append((x, weight, bias))
        if weight is self._wide_head:
            return fp32_logits(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
        if id(weight) not in self._groups:
            return _builtin(x, weight, bias)
        fresh = self._version != x._version or x is not self._input
        if fresh or id(weight) not in self._parts:
            group = self._groups[id(weight)]
            parts = _builtin(x, group.weight, group.bias).split(group.sizes, -1)
            self._parts = dict(zip(map(id, group.weights), parts, strict=True))
            self._input, self._version = x, x._version
        part = self._parts.pop(id(weight))
        self._input = self._input if self._parts else None
        return part


@contextmanager
def generation_linear(module: nn.Module, products: Products | None = None) -> Iterator[None]:
    """nn.functional.linear is PyTorch's own, for the whole process, or `products` where the module
    has a head of 16 bits or layers to group.

    Put back on leaving. One that neither PyTorch nor DeepSpeed put there is left alone.
    """
    products = products or Products(module, grouped=False)
    found = F.linear
    if found is _builtin or getattr(found, "__module__", None) == _ZERO3_WRAPPER:
        F.linear = products if products.needed else _builtin  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear = found


def _runs(
    seen: list[tuple[Tensor, Tensor, Tensor | None]],
) -> list[list[tuple[Tensor, Tensor | None]]]:
    """Weights and biases of consecutive layers with one input, where a product of all gains."""
    runs = []
    for _, calls in groupby(seen, key=lambda call: id(call[0])):
        run = [(weight, bias) for _, weight, bias in calls]
        weights, biased = [weight for weight, _ in run], [bias is not None for _, bias in run]
        alike = len({(w.dtype, w.device, w.shape[1:]) for w in weights}) == 1
        once = len(set(map(id, weights))) == len(weights) and len(set(biased)) == 1
        once &= all(isinstance(weight, nn.Parameter) for weight in weights)
        if len(run) > 1 and alike and once and sum(w.nbytes for w in weights) <= NARROW:
            runs.append(run)
    return runs


def _group(run: list[tuple[Tensor, Tensor | None]]) -> Group:
    weights, biases = [w for w, _ in run], [bias for _, bias in run if bias is not None]
    rows, first = sum(map(len, weights)), weights[0]
    return Group(
        weights=weights,
        biases=biases,
        weight=torch.empty(rows, first.shape[1], dtype=first.dtype, device=first.device),
        bias=torch.empty(rows, dtype=biases[0].dtype, device=first.device) if biases else None,
    )
