"""Chunks of rows, and the exact skipping of rows without a gradient."""

import pytest
import torch

from gearshift.kernels.linear_head import Head, LogitGradient, move_live_rows_up_
from gearshift.kernels.logprob import LogitMap


def test_chunks_are_equal_and_within_the_budget():
    weight = torch.zeros(1003, 8)
    head = Head.build(
        weight[:1], weight, None, LogitMap(1.0), max_logits_bytes=1024 * 4 * 50 + 1, backend="torch"
    )
    sizes = [chunk.stop - chunk.start for chunk in head.chunks(101)]
    assert sizes == [34, 34, 33]
    assert head.chunks(50) == [slice(0, 50)]


@pytest.mark.parametrize("live", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_moving_live_rows_up(live):
    draw = torch.Generator().manual_seed(5)
    matrix = torch.randn(40, 9, generator=draw)
    scale = torch.randn(40, generator=draw) * (torch.rand(40, generator=draw) < live)
    moved = matrix.clone()
    order = move_live_rows_up_(LogitGradient(moved, scale))
    assert sorted(order.tolist()) == scale.nonzero()[:, 0].tolist()
    assert torch.equal(moved[: len(order)], matrix[order])
