"""linear_cross_entropy against float64 autograd through log_softmax, on both backends."""

import pytest
import torch
import torch.nn.functional as F

from gearshift.kernels import dispatch, ops
from tests.tiny.poison import poison_allocations

needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_allocations(monkeypatch)


def draw(rows, vocab, dtype=torch.float32):
    """hidden [rows,16], weight [vocab,16], bias [vocab], token_ids [rows], weights [rows]."""
    generator = torch.Generator().manual_seed(vocab + rows)
    hidden, weight, bias = (
        (torch.randn(*shape, generator=generator) * 0.7).to(dtype)
        for shape in ((rows, 16), (vocab, 16), (vocab,))
    )
    token_ids = torch.randint(vocab, (rows,), generator=generator)
    keep = torch.rand(rows, generator=generator) < 0.8
    return hidden, weight, bias, token_ids, torch.rand(rows, generator=generator) * keep


def reference(hidden, weight, bias, token_ids, weights, temperature=1.0, cap=None, scale=1.0):
    """Value and gradients of hidden, weight and bias; F.cross_entropy in the tensors' dtype."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(*leaves) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits / temperature, token_ids, reduction="none")
    loss = (losses * weights.to(losses.dtype)).sum()
    return loss.detach(), torch.autograd.grad(loss, leaves)


def relative(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("vocab, rows, chunk", [(129, 1, 1), (1000, 31, 9), (5003, 33, 40)])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "logit_scale": 0.5}, {"temperature": 1.3, "logit_softcap": 2.0}],
)
def test_matches_float64(backend, dtype, limit, vocab, rows, chunk, options):
    *tensors, token_ids, weights = draw(rows, vocab, dtype)
    if rows == 1:
        weights[0] = 0.5
    head = (options.get("temperature", 1.0), options.get("logit_softcap"))
    head += (options.get("logit_scale", 1.0),)
    doubles = [t.double() for t in tensors]
    exact_loss, exact = reference(*doubles, token_ids, weights, *head)
    _, plain = reference(*tensors, token_ids, weights, *head)

    leaves = [t.clone().requires_grad_() for t in tensors]
    loss = ops.linear_cross_entropy(
        *leaves[:2],
        token_ids,
        weights,
        bias=leaves[2],
        max_logits_bytes=chunk * -(-vocab // 128) * 512,
        backend=backend,
        **options,
    )
    found = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    for gradient, same_dtype, right in zip(found, plain, exact, strict=True):
        assert gradient.dtype == dtype
        error = relative(gradient, right)
        assert error <= limit
        assert error <= 3 * relative(same_dtype, right) + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_hold_anything(backend):
    hidden, weight, _, token_ids, weights = draw(33, 1000)
    dead = weights == 0
    assert 2 < dead.sum() < 20
    garbage_ids, garbage_hidden = token_ids.clone(), hidden.clone()
    garbage_ids[dead], garbage_hidden[dead] = -100, torch.nan
    results = []
    for h, ids in ((hidden, token_ids), (garbage_hidden, garbage_ids)):
        leaves = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = ops.linear_cross_entropy(*leaves, ids, weights, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][1][dead] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_factor_reaches_hidden_and_weight_alike(backend):
    hidden, weight, _, token_ids, weights = draw(31, 129)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    gradients = [
        torch.autograd.grad(
            ops.linear_cross_entropy(*leaves, token_ids, weights, backend=backend) * factor, leaves
        )
        for factor in (1.0, 4.0)
    ]
    assert all(torch.equal(4 * a, b) for a, b in zip(*gradients, strict=True))


def test_sure_tokens_have_the_right_small_gradient():
    """p near 1: p - 1 must come from one subtraction, not from two rounded gradients."""
    hidden = torch.eye(4).requires_grad_()
    weight = (torch.eye(4) * 12).requires_grad_()
    token_ids, weights = torch.arange(4), torch.ones(4)
    exact_loss, exact = reference(
        hidden.double(), weight.double(), torch.zeros(4).double(), token_ids, weights
    )
    for backend in ("torch", "triton") if dispatch.HAS_TRITON else ("torch",):
        loss = ops.linear_cross_entropy(hidden, weight, token_ids, weights, backend=backend)
        assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)  # 7.4e-5: ulp of 1 + x
        for found, right in zip(torch.autograd.grad(loss, [hidden, weight]), exact, strict=False):
            torch.testing.assert_close(found.double(), right, rtol=0.02, atol=1e-9)


def test_bad_input_is_named():
    hidden, weight, _, token_ids, weights = draw(7, 129)
    with pytest.raises(ValueError, match=r"weights has shape \[3\]: must be \[7\]"):
        ops.linear_cross_entropy(hidden, weight, token_ids, weights[:3])
    with pytest.raises(ValueError, match="token_ids is torch.float32"):
        ops.linear_cross_entropy(hidden, weight, token_ids.float(), weights)
    with pytest.raises(ValueError, match="token_ids holds 1000"):
        ops.linear_cross_entropy(hidden, weight, token_ids * 0 + 1000, torch.ones(7))
    with pytest.raises(ValueError, match="temperature=0"):
        ops.linear_cross_entropy(hidden, weight, token_ids, weights, temperature=0)
    with pytest.raises(ValueError, match="hidden has shape"):
        ops.linear_cross_entropy(hidden[0], weight, token_ids, weights)
