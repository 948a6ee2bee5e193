"""Chunks of rows, skipping of rows without a gradient, and on which device a kernel runs."""

import dataclasses

import pytest
import torch

from gearshift.kernels import dispatch
from gearshift.kernels.head.projection import Head, LogitGradient, move_live_rows_up_
from gearshift.kernels.head.scores import LogitMap


def test_chunks_are_equal_and_within_the_budget():
    weight = torch.zeros(1003, 8)
    head = Head.build(
        weight[:1], weight, None, LogitMap(1.0), max_logits_bytes=1024 * 4 * 50 + 1, backend="torch"
    )
    sizes = [chunk.stop - chunk.start for chunk in head.chunks(101)]
    assert sizes == [34, 34, 33]
    assert head.chunks(50) == [slice(0, 50)]


def test_gradients_of_all_logits_are_kept_where_they_fit(monkeypatch):
    """The head of a 7B model at 2 GiB, in bytes alone: [V, H] of 152064 x 3584 in bf16."""
    weight = torch.empty(152064, 3584, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(Head, "gemm_dtype", torch.bfloat16)  # as on a GPU
    head = Head(weight, None, LogitMap(1.0), "triton", 2 << 30)
    row, whole = 152064, weight.numel()
    assert head.chunk_rows == 2353 and head.beside(2353) == 0  # one chunk
    for rows in (5461, 8192, 9_400):
        beside = head.beside(rows)
        assert beside > 1176
        assert 4 * row * beside + 2 * row * rows <= (2 << 30) + 4 * whole  # with logits
        assert 2 * row * rows + 2 * whole <= (2 << 30) + 4 * whole  # with dweight
        assert sum(c.stop - c.start for c in head.chunks(rows, beside)) == rows
        assert max(c.stop - c.start for c in head.chunks(rows, beside)) <= beside
    assert head.beside(14_000) == 0
    assert dataclasses.replace(head, backend="torch").beside(8192) == 0


def test_chunks_of_a_gpu_are_whole_tiles():
    weight = torch.zeros(128, 8)
    rows = 128 * 4  # bytes of one
    head = Head.build(
        weight[:1], weight, None, LogitMap(1.0), max_logits_bytes=rows * 700, backend="triton"
    )
    assert [c.stop - c.start for c in head.chunks(1500)] == [512, 512, 476]
    assert [c.stop - c.start for c in head.chunks(650)] == [384, 266]
    assert head.chunks(640) == [slice(0, 640)]
    few = dataclasses.replace(head, max_logits_bytes=rows * 100)
    assert [c.stop - c.start for c in few.chunks(150)] == [75, 75]


@pytest.mark.parametrize("live", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_moving_live_rows_up(live):
    draw = torch.Generator().manual_seed(5)
    matrix = torch.randn(40, 9, generator=draw)
    scale = torch.randn(40, generator=draw) * (torch.rand(40, generator=draw) < live)
    moved = matrix.clone()
    order = move_live_rows_up_(LogitGradient(moved, scale))
    assert sorted(order.tolist()) == scale.nonzero()[:, 0].tolist()
    assert torch.equal(moved[: len(order)], matrix[order])


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_tensors_of_another_device_than_the_current_are_refused(asked, monkeypatch):
    monkeypatch.delenv("GEARSHIFT_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert dispatch.resolve(asked, torch.device("cuda")) == "triton"
    assert dispatch.resolve(asked, torch.device("cuda:0")) == "triton"
    with pytest.raises(ValueError, match=r"tensors on cuda:1, .* call torch.cuda.set_device\(1\)"):
        dispatch.resolve(asked, torch.device("cuda:1"))
    assert dispatch.resolve("torch", torch.device("cuda:1")) == "torch"
