"""nn.functional.linear while generating: its values, and whose replacement is left in place."""

import pytest
import torch
import torch.nn.functional as F

from gearshift.engine import fast_linear as subject
from gearshift.engine.fast_linear import fast_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 3, 4, 17, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_values_are_those_of_the_exact_product(rows, dtype, biased):
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, 512, generator=draw).to(dtype)
    weight = torch.randn(1024, 512, generator=draw).to(dtype) / 512**0.5
    bias = torch.randn(1024, generator=draw).to(dtype) if biased else None
    truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with torch.no_grad(), fast_linear(CPU):
        assert F.linear is not subject._builtin
        got = F.linear(x, weight, bias)
    assert got.shape == (1, rows, 1024) and got.dtype == dtype
    error = (got.double() - truth).abs().max().item()
    assert error < (2e-5 if dtype == torch.float32 else 0.04)


def test_onednn_serves_a_few_rows_of_a_large_weight_only(monkeypatch):
    calls = []
    monkeypatch.setattr(subject, "_onednn", lambda x, w, *_: calls.append(len(x)) or x @ w.T)
    large, small = torch.zeros(1024, 512), torch.zeros(64, 512)
    with torch.no_grad(), fast_linear(CPU):
        for rows in (1, 3, 4, 64, 65):
            F.linear(torch.zeros(rows, 512), large)
            F.linear(torch.zeros(rows, 512), small)
    assert calls == [4, 64]


def test_deepspeeds_wrapper_is_lifted_and_put_back():
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = F.linear
    F.linear = zero3_linear_wrap
    try:
        with pytest.raises(ZeroDivisionError), fast_linear(CPU):
            assert F.linear is subject.by_onednn
            1 / 0  # noqa: B018
        assert F.linear is zero3_linear_wrap
        with fast_linear(torch.device("cuda")):
            assert F.linear is subject._builtin
    finally:
        F.linear = before


def test_a_replacement_of_unknown_origin_stays(monkeypatch):
    def quantized(input, weight, bias=None):
        return input

    monkeypatch.setattr(F, "linear", quantized)
    with fast_linear(CPU):
        assert F.linear is quantized
    assert F.linear is quantized


def test_without_onednn_the_plain_product_serves(monkeypatch):
    monkeypatch.setattr(subject, "_onednn", None)
    with fast_linear(CPU):
        assert F.linear is subject._builtin
