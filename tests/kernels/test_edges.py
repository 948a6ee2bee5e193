"""Inputs at the edge of what the head's ops take: the right answer, never a wrong number."""

import pytest
import torch

from gearshift.kernels import dispatch, ops
from tests.kernels.head.test_ppo import Problem, relative
from tests.tiny.poison import poison_allocations

needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, inside the interpreter
]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_allocations(monkeypatch)


def check(problem, backend, limit=4e-6, **objective):
    """Loss, rows and gradients against float64; returns the result and the gradients."""
    exact_loss, exact = problem.reference(**objective)
    result, found = problem.run(backend=backend, **objective)
    assert result.loss.item() == pytest.approx(exact_loss.item(), rel=3e-5, abs=1e-6)
    for gradient, right in zip(found, exact, strict=True):
        assert relative(gradient, right) <= limit
    return result, found


@pytest.mark.parametrize("objective", [{}, {"dual_clip": 1.5}, {"entropy_coef": 0.1}])
def test_every_row_clipped(backend, objective):
    """Ratios of e and more beside positive advantages: only an entropy bonus leaves a gradient."""
    problem = Problem.random(9, 1003, live=1.0, offset=-3.0)
    problem.columns["advantages"] = problem.columns["advantages"].abs() + 0.1
    exact_loss, exact = problem.reference(**objective)
    result, found = problem.run(backend=backend, **objective)
    assert result.clipped.all()
    assert result.loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    for gradient, right in zip(found, exact, strict=True):
        if objective.get("entropy_coef"):
            assert relative(gradient, right) < 4e-6
        else:
            assert not gradient.count_nonzero() and not right.count_nonzero()


def test_advantages_of_zero(backend):
    problem = Problem.random(9, 1003)
    problem.columns["advantages"].zero_()
    result, found = problem.run(backend=backend)
    assert result.loss == 0 and not result.clipped.any()
    assert not any(gradient.count_nonzero() for gradient in found)
    check(problem, backend, kl_loss_coef=0.2)


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 4097])
@pytest.mark.parametrize("edge", ["first", "last"])
def test_tokens_at_the_edges_of_odd_vocabularies(backend, vocab, edge):
    ids = [0] if edge == "first" else [vocab - 1]
    problem = Problem.random(5, vocab, live=1.0, ids=ids)
    if vocab > 1:
        check(problem, backend)
        check(problem, backend, entropy_coef=0.1)
        return
    result, found = problem.run(backend=backend)
    # The anchored pass has exp(old - c) and its logarithm: their rounding is left.
    assert result.logprobs.abs().max() < 5e-7 and result.entropy.abs().max() < 5e-7
    assert all(gradient.abs().max() < 2e-6 for gradient in found)


@pytest.mark.parametrize("temperature", [0.1, 10.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_temperatures(backend, temperature, softcap):
    head = {"temperature": temperature, "logit_softcap": softcap}
    problem = Problem.random(9, 1003, head=head)
    check(problem, backend, 2e-5)
    check(problem, backend, 2e-5, entropy_coef=0.05)


@pytest.mark.parametrize("objective", [{}, {"entropy_coef": 0.1}])
def test_large_logits_of_bf16_states(backend, objective):
    """|logit| of 80 and more: exp of them is beyond float32, their differences are not."""
    problem = Problem.random(9, 1003, torch.bfloat16, live=1.0)
    problem.weight *= 20
    logits = problem.hidden.double() @ problem.weight.double().t()
    assert logits.abs().max() > 150
    problem.token_ids = logits.topk(2, 1).indices[:, 1]
    logprobs = logits.log_softmax(1).gather(1, problem.token_ids[:, None])[:, 0]
    problem.columns["old_logprobs"] = (logprobs - 0.1).float()
    _, plain = problem.reference(torch.bfloat16, **objective)
    _, exact = problem.reference(**objective)
    result, found = problem.run(backend=backend, **objective)
    torch.testing.assert_close(result.logprobs.double(), logprobs, rtol=1e-5, atol=3e-5)
    for gradient, right, same_dtype in zip(found, exact, plain, strict=True):
        assert relative(gradient, right) <= max(6e-3, 3 * relative(same_dtype, right))


@pytest.mark.parametrize("offset", [-15.0, 15.0])
def test_old_logprobs_15_nats_off_with_negative_weights(backend, offset):
    problem = Problem.random(9, 1003, live=1.0, offset=offset)
    problem.columns["weights"] *= -1
    problem.columns["advantages"] = problem.columns["advantages"].abs() * (1 if offset > 0 else -1)
    check(problem, backend, 2e-5, kl_loss_coef=0.1, kl_estimator="k2")


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(backend, rows):
    problem = Problem.random(rows, 129, live=1.0)
    hidden, weight, ids = problem.hidden, problem.weight, problem.token_ids
    logprobs, entropy = ops.linear_logprob(hidden, weight, ids, backend=backend)
    assert logprobs.shape == entropy.shape == (rows,)
    given = ops.logprob_entropy(hidden @ weight.t(), ids, backend=backend)
    torch.testing.assert_close(given, (logprobs, entropy), rtol=0, atol=1e-5)
    leaves = problem.leaves()
    loss = ops.linear_cross_entropy(*leaves, ids, torch.ones(rows), backend=backend)
    assert loss.item() == pytest.approx(-logprobs.sum().item())
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))
    if rows:
        check(problem, backend)


def test_views_int32_ids_and_float64_columns(backend):
    """Every argument a view with gaps; the storage around it holds NaN."""
    problem = Problem.random(9, 1003, head={"bias": True})
    expected, gradients = problem.run(backend=backend)

    def gaps(tensor):
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]

    problem.hidden, problem.weight, problem.bias = map(gaps, problem.tensors())
    problem.columns = {name: gaps(c.double()) for name, c in problem.columns.items()}
    problem.token_ids = problem.token_ids.int().repeat_interleave(2)[::2]
    leaves = [t.detach().requires_grad_() for t in problem.tensors()]
    assert not any(t.is_contiguous() for t in (*leaves, problem.token_ids))
    found, same = problem.run(leaves, backend=backend)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    assert all(relative(a, b) < 1e-6 for a, b in zip(same, gradients, strict=True))


def test_a_forbidden_token_has_no_probability_and_no_gradient(backend):
    problem = Problem.random(9, 1003, head={"bias": True}, ids=[3, 4])
    problem.bias[500:] = -torch.inf
    leaves = problem.leaves()
    for objective in ({}, {"entropy_coef": 0.1}):
        result, (dhidden, dweight, dbias) = problem.run(leaves, backend=backend, **objective)
        assert result.loss.isfinite() and dhidden.isfinite().all()
        assert dweight.isfinite().all() and dbias.isfinite().all()
        assert dweight[500:].abs().max() < 1e-30 and dbias[500:].abs().max() < 1e-30
        assert dbias[:500].abs().max() > 1e-3


def test_scoring_and_loss_agree_on_the_policy_that_sampled(backend):
    problem = Problem.random(9, 1003, live=1.0)
    tensors = problem.hidden, problem.weight, problem.token_ids
    problem.columns["old_logprobs"], _ = ops.linear_logprob(*tensors, backend=backend)
    result, found = problem.run(backend=backend)
    torch.testing.assert_close(result.logprobs, problem.columns["old_logprobs"], rtol=0, atol=3e-6)
    assert not result.clipped.any() and found[0].count_nonzero()
