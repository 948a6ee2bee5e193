"""Low-rank adapters on the linear layers of a module, and what they add to its weights.

A layer with an adapter computes W x + s B (A x), with A [r, in], B [out, r], and W frozen
(Hu et al. 2022). The layers are peft's (seen in 0.21), told by their attributes: a run without
adapters needs no peft.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.gearbox.spec import Spec
from gearshift.engine.zero.layout import whole_shape

TRAINED, STARTED = "default", "started"  # names of an adapter and of its frozen first state
_BASE = "base_layer."
BLOCK = 1 << 24  # elements of a weight that are merged at once: 64 MB in float32


@dataclass(frozen=True)
class Adapter:
    """One adapted layer; `weight` is W, or its transpose where `transposed` (GPT-2's Conv1D)."""

    name: str  # of the layer
    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    transposed: bool

    def add_to(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        """weight += s B A in place, summed in float32 and rounded once, for parts that fit
        together: all of W, or a rank's rows or columns of it with the same of B or A."""
        left, right = (a.t(), b.t()) if self.transposed else (b, a)
        rows = max(1, BLOCK // weight.shape[1])
        for some, factor in zip(weight.split(rows), left.split(rows), strict=True):
            summed = some.float().addmm_(factor.float(), right.float(), alpha=self.scaling)
            some.copy_(summed)

    def specs(self, cut: tuple[Spec, ...]) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
        """What each rank needs of A and of B, given its part of `weight`."""
        a, b = whole_shape(self.a), whole_shape(self.b)
        outputs = int(self.transposed)  # the dimension of weight that is B's rows
        ours = [self._specs(spec, tuple(a), tuple(b), outputs) for spec in cut]
        return tuple(spec for spec, _ in ours), tuple(spec for _, spec in ours)

    @staticmethod
    def _specs(spec: Spec, a: tuple[int, ...], b: tuple[int, ...], outputs: int):
        if spec.dim == outputs:
            return Spec.whole(a), Spec.cut(b, 0, spec.intervals)
        return Spec.cut(a, 1, spec.intervals), Spec.whole(b)


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have adapters, by their paths."""
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            yield name, layer


def adapters(module: nn.Module) -> list[Adapter]:
    """Of the trained adapter; none in a module that trains whole."""
    return [
        Adapter(
            name,
            layer.base_layer.weight,  # type: ignore[union-attr,arg-type]
            layer.lora_A[TRAINED].weight,  # type: ignore[index,union-attr]
            layer.lora_B[TRAINED].weight,  # type: ignore[index,union-attr]
            layer.scaling[TRAINED],  # type: ignore[index]
            bool(layer.fan_in_fan_out),
        )
        for name, layer in adapted_layers(module)
    ]


def plain_parameters(module: nn.Module, *, tied: bool = False) -> dict[str, nn.Parameter]:
    """The module's own parameters under the names that they have without adapters.

    tied: also the further names of a parameter that has several.
    """
    named = module.named_parameters(remove_duplicate=not tied)
    return {plain: p for name, p in named if (plain := plain_name(name))}


def plain_name(name: str) -> str | None:
    """The name that a tensor of a module has without adapters; None for those of an adapter."""
    return None if ".lora_" in name else name.replace(_BASE, "")


@contextmanager
def playing(module: nn.Module, adapter: str | None) -> Iterator[None]:
    """All layers use the adapter of this name meanwhile; None: none, so the frozen weights alone.

    Not by peft's own switch, which changes what requires a gradient: DeepSpeed has hooks on that.
    """
    layers = [layer for _, layer in adapted_layers(module)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [adapter] if adapter else []  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._active_adapter = own


def copy_layers(twin: nn.Module, source: nn.Module) -> None:
    """Gives a module without adapters those of source, on the meta device."""
    import peft

    config = copy.deepcopy(source.peft_config[TRAINED])  # type: ignore[index,union-attr]
    config.modules_to_save = None
    peft.inject_adapter_in_model(config, twin, TRAINED, low_cpu_mem_usage=True)
    twin.requires_grad_(False)


@torch.no_grad()
def fold(module: nn.Module) -> None:
    """Adds the adapters to the weights for good; the layers are plain ones again.

    For a module whose parameters are whole.
    """
    for adapter in adapters(module):
        adapter.add_to(adapter.weight.data, adapter.a, adapter.b)
        layer = module.get_submodule(adapter.name)
        module.set_submodule(adapter.name, layer.base_layer)  # type: ignore[arg-type]
