"""Ragged rows, padded or end to end: finite gradients, near those of float32, at any length.

The check is a job of the GPU check (launch/gpu/parts.py); on a CPU it runs in float32.
"""

import pytest
import torch

from gearshift.launch.gpu.parts import RAGGED, gradient_error

WAYS = pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])


def check(device: str, length: int, packs: bool) -> None:
    _, dtype, most = RAGGED[device]
    assert gradient_error(torch.device(device), dtype, length, packs) < most  # NaN is not


@pytest.mark.gpu
@WAYS
@pytest.mark.parametrize("length", RAGGED["cuda"][0])
def test_on_a_gpu(length, packs):
    check("cuda", length, packs)


@WAYS
def test_on_a_cpu(packs):
    check("cpu", 192, packs)
