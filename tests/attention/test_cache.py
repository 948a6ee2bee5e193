import pytest
import torch
from torch import nn

from gearshift.engine.attention.cache import BlockPool, KVCache, LayerShape


def make_cache(blocks=3, block_size=4):
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    shapes = {
        layers[0]: LayerShape(key=(2, 8), value=(2, 6), dtype=torch.float32),
        layers[1]: LayerShape(key=(1, 8), value=(1, 8), dtype=torch.bfloat16),
    }
    return KVCache(shapes, blocks, block_size, torch.device("cpu")), layers


def test_blocks_are_handed_out_once_and_come_back():
    pool = BlockPool(4)
    taken = [pool.take() for _ in range(4)]
    assert sorted(taken) == [0, 1, 2, 3] and pool.free == 0
    pool.drop(taken[1:3])
    assert pool.free == 2
    assert {pool.take(), pool.take()} == set(taken[1:3])


def test_a_shared_block_is_free_when_its_last_holder_drops_it():
    pool = BlockPool(2)
    block = pool.take()
    assert not pool.shared(block)
    pool.hold([block])
    assert pool.shared(block)
    pool.drop([block])
    assert not pool.shared(block) and pool.free == 1
    pool.drop([block])
    assert pool.free == 2


def test_dropping_or_holding_a_free_block_is_our_own_fault():
    pool = BlockPool(1)
    for misuse in (pool.drop, pool.hold):
        with pytest.raises(AssertionError, match="block 0 is free"):
            misuse([0])


def test_layers_may_differ_in_shape_and_dtype():
    cache, (first, second) = make_cache()
    assert cache.layers[first].key.shape == (4, 4, 2, 8)  # the fourth block is the dummy
    assert cache.layers[first].value.shape == (4, 4, 2, 6)
    assert cache.layers[second].key.dtype == torch.bfloat16
    assert cache.dummy_block == 3
    per_token = 2 * (8 + 6) * 4 + (8 + 8) * 2
    assert cache.bytes == 4 * 4 * per_token


def test_writes_land_in_their_slots_and_nowhere_else():
    cache, (layer, _) = make_cache()
    stored = cache.layers[layer]
    key, value = torch.randn(2, 2, 8), torch.randn(2, 2, 6)
    stored.write(torch.tensor([6, 1]), key, value)
    assert torch.equal(stored.key[1, 2], key[0]) and torch.equal(stored.key[0, 1], key[1])
    assert torch.equal(stored.value[1, 2], value[0])
    stored.key[1, 2], stored.key[0, 1] = 0, 0
    assert stored.key.abs().sum() == 0


def test_blocks_are_copied_in_every_layer():
    cache, layers = make_cache()
    for layer in layers:
        cache.layers[layer].key.copy_(torch.randn_like(cache.layers[layer].key))
        cache.layers[layer].value.copy_(torch.randn_like(cache.layers[layer].value))
    before = [cache.layers[layer].key.clone() for layer in layers]
    cache.copy([(0, 2), (1, 0)])
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(cache.layers[layer].key[2], old[0])
        assert torch.equal(cache.layers[layer].value[0], cache.layers[layer].value[1])
        assert torch.equal(cache.layers[layer].key[1], old[1])
