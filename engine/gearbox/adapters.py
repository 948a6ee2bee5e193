"""Low-rank adapters on the linear layers of a module, and what they add to its weights.

A layer with an adapter computes W x + s B (A x), with A [r, in], B [out, r], and W frozen
(Hu et al. 2022); under DoRA each row of W + s B A is then scaled to a trained length (Liu et al.
2024). The layers are peft's (seen in 0.19 and 0.21), told by their attributes: a run without
adapters needs no peft.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.gearbox.spec import Spec
from gearshift.engine.zero.layout import whole_shape

TRAINED, STARTED = "default", "started"  # names of an adapter and of its frozen first state
_BASE = "base_layer."
LEAST = 1e-12  # of a row's length, by which is divided: a row of zeros stays one
BLOCK = 1 << 24  # elements of a weight that are merged at once: 64 MB in float32


@dataclass(frozen=True)
class Adapter:
    """One adapted layer; `weight` is W, or its transpose where `transposed` (GPT-2's Conv1D).

    m: [out], the lengths of the rows under DoRA.
    """

    name: str  # of the layer
    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    transposed: bool
    m: nn.Parameter | None = None

    @property
    def parts(self) -> tuple[nn.Parameter, ...]:
        """A, B and, where there is one, m."""
        return (self.a, self.b) if self.m is None else (self.a, self.b, self.m)

    def add_to(
        self, weight: Tensor, parts: Sequence[Tensor], group: dist.ProcessGroup | None = None
    ) -> None:
        """weight += s B A in place, and its rows then of lengths m, computed in float32 and rounded
        once, for parts that fit together: all of W, or a rank's rows of it with the same of B and
        m, or its columns with the same of A. group: see row_norms."""
        a, b, *m = parts
        whole, first = (weight, a, b, self.scaling, self.transposed), 0
        scale = m[0].float() / row_norms(*whole, group).float() if m else None
        for some, summed in _sums(*whole):
            if scale is not None:
                rows = slice(first, first := first + len(some))
                summed *= scale if self.transposed else scale[rows, None]
            some.copy_(summed)

    def specs(self, cut: tuple[Spec, ...]) -> list[tuple[Spec, ...]]:
        """What each rank needs of each of `parts`, given its part of `weight`."""
        shapes = [tuple(whole_shape(part)) for part in self.parts]
        return list(zip(*(self._specs(spec, *shapes) for spec in cut), strict=True))

    def _specs(self, spec: Spec, a: tuple[int, ...], *by_rows: tuple[int, ...]) -> list[Spec]:
        if spec.dim == int(self.transposed):  # the dimension of weight that is B's rows
            return [Spec.whole(a), *(Spec.cut(shape, 0, spec.intervals) for shape in by_rows)]
        return [Spec.cut(a, 1, spec.intervals), *map(Spec.whole, by_rows)]


def _sums(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of some rows of `weight` after another, and what they are with s B A, in float32."""
    left, right = (a.t(), b.t()) if transposed else (b, a)
    rows = max(1, BLOCK // weight.shape[1])
    for some, factor in zip(weight.split(rows), left.split(rows), strict=True):
        own = some.to(torch.float32, copy=True)
        yield some, own.addmm_(factor.float(), right.float(), alpha=scaling)


def row_norms(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    transposed: bool,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[out]: lengths of the rows of W + s B A, which is made in float32, in weight's dtype.

    Squares are summed in float64: a GPU and a CPU, and any cut, then round to the same lengths, so
    a magnitude that starts as these is 1 times them to the bit. group: of the ranks that have the
    other columns of W and of A; it is then a collective.
    """
    side = int(not transposed)
    parts = [
        summed.square_().sum(side, dtype=torch.float64)
        for _, summed in _sums(weight, a, b, scaling, transposed)
    ]
    squares = torch.stack(parts).sum(0) if transposed else torch.cat(parts)
    if group is not None:
        dist.all_reduce(squares, group=group)
    return squares.sqrt().clamp_min(LEAST).to(weight.dtype)


class Magnitude(nn.Module):
    """m of a layer under DoRA (Liu et al. 2024), which computes m (W + s B A) x / |W + s B A|: the
    length of each row is a constant in the gradient (section 4.3).

    weight: [out]. peft calls it in the place of its own (tuners/lora/dora.py), and it computes the
    same, dropout included, without an identity matrix of [in, in] and W + s B A whole in every
    forward, and keeps half as much for backward.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, device="meta"))

    def forward(
        self, layer: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """x: [..., in]. result: [..., out], W x and the bias. Returns [..., out]."""
        a, b = layer.lora_A[active_adapter], layer.lora_B[active_adapter]
        dropout, base = layer.lora_dropout[active_adapter], layer.base_layer
        scaling, plain = layer.scaling[active_adapter], result
        if isinstance(dropout, nn.Dropout) and dropout.training:
            x = dropout(x)
            plain = base(x)
        if base.bias is not None:
            plain = plain - base.bias
        with torch.no_grad():
            whole = base.weight, a.weight, b.weight, scaling, layer.fan_in_fan_out
            norms = row_norms(*whole).float()
        # Less 1 before it is rounded: in bf16 a factor near 1 has steps of 0.4 to 0.8 %.
        beyond = (self.weight.float() / norms - 1).to(x.dtype)
        lift = b(a(x)) * scaling
        return result + lift + beyond * (plain + lift)


def add_magnitude(layer: Any, adapter: str) -> None:
    """Makes an adapter one of DoRA; m is without values."""
    made = Magnitude(layer.lora_B[adapter].weight.shape[0])
    layer.lora_magnitude_vector[adapter] = layer.lora_variant[adapter] = made


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
            layer.lora_magnitude_vector[TRAINED].weight if layer.lora_magnitude_vector else None,
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
        adapter.add_to(adapter.weight.data, adapter.parts)
        layer = module.get_submodule(adapter.name)
        module.set_submodule(adapter.name, layer.base_layer)  # type: ignore[arg-type]
