"""nn.functional.linear while generating: whose replacement is lifted, and whose is left."""

import pytest
import torch
import torch.nn.functional as F

from gearshift.engine.rollout.linear import fast_linear


def test_deepspeeds_wrapper_is_lifted_and_put_back():
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = F.linear
    F.linear = zero3_linear_wrap
    try:
        with pytest.raises(ZeroDivisionError), fast_linear():
            assert F.linear is torch._C._nn.linear
            1 / 0  # noqa: B018
        assert F.linear is zero3_linear_wrap
    finally:
        F.linear = before


def test_a_replacement_of_unknown_origin_stays(monkeypatch):
    def quantized(input, weight, bias=None):
        return input

    monkeypatch.setattr(F, "linear", quantized)
    with fast_linear():
        assert F.linear is quantized
    assert F.linear is quantized
