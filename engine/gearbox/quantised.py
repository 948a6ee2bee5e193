"""Frozen linear layers whose weights are kept in 4 bit, as under QLoRA (Dettmers et al. 2023).

Each 64 elements of a weight that lie together are their largest magnitude times one of the 16
values of NF4, and the magnitudes are quantised to 8 bit in turn. Kernels and format are of
bitsandbytes (seen in 0.50), on CUDA and on CPUs; a run without such layers needs no bitsandbytes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
# Of an element: 4 bit, 8 bit of a block's magnitude, 32 bit for 256 magnitudes.
BYTES = 0.5 + 1 / BLOCK + 4 / (256 * BLOCK)


class Linear4bit(nn.Linear):
    """A linear layer without gradients of its weight, which is whole until `pack`.

    weight: then [out * in / 2, 1] uint8, two elements a byte; what else belongs to it is in
    `state`, of bitsandbytes. The product is of the input's dtype and sums as PyTorch's.
    rounds: dtype to which the weight is rounded before.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        state: Any = None,
        rounds: torch.dtype | None = None,
    ):
        super().__init__(1, 1, bias=False, device="meta")
        self.weight, self.bias, self.state, self._rounds = weight, bias, state, rounds
        self.out_features, self.in_features = weight.shape if state is None else state.shape

    @torch.no_grad()
    def pack(self) -> None:
        """Quantises the weight, on the GPU where there is one; nothing where that is done."""
        if self.state is not None:
            return
        from bitsandbytes.functional import quantize_4bit

        weight = self.weight.cuda() if torch.cuda.is_available() else self.weight
        values = weight.data.to(self._rounds or weight.dtype).to(weight.dtype)
        packed, self.state = quantize_4bit(
            values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)

    def whole(self) -> Tensor:
        """[out, in], dequantised, in the dtype that it had."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.data, self.state)

    @property
    def magnitudes(self) -> list[Tensor]:
        """What grows with the weight beside it."""
        return [self.state.absmax, self.state.state2.absmax]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.weight, bias=self.bias, quant_state=self.state)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.state is not None:
            self.state.to(self.weight.device)
        return self


def packed_layers(module: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    """The layers in 4 bit, by the paths that they have without adapters."""
    for name, layer in module.named_modules():
        if isinstance(layer, Linear4bit):
            yield name.removesuffix(".base_layer"), layer


def share_layers(twin: nn.Module, source: nn.Module) -> None:
    """Gives a module on the meta device layers in 4 bit where source has them. Magnitudes are
    shared; weights, on meta, are for a shift to fill."""
    for name, layer in packed_layers(source):
        own = twin.get_submodule(name)
        weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)
        twin.set_submodule(name, Linear4bit(weight, own.bias, layer.state))  # type: ignore[arg-type]
