"""python -m pytest tests/kernels/test_value_loss.py"""

import math

import pytest
import torch

from gearshift.kernels.value_loss import value_loss

BACKENDS = ("torch", "triton")


def make_inputs(N, dtype=torch.float32):
    g = torch.Generator().manual_seed(N)
    values, old_values, returns = (torch.randn(N, generator=g).to(dtype) for _ in range(3))
    weights = torch.rand(N, generator=g) / N
    weights[::3] = 0
    return values, old_values, returns, weights


def loss_float64(values, old_values, returns, weights, clip):
    """The textbook form; its gradient comes from autograd, not from our formula."""
    square = (values - returns) ** 2
    if clip is not None:
        bounded = old_values + torch.clamp(values - old_values, -clip, clip)
        square = torch.maximum(square, (bounded - returns) ** 2)
    return (0.5 * weights * square).sum()


@pytest.fixture
def nan_memory(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else 1)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.2, 5.0])
@pytest.mark.parametrize("N", [1, 7, 1024, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_autograd(backend, clip, N, dtype, nan_memory):
    inputs = make_inputs(N, dtype)
    exact = [x.double() for x in inputs]
    exact[0].requires_grad_()
    loss = loss_float64(*exact, clip)
    loss.backward()

    values = inputs[0].requires_grad_()
    got = value_loss(values, *inputs[1:], clip=clip, backend=backend)
    (3 * got.loss).backward()
    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=1e-9)
    tolerance = dict(rtol=1e-2 if dtype == torch.bfloat16 else 2e-6, atol=1e-9)
    torch.testing.assert_close(values.grad.double(), 3 * exact[0].grad, **tolerance)
    assert torch.all(values.grad[inputs[3] == 0] == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_means_strictly_worse(backend):
    old = torch.zeros(5)
    #         moved past c: towards R, away from R, inside c, exactly on c, weight 0
    values = torch.tensor([0.5, 0.5, 0.1, 0.25, 0.5], requires_grad=True)
    returns = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    got = value_loss(values, old, returns, weights, clip=0.25, backend=backend)
    assert got.clipped.dtype == torch.bool and not got.clipped.requires_grad
    assert got.clipped.tolist() == [True, False, False, False, False]
    got.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.5, -0.9, -0.75, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_rubbish_at_weight_0_changes_nothing(backend, clip):
    *columns, weights = make_inputs(50)
    rubbish = torch.tensor([math.nan, math.inf, -math.inf, 1e30, 0.0]).repeat(10)
    dirty = [torch.where(weights != 0, x, rubbish) for x in columns]
    results = []
    for values, *rest in (columns, dirty):
        values.requires_grad_()
        out = value_loss(values, *rest, weights, clip=clip, backend=backend)
        out.loss.backward()
        results.append((out.loss.detach(), out.clipped, values.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_nan_that_counts_is_not_hidden(backend, column):
    inputs = make_inputs(10)
    inputs[column][1] = math.nan
    assert value_loss(*inputs, clip=0.2, backend=backend).loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_values_learn(backend):
    inputs = [x.requires_grad_() for x in make_inputs(10)]
    value_loss(*inputs, clip=0.2, backend=backend).loss.backward()
    assert inputs[0].grad is not None and all(x.grad is None for x in inputs[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    inputs = make_inputs(9)
    views = [torch.stack([x, x + 1], -1)[:, 0] for x in inputs]
    assert not any(view.is_contiguous() for view in views)
    straight, strided = (value_loss(*x, clip=0.2, backend=backend) for x in (inputs, views))
    assert torch.equal(straight.loss, strided.loss)
    assert torch.equal(straight.clipped, strided.clipped)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_stays_connected(backend):
    values = torch.zeros(0, requires_grad=True)
    out = value_loss(values, *torch.zeros(3, 0), clip=0.2, backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0 and values.grad.shape == (0,) and out.clipped.shape == (0,)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(values=torch.zeros(2, 2)), "values"),
        (dict(values=torch.zeros(4, dtype=torch.int64)), "values"),
        (dict(old_values=torch.zeros(3)), "old_values"),
        (dict(returns=torch.zeros(4, 1)), "returns"),
        (dict(weights=torch.ones(4, dtype=torch.bool)), "weights"),
        (dict(weights=torch.ones(4, device="meta")), "weights"),
        (dict(clip=0.0), "clip=0.0"),
        (dict(clip=math.nan), "clip=nan"),
        (dict(backend="fast"), "backend='fast'"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {name: torch.zeros(4) for name in ("values", "old_values", "returns", "weights")}
    with pytest.raises(ValueError, match=message):
        value_loss(**(good | change))
