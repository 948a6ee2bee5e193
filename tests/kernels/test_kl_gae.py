"""python -m pytest tests/kernels/test_kl_gae.py"""

import math
import sys

import pytest
import torch

from gearshift.kernels.kl_gae import KL_ESTIMATORS, SCAN_BLOCK, kl_estimate, kl_reward_gae

BACKENDS = ("torch", "triton")
COEFFICIENTS = dict(kl_coef=0.05, gamma=0.97, lam=0.9)


def make_inputs(B, R, dtype=torch.float32, seed=0):
    """Rows: holes everywhere; with more rows, one fully masked and one with a masked tail."""
    g = torch.Generator().manual_seed(seed)
    logprobs, ref_logprobs, values = (torch.randn(B, R, generator=g).to(dtype) for _ in range(3))
    mask = torch.rand(B, R, generator=g) < 0.7
    if B > 1:
        mask[1] = False
        mask[2, : R // 3], mask[2, R // 3 + 1 :] = True, False
    return logprobs, ref_logprobs, values, mask, torch.randn(B, generator=g)


def poison(inputs):
    """The same inputs with rubbish wherever the mask is false."""
    *grids, mask, scores = inputs
    rubbish = torch.tensor([math.nan, math.inf, -math.inf, 1e30])
    rubbish = rubbish.repeat(mask.numel())[: mask.numel()].view_as(mask)
    return *(torch.where(mask, x, rubbish.to(x.dtype)) for x in grids), mask, scores


def rewards_float64(logprob, ref, score, last, kl_coef, estimator):
    d = logprob - ref
    kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
    return kl, -kl_coef * kl + (score if last else 0.0)


def gae_loop(inputs, kl_coef, gamma, lam, estimator="k1", bootstrap=None):
    """First derivation: the backward recurrence, one Python float at a time."""
    logprobs, ref_logprobs, values, mask, scores = inputs
    B, R = mask.shape
    out = torch.zeros(4, B, R, dtype=torch.float64)  # rewards, advantages, returns, kl
    for b in range(B):
        next_value, running, last = 0.0 if bootstrap is None else bootstrap[b].item(), 0.0, True
        for t in reversed(range(R)):
            if not mask[b, t]:
                continue
            logprob, ref, value = (x[b, t].item() for x in (logprobs, ref_logprobs, values))
            kl, reward = rewards_float64(logprob, ref, scores[b].item(), last, kl_coef, estimator)
            running = reward + gamma * next_value - value + gamma * lam * running
            step = [reward, running, running + value, kl]
            out[:, b, t] = torch.tensor(step, dtype=torch.float64)
            next_value, last = value, False
    return out


def gae_double_sum(inputs, kl_coef, gamma, lam):
    """Second derivation: A_t = sum_l (gamma lam)^l delta_{t+l} over the live tokens alone."""
    logprobs, ref_logprobs, values, mask, scores = (x.double() for x in inputs)
    advantages = torch.zeros_like(values)
    for b in range(mask.shape[0]):
        live = mask[b].nonzero()[:, 0]
        n = len(live)
        if n == 0:
            continue
        reward = -kl_coef * (logprobs[b] - ref_logprobs[b])[live]
        reward[-1] += scores[b]
        value = torch.cat([values[b, live], torch.zeros(1)])
        delta = reward + gamma * value[1:] - value[:-1]
        lag = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        powers = torch.where(lag >= 0, (gamma * lam) ** lag.clamp(min=0).double(), 0)
        advantages[b, live] = powers @ delta
    return advantages


@pytest.fixture
def nan_memory(monkeypatch):
    """Uninitialised memory reads as NaN, so an element no one wrote cannot pass for 0."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


def test_two_derivations_of_gae_agree():
    inputs = make_inputs(3, 200)
    loop = gae_loop(inputs, **COEFFICIENTS)[1]
    assert loop.abs().max() > 1
    torch.testing.assert_close(loop, gae_double_sum(inputs, **COEFFICIENTS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "B, R, dtype, estimator",
    [
        (1, 1, torch.float32, "k1"),
        (3, 1, torch.bfloat16, "k3"),
        (1, 7, torch.float32, "k3"),
        (3, 7, torch.float32, "k2"),
        (3, 7, torch.bfloat16, "k1"),
        (3, SCAN_BLOCK, torch.float32, "k1"),
        (3, SCAN_BLOCK + 1, torch.float32, "k3"),
        (1, SCAN_BLOCK + 1, torch.bfloat16, "k2"),
        (3, 3 * SCAN_BLOCK - 7, torch.float32, "k1"),
    ],
)
def test_matches_float64(backend, B, R, dtype, estimator, nan_memory):
    inputs = make_inputs(B, R, dtype)
    expected = gae_loop(inputs, **COEFFICIENTS, estimator=estimator)
    got = kl_reward_gae(*poison(inputs), **COEFFICIENTS, kl_estimator=estimator, backend=backend)
    for name, x, y in zip(got._fields, got, expected, strict=True):
        assert x.dtype == torch.float32 and not x.requires_grad
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=5e-6)
        assert torch.all(x[~inputs[3]] == 0), name


def test_the_block_that_a_gpu_scans(monkeypatch, nan_memory):
    """Two of them, in the interpreter too, whose own are shorter (conftest.py)."""
    monkeypatch.setattr(sys.modules[kl_reward_gae.__module__], "SCAN_BLOCK", 1024)
    inputs = make_inputs(3, 1025)
    expected = gae_loop(inputs, **COEFFICIENTS, estimator="k3")
    got = kl_reward_gae(*poison(inputs), **COEFFICIENTS, kl_estimator="k3", backend="triton")
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=5e-6)


def row_by_row(inputs, lams):
    """gae_double_sum of each row with a lambda of its own."""
    rows = [[x[b : b + 1] for x in inputs] for b in range(len(lams))]
    each = [gae_double_sum(row, 0.05, 0.97, lam) for row, lam in zip(rows, lams, strict=True)]
    return torch.cat(each)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("R", [SCAN_BLOCK - 9, SCAN_BLOCK + 76])
def test_returns_have_a_lambda_of_their_own(backend, R, nan_memory):
    """VC-PPO: the critic's target is V_t + the sum of (gamma lam_critic)^l delta_t+l."""
    inputs = make_inputs(3, R)
    got = kl_reward_gae(*poison(inputs), **COEFFICIENTS, lam_critic=1.0, backend=backend)
    advantages, critics = (gae_double_sum(inputs, 0.05, 0.97, lam) for lam in (0.9, 1.0))
    torch.testing.assert_close(got.advantages.double(), advantages, rtol=2e-6, atol=5e-6)
    expected = torch.where(inputs[3], critics + inputs[2], 0)
    torch.testing.assert_close(got.returns.double(), expected, rtol=5e-6, atol=2e-5)
    assert (got.returns - got.advantages - inputs[2])[inputs[3]].abs().max() > 0.1
    same = kl_reward_gae(*inputs, **COEFFICIENTS, lam_critic=0.9, backend=backend)
    plain = kl_reward_gae(*inputs, **COEFFICIENTS, backend=backend)
    assert all(map(torch.equal, same, plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam_critic", [None, 1.0])
def test_lambda_follows_the_length(backend, lam_critic, nan_memory):
    """VAPO: 1 - 1 / (0.05 * 40) = 0.5 at 40 live tokens, 0.96 at 500; here 0 below 20."""
    *grids, mask, scores = make_inputs(4, 700)
    for row, length in enumerate([40, 500, 15, 0]):
        live = torch.randperm(700, generator=torch.Generator().manual_seed(row))[:length]
        mask[row] = False
        mask[row, live] = True
    inputs = *grids, mask, scores
    options = {"lam_length_alpha": 0.05, "lam_critic": lam_critic, "backend": backend}
    got = kl_reward_gae(*poison(inputs), **COEFFICIENTS, **options)
    advantages = row_by_row(inputs, [0.5, 0.96, 0.0, 0.0])
    critics = advantages if lam_critic is None else row_by_row(inputs, [1.0] * 4)
    torch.testing.assert_close(got.advantages.double(), advantages, rtol=2e-6, atol=5e-6)
    expected = torch.where(mask, critics + inputs[2], 0)
    torch.testing.assert_close(got.returns.double(), expected, rtol=5e-6, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_positions_change_nothing(backend):
    inputs = make_inputs(3, 70)
    clean = kl_reward_gae(*inputs, **COEFFICIENTS, kl_estimator="k3", backend=backend)
    dirty = kl_reward_gae(*poison(inputs), **COEFFICIENTS, kl_estimator="k3", backend=backend)
    assert all(map(torch.equal, clean, dirty))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_of_a_fully_masked_row_goes_nowhere(backend):
    *grids, mask, scores = make_inputs(3, 9)
    scores[1] = math.nan
    out = kl_reward_gae(*grids, mask, scores, **COEFFICIENTS, backend=backend)
    assert all(torch.equal(x[1], torch.zeros(9)) for x in out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_undiscounted_monte_carlo_returns_are_the_score(backend):
    """gamma = lam = 1 and no penalty: the sum telescopes, whatever the critic says."""
    *grids, mask, scores = make_inputs(3, SCAN_BLOCK + 76)
    out = kl_reward_gae(*grids, mask, scores, kl_coef=0.0, gamma=1.0, lam=1.0, backend=backend)
    expected = torch.where(mask, scores[:, None], 0)
    torch.testing.assert_close(out.returns, expected, rtol=0, atol=2e-5)
    assert out.kl.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_bootstrap_is_the_value_after_the_last_live_token(backend):
    inputs = make_inputs(3, 40)
    bootstrap = torch.tensor([2.0, math.nan, 0.0])
    expected = gae_loop(inputs, **COEFFICIENTS, bootstrap=bootstrap)
    got = kl_reward_gae(*inputs, **COEFFICIENTS, bootstrap_values=bootstrap, backend=backend)
    without = kl_reward_gae(*inputs, **COEFFICIENTS, backend=backend)
    torch.testing.assert_close(got.advantages.double(), expected[1], rtol=2e-6, atol=5e-6)
    assert torch.equal(got.advantages[1:], without.advantages[1:])
    assert torch.equal(got.rewards, without.rewards)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    inputs = make_inputs(3, 33)
    *grids, mask, scores = inputs
    views = [torch.stack([x, x + 1], -1)[..., 0] for x in grids]
    views += [mask.T.contiguous().T, scores.repeat_interleave(2)[::2]]
    assert not any(view.is_contiguous() for view in views)
    straight = kl_reward_gae(*inputs, **COEFFICIENTS, backend=backend)
    strided = kl_reward_gae(*views, **COEFFICIENTS, backend=backend)
    assert all(map(torch.equal, straight, strided))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(backend, shape):
    grid = torch.zeros(shape)
    out = kl_reward_gae(
        grid, grid, grid, grid.bool(), torch.zeros(shape[0]), **COEFFICIENTS, backend=backend
    )
    assert all(x.shape == shape for x in out)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimate_value_and_gradient(estimator):
    d = torch.tensor([-3.0, -1e-4, 0.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    exact = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[estimator]
    got = kl_estimate(d, torch.zeros(5), estimator)
    torch.testing.assert_close(got, exact.float(), rtol=1e-6, atol=1e-11)
    (slope,) = torch.autograd.grad(got.sum(), d, retain_graph=True)
    (exact_slope,) = torch.autograd.grad(exact.sum(), d)
    torch.testing.assert_close(slope, exact_slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_k3_is_neither_lost_nor_negative(backend):
    d = torch.tensor([[1e-5, -1e-4, 3e-4, -2e-3, 0.02, -0.059, 0.061, -0.1]])
    zeros, mask = torch.zeros_like(d), torch.ones_like(d, dtype=torch.bool)
    out = kl_reward_gae(
        d, zeros, zeros, mask, zeros[:, 0], **COEFFICIENTS, kl_estimator="k3", backend=backend
    )
    exact = torch.expm1(-d.double()) + d.double()
    rtol = 1e-4 if backend == "triton" else 2e-2  # expm1(-d) + d cancels, too
    torch.testing.assert_close(out.kl.double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k3_saturates_at_20_nats_and_k1_does_not(backend):
    logprobs = torch.tensor([[-100.0, -1.0]])
    mask, zeros = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    for estimator, expected in (("k3", math.exp(20.0) - 21), ("k1", -100.0)):
        out = kl_reward_gae(
            logprobs, zeros, zeros, mask, zeros[:, 0], **COEFFICIENTS,
            kl_estimator=estimator, backend=backend,
        )  # fmt: skip
        assert out.kl[0, 0].item() == pytest.approx(expected, rel=1e-6)
    slope = torch.autograd.functional.jacobian(lambda x: kl_estimate(x, zeros, "k3"), logprobs)
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mask=torch.ones(2, 4)), "mask"),
        (dict(values=torch.zeros(2, 3)), "values"),
        (dict(logprobs=torch.zeros(2, 4, dtype=torch.int64)), "logprobs"),
        (dict(scores=torch.zeros(2, 4)), "scores"),
        (dict(bootstrap_values=torch.zeros(3)), "bootstrap_values"),
        (dict(ref_logprobs=torch.zeros(2, 4, device="meta")), "ref_logprobs"),
        (dict(gamma=1.5), "gamma=1.5"),
        (dict(lam=-0.1), "lam=-0.1"),
        (dict(lam_critic=1.1), "lam_critic=1.1"),
        (dict(lam_length_alpha=0.0), "lam_length_alpha=0.0"),
        (dict(kl_coef=math.nan), "kl_coef=nan"),
        (dict(kl_estimator="k4"), "kl_estimator='k4'"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_input_is_named(change, message):
    good = dict(zip(("logprobs", "ref_logprobs", "values"), torch.zeros(3, 2, 4), strict=True))
    good |= dict(mask=torch.ones(2, 4, dtype=torch.bool), scores=torch.zeros(2), **COEFFICIENTS)
    with pytest.raises(ValueError, match=message):
        kl_reward_gae(**(good | change))
