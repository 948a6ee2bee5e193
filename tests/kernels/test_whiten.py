"""python -m pytest tests/kernels/test_whiten.py"""

import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from gearshift.kernels.whiten import whiten


def expected(x, mask, shift_mean=True):
    live = x.double()[mask]
    y = (live - live.mean()) / (live.var(unbiased=True) + 1e-8).sqrt()
    out = torch.zeros_like(x, dtype=torch.float64)
    out[mask] = y if shift_mean else y + live.mean()
    return out


def make(B, R, seed):
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(B, R, generator=g) + 5 + seed
    return x, torch.rand(B, R, generator=g) < 0.6


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (3, 1025)])
def test_matches_float64(shape, shift_mean):
    x, mask = make(*shape, seed=0)
    got = whiten(x, mask, shift_mean=shift_mean)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected(x, mask, shift_mean), rtol=1e-6, atol=1e-6)


def test_masked_rubbish_changes_nothing():
    x, mask = make(3, 20, seed=1)
    dirty = torch.where(mask, x, torch.tensor(math.nan))
    dirty[0, (~mask[0]).nonzero()[0]] = math.inf
    assert torch.equal(whiten(x, mask), whiten(dirty, mask))
    assert torch.all(whiten(dirty, mask)[~mask] == 0)


def test_degenerate_counts():
    x = torch.full((2, 3), 7.5)
    none = torch.zeros(2, 3, dtype=torch.bool)
    one = none.clone()
    one[1, 1] = True
    assert torch.equal(whiten(x, none), torch.zeros(2, 3))
    assert torch.equal(whiten(x, one), torch.zeros(2, 3))
    assert whiten(x, one, shift_mean=False)[1, 1] == 7.5
    assert whiten(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


def test_constant_values_are_not_noise():
    """0.9 is not a float32: a rounded mean would whiten its own error to order 1."""
    x = torch.full((64, 999), 900.9)
    assert torch.equal(whiten(x, torch.ones_like(x, dtype=torch.bool)), torch.zeros_like(x))


def test_large_mean_keeps_its_variance():
    x, mask = make(4, 500, seed=2)
    x = x + 1e4
    torch.testing.assert_close(whiten(x, mask).double(), expected(x, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "x, mask, told",
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, 4, dtype=torch.bool),
            r"^x has shape \[2, 3\]: must be \[2, 4\]",
        ),
        (torch.zeros(2, 3), torch.ones(2, 3), "^mask is torch.float32: must be torch.bool"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 3, dtype=torch.bool),
            "^x is torch.int64",
        ),
    ],
)
def test_bad_input_is_named(x, mask, told):
    with pytest.raises(ValueError, match=told):
        whiten(x, mask)


def test_two_devices_are_named():
    with pytest.raises(ValueError, match="mask is on meta, the others are on cpu"):
        whiten(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool, device="meta"))


SHARDS = [(3, 5, 3), (2, 9, 4)]  # B, R, seed of each rank: ranks differ in shape


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, mask = make(*SHARDS[rank])
    empty_on_one = mask & (rank == 0)
    out = [
        whiten(x, mask, group=dist.group.WORLD),
        whiten(x, mask, group=dist.group.WORLD, shift_mean=False),
        whiten(x, empty_on_one, group=dist.group.WORLD),
        whiten(x, mask),
    ]
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(r), str(tmp_path)]) for r in (0, 1)]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    got = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    x, mask = zip(*(make(*shard) for shard in SHARDS), strict=True)
    flat = [torch.cat([part.flatten() for part in parts])[None] for parts in (x, mask)]
    for case, shift_mean in ((0, True), (1, False)):
        together = torch.cat([got[r][case].flatten() for r in (0, 1)])[None]
        torch.testing.assert_close(
            together, expected(*flat, shift_mean).float(), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(got[0][2], whiten(x[0], mask[0]))
    assert torch.equal(got[1][2], torch.zeros_like(x[1]))
    assert torch.equal(got[1][3], whiten(x[1], mask[1]))  # no group: this process alone


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
