"""The paged key-value cache: which blocks are whose, and the tensors they index.

A block holds `block_size` consecutive tokens of one sequence, in every layer at the same index
(Kwon et al. 2023, PagedAttention). Samples of one prompt share its blocks by reference count; the
first that writes into a shared block gets a copy of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CPU_CACHE_GB = 1.0
# Of the free GPU memory; the rest is for the activations of a prefill and for the logits.
GPU_CACHE_SHARE = 0.9


class BlockPool:
    """Free blocks and reference counts, on the host; knows nothing of tensors."""

    def __init__(self, blocks: int):
        self.size = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._references = [0] * blocks

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """One free block, held once. The caller has checked that there is one."""
        block = self._free.pop()
        self._references[block] = 1
        return block

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder of each block."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """One holder less of each block; a block without holders is free again."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def shared(self, block: int) -> bool:
        return self._references[block] > 1


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer keeps per token, as seen in its first forward."""

    key: tuple[int, int]  # key-value heads, head size
    value: tuple[int, int]  # the same for values: MLA's differ from the keys'
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's blocks, and the same memory token by token."""

    key: Tensor  # [blocks, block_size, heads, head size]
    value: Tensor  # [blocks, block_size, heads, head size of values]
    key_tokens: Tensor  # [blocks * block_size, heads, head size]
    value_tokens: Tensor  # [blocks * block_size, heads, head size of values]

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores key and value [n, heads, head size] at slots [n] int64 (block * size + offset)."""
        self.key_tokens.index_copy_(0, slots, key)
        self.value_tokens.index_copy_(0, slots, value)


class KVCache:
    """The blocks of all layers.

    One block beyond `blocks` exists: padding rows of CUDA graphs write there.
    """

    def __init__(
        self,
        shapes: dict[nn.Module, LayerShape],
        blocks: int,
        block_size: int,
        device: torch.device,
    ):
        self.blocks, self.block_size, self.device = blocks, block_size, device
        self.dummy_block = blocks
        self.layers = {layer: self._allocate(shape) for layer, shape in shapes.items()}

    def _allocate(self, shape: LayerShape) -> LayerCache:
        size = (self.blocks + 1, self.block_size)
        # Zeros where a kernel reads past a sequence's end: 0 * garbage must not become NaN.
        key = torch.zeros(*size, *shape.key, dtype=shape.dtype, device=self.device)
        value = torch.zeros(*size, *shape.value, dtype=shape.dtype, device=self.device)
        return LayerCache(
            key=key, value=value, key_tokens=key.flatten(0, 1), value_tokens=value.flatten(0, 1)
        )

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks (source, destination) in every layer."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.device).unbind(1)
        for layer in self.layers.values():
            layer.key[target] = layer.key[source]
            layer.value[target] = layer.value[source]

    @property
    def bytes(self) -> int:
        return sum(cache.key.nbytes + cache.value.nbytes for cache in self.layers.values())
