"""The objective's pure functions against loops that one can read beside the formula."""

import math

import pytest
import torch

from gearshift.engine.config.schema import PPOConfig
from gearshift.engine.objective import (
    KLController,
    correct_rollout,
    estimate_advantages,
    importance_weights,
    shape_scores,
    token_weights,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()


def config(**changes) -> PPOConfig:
    return PPOConfig(prompts_per_step=4, minibatch_size=4, **changes)


def draws(rows=4, seed=0):
    """logprobs, ref_logprobs, values [rows, 4] and scores [rows], poisoned outside the mask."""
    torch.manual_seed(seed)
    mask = MASK.repeat(rows // 4, 1)
    grids = [torch.where(mask, torch.randn(mask.shape), torch.nan) for _ in range(3)]
    return *grids, mask, torch.randn(rows)


def sequence_rewards(logprobs, ref, mask, scores, kl_coef):
    return [
        float(scores[b]) - kl_coef * float((logprobs[b] - ref[b])[mask[b]].sum())
        for b in range(len(mask))
    ]


@pytest.mark.parametrize("pieces", [[4], [1, 3], [2, 1, 1]])
def test_token_weights_sum_to_one_over_the_step_however_it_is_cut(pieces):
    tokens = MASK.sum()
    whole = {
        "seq_mean_token_mean": MASK / MASK.sum(1, keepdim=True) / 4,
        "token_mean": MASK / 10,
        "seq_sum": MASK / 4,
    }
    for aggregation, expected in whole.items():
        parts = [token_weights(part, aggregation, 4, tokens) for part in MASK.split(pieces)]
        torch.testing.assert_close(torch.cat(parts), expected)
        total = float(torch.cat(parts).sum())
        assert total == pytest.approx(10 / 4 if aggregation == "seq_sum" else 1)


def test_scores_are_shifted_scaled_then_marked_then_clipped():
    scores, finished = torch.tensor([9.0, 5.0, -9.0]), torch.tensor([True, False, True])
    plain = shape_scores(scores, finished, config(score_shift=1.0, score_scale=2.0))
    assert plain.tolist() == [4.0, 2.0, -5.0]
    shaped = {"score_shift": 1.0, "score_scale": 2.0, "missing_eos_value": 3.0}
    replaced = shape_scores(scores, finished, config(missing_eos="replace", **shaped))
    assert replaced.tolist() == [4.0, -3.0, -5.0]
    subtracted = shape_scores(scores, finished, config(missing_eos="subtract", **shaped))
    assert subtracted.tolist() == [4.0, -1.0, -5.0]
    clipped = shape_scores(
        scores, finished, config(missing_eos="replace", score_clip=2.5, **shaped)
    )
    assert clipped.tolist() == [2.5, -2.5, -2.5]


@pytest.mark.parametrize("bootstrap", [None, torch.tensor([0.0, 2.0, 0.0, -1.0])])
def test_gae_by_hand(bootstrap):
    logprobs, ref, values, mask, scores = draws()
    ppo = config(gamma=0.9, lam=0.7, whiten_advantages=False)
    found = estimate_advantages(
        logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.3, bootstrap_values=bootstrap
    )
    for b in range(4):
        advantage, later = 0.0, 0.0 if bootstrap is None else float(bootstrap[b])
        last = int(mask[b].sum()) - 1
        for t in range(last, -1, -1):
            reward = -0.3 * float(logprobs[b, t] - ref[b, t])
            reward += float(scores[b]) if t == last else 0.0
            advantage = reward + 0.9 * later - float(values[b, t]) + 0.63 * advantage
            later = float(values[b, t])
            assert float(found.advantages[b, t]) == pytest.approx(advantage, abs=1e-6)
            assert float(found.returns[b, t]) == pytest.approx(advantage + later, abs=1e-6)
    for result in found:
        assert not result[~mask].any()


def test_gae_is_whitened_over_live_tokens_and_returns_are_not():
    arguments = draws()
    plain = config(gamma=0.9, whiten_advantages=False)
    raw = estimate_advantages(*arguments, config=plain, kl_coef=0.1)
    white = estimate_advantages(*arguments, config=config(gamma=0.9), kl_coef=0.1)
    live = raw.advantages[MASK].double()
    expected = (live - live.mean()) / live.std()
    torch.testing.assert_close(white.advantages[MASK].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(white.returns, raw.returns)


def test_rloo_by_hand():
    logprobs, ref, values, mask, scores = draws(rows=8)  # sample k of prompt p is row 4k + p
    ppo = config(estimator="rloo", samples_per_prompt=2)
    found = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.2)
    totals = sequence_rewards(logprobs, ref, mask, scores, 0.2)
    for row in range(8):
        expected = totals[row] - totals[(row + 4) % 8]
        assert found.advantages[row][mask[row]].tolist() == pytest.approx(
            [expected] * int(mask[row].sum()), abs=1e-5
        )
    assert not found.advantages[~mask].any()


def test_rloo_of_three_samples_leaves_each_out():
    logprobs, ref, values, mask, scores = draws(rows=12)
    ppo = config(estimator="rloo", samples_per_prompt=3)
    found = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.0)
    others = float(scores[1] + scores[9]) / 2
    assert float(found.advantages[5, 0]) == pytest.approx(float(scores[5]) - others, abs=1e-6)


def test_grpo_by_hand():
    logprobs, ref, values, mask, scores = draws(rows=16)
    ppo = config(estimator="grpo", samples_per_prompt=4)
    found = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.2)
    totals = torch.tensor(sequence_rewards(logprobs, ref, mask, scores, 0.2))
    for prompt in range(4):
        group = totals[prompt::4]
        expected = (group - group.mean()) / group.std()
        torch.testing.assert_close(found.advantages[prompt::4, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 3.3, -1e6, 1e-30])
@pytest.mark.parametrize("samples", [4, 16])
def test_grpo_of_equal_rewards_is_exactly_zero(reward, samples):
    """(r - mean) / std of equal float32 numbers is rounding noise of either sign up to 1."""
    rows = 4 * samples
    mask = torch.ones(rows, 3).bool()
    zeros = torch.zeros(rows, 3)
    ppo = config(estimator="grpo", samples_per_prompt=samples)
    scores = torch.full((rows,), reward)
    found = estimate_advantages(zeros, zeros, zeros, mask, scores, config=ppo, kl_coef=0.1)
    assert not found.advantages.any()


def test_dr_grpo_leaves_out_the_std():
    logprobs, ref, values, mask, scores = draws(rows=16)
    ppo = config(estimator="grpo", samples_per_prompt=4, policy_loss="dr_grpo")
    found = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.2)
    totals = torch.tensor(sequence_rewards(logprobs, ref, mask, scores, 0.2))
    for prompt in range(4):
        group = totals[prompt::4]
        torch.testing.assert_close(
            found.advantages[prompt::4, 0], group - group.mean(), atol=1e-5, rtol=1e-5
        )


def test_the_critic_learns_by_a_lambda_of_its_own():
    """By hand, as above: advantages by 0.7, returns by 1; and by 1 - 1 / (0.5 T)."""
    logprobs, ref, values, mask, scores = draws()
    for options, lams in (
        ({"lam": 0.7}, [0.7] * 4),
        ({"lam_length_alpha": 0.5}, [1 / 3, 0, 0.5, 0]),
    ):
        ppo = config(gamma=0.9, lam_critic=1.0, whiten_advantages=False, **options)
        found = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.3)
        for b, lam in enumerate(lams):
            advantage = target = later = 0.0
            last = int(mask[b].sum()) - 1
            for t in range(last, -1, -1):
                delta = -0.3 * float(logprobs[b, t] - ref[b, t]) - float(values[b, t])
                delta += (float(scores[b]) if t == last else 0.0) + 0.9 * later
                advantage = delta + 0.9 * lam * advantage
                target = delta + 0.9 * target
                later = float(values[b, t])
                assert float(found.advantages[b, t]) == pytest.approx(advantage, abs=1e-6)
                assert float(found.returns[b, t]) == pytest.approx(target + later, abs=1e-6)


# Weights pi_train / pi_rollout of three responses of 3, 1 and 4 tokens; a fourth has 2.
WEIGHTS = [[2.0, 0.5, 1.0], [8.0], [0.4, 1.0, 1.0, 1.0], [1.1, 0.9]]


def mismatch():
    """logprobs and rollout_logprobs [4, 4] of those weights, poisoned outside the mask."""
    mask = torch.arange(4) < torch.tensor([[len(row)] for row in WEIGHTS])
    ratios = torch.full((4, 4), torch.nan)
    ratios[mask] = torch.tensor([w for row in WEIGHTS for w in row]).log()
    rollout = torch.where(mask, torch.randn(4, 4), 0.0)
    return rollout + ratios, rollout, mask


CORRECTIONS = [
    # Which factors follow, and what is counted: by hand.
    (
        {"rollout_is_cap": 1.5},
        [[1.5, 0.5, 1], [1.5], [0.4, 1, 1, 1], [1.1, 0.9]],
        ("is_truncated", 2),
    ),
    (
        {"rollout_is_low": 0.5, "rollout_is_high": 5.0},
        [[2, 0.5, 1], [0], [0, 1, 1, 1], [1.1, 0.9]],
        ("is_masked", 2),
    ),
    (
        {"rollout_is_low": 0.45, "rollout_is_cap": 1.5},
        [[1.5, 0.5, 1], [1.5], [0, 1, 1, 1], [1.1, 0.9]],
        ("is_masked", 1),
    ),
    # Geometric means 1, 8, 0.4^(1/4) = 0.795 and 0.99^(1/2) = 0.995.
    ({"rollout_seq_high": 2.0}, [[1, 1, 1], [0], [1, 1, 1, 1], [1, 1]], ("seq_masked", 1)),
    (
        {"rollout_seq_low": 0.8, "rollout_seq_high": 2.0},
        [[1, 1, 1], [0], [0, 0, 0, 0], [1, 1]],
        ("seq_masked", 2),
    ),
    # Mean |log w|: 2 ln 2 / 3 = 0.462, ln 8 = 2.08, -ln 0.4 / 4 = 0.229, 0.100.
    ({"rollout_max_error": 0.3}, [[0, 0, 0], [0], [1, 1, 1, 1], [1, 1]], ("rejected", 2)),
    (
        {"rollout_max_error": 1.0, "rollout_is_cap": 1.5},
        [[1.5, 0.5, 1], [0], [0.4, 1, 1, 1], [1.1, 0.9]],
        ("is_truncated", 2),
    ),
    ({}, [[1, 1, 1], [1], [1, 1, 1, 1], [1, 1]], None),
]


@pytest.mark.parametrize(("given", "factors", "counted"), CORRECTIONS, ids=str)
def test_off_policy_corrections_by_hand(given, factors, counted):
    logprobs, rollout, mask = mismatch()
    found = correct_rollout(logprobs, rollout, mask, config(**given))
    expected = torch.tensor([w for row in factors for w in row], dtype=torch.float32)
    torch.testing.assert_close(found.factors[mask], expected)
    counts = {n: int(x[mask].sum()) for n, x in found.tokens.items()}
    counts |= {n: int(x.sum()) for n, x in found.responses.items()}
    if counted:
        assert counts[counted[0]] == counted[1]
    else:
        assert not counts


def test_reinforce_pp_is_the_whitened_return_to_go():
    logprobs, ref, values, mask, scores = draws()
    ppo = config(estimator="reinforce_pp", gamma=0.9, lam=0.5)  # lam has no part in it
    found = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.2)
    togo = torch.zeros(4, 4)
    for b in range(4):
        running, last = 0.0, int(mask[b].sum()) - 1
        for t in range(last, -1, -1):
            reward = -0.2 * float(logprobs[b, t] - ref[b, t])
            running = reward + (float(scores[b]) if t == last else 0.0) + 0.9 * running
            togo[b, t] = running
    live = togo[mask]
    expected = (live - live.mean()) / live.std()
    torch.testing.assert_close(found.advantages[mask], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.returns, togo, atol=1e-5, rtol=1e-5)


def test_a_kl_in_the_loss_is_not_in_the_reward():
    logprobs, ref, values, mask, scores = draws()
    ppo = config(kl_in="loss", kl_estimator="k3")
    found = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=9.0)
    torch.testing.assert_close(found.rewards.sum(1), scores)
    assert (found.kl[mask] >= 0).all() and found.kl[mask].any()


def test_importance_weights_are_truncated_from_above_only():
    train, sampler = torch.tensor([-1.0, -1.0, -4.0, 0.0]), torch.tensor([-1.0, -3.0, -1.0, -900.0])
    found = importance_weights(train, sampler, cap=2.0)
    assert found.tolist() == pytest.approx([1.0, 2.0, math.exp(-3.0), 2.0])


def test_the_controller_follows_ziegler():
    ppo = config(kl_controller="adaptive", kl_target=6.0, kl_horizon=1000, kl_coef=0.1)
    for kl, error in (
        (6.0, 0.0),
        (6.3, 0.05),
        (60.0, 0.2),
        (5.7, -0.05),
        (0.0, -0.2),
        (-9.0, -0.2),
    ):
        controller = KLController(ppo)
        controller.adapt(kl, responses=50)
        assert controller.coef == pytest.approx(0.1 * (1 + error * 50 / 1000))
    fixed = KLController(config(kl_coef=0.1))
    fixed.adapt(60.0, responses=50)
    assert fixed.coef == 0.1


@pytest.mark.parametrize(
    ("estimator", "changes"),
    [
        ("gae", {}),
        ("gae", {"lam_critic": 0.95, "lam_length_alpha": 0.5}),
        ("reinforce_pp", {}),
        ("rloo", {}),
        ("grpo", {}),
    ],
    ids=["gae", "decoupled", "reinforce_pp", "rloo", "grpo"],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rewards_of_tokens_against_a_loop_in_float64(estimator, changes, backend, monkeypatch):
    """reward_t = -kl_coef * kl_t + r_t + [t last] * (score - sum of r), then GAE as written."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("GEARSHIFT_KERNELS", backend)
    samples = 1 if estimator in ("gae", "reinforce_pp") else 2
    ppo = PPOConfig(
        prompts_per_step=4 // samples,
        samples_per_prompt=samples,
        minibatch_size=4,
        estimator=estimator,
        gamma=0.9,
        lam=0.8,
        whiten_advantages=False,
        **changes,
    )
    logprobs, ref, values, mask, scores = draws(seed=5)
    tokens = torch.where(mask, torch.randn(mask.shape), 0.0)
    found = estimate_advantages(
        logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.3, token_rewards=tokens
    )
    lam, gae = (0.8, True) if estimator == "gae" else (1.0, False)
    for row in range(4):
        live = int(mask[row].sum())
        rewards = [
            float(tokens[row, t]) - 0.3 * float(logprobs[row, t].double() - ref[row, t].double())
            for t in range(live)
        ]
        rewards[-1] += float(scores[row].double() - tokens[row].double().sum())
        assert found.rewards[row, :live].tolist() == pytest.approx(rewards, abs=1e-5)
        assert math.fsum(rewards) == pytest.approx(
            float(scores[row]) - 0.3 * float((logprobs[row] - ref[row])[mask[row]].sum()), abs=1e-5
        )
        if estimator in ("rloo", "grpo"):
            continue
        lams = [1 - 1 / (0.5 * live) if changes else lam, changes.get("lam_critic", lam)]
        sums, following = [0.0, 0.0], 0.0  # with the policy's lambda, with the critic's
        for t in reversed(range(live)):
            value = float(values[row, t]) if gae else 0.0
            delta = rewards[t] + 0.9 * following - value
            sums = [delta + 0.9 * max(own, 0) * s for own, s in zip(lams, sums, strict=True)]
            following = value
            assert float(found.advantages[row, t]) == pytest.approx(sums[0], abs=1e-5)
            assert float(found.returns[row, t]) == pytest.approx(sums[1] + value, abs=1e-5)
    if estimator in ("rloo", "grpo"):  # of a response as a whole: where its rewards lie is nothing
        plain = estimate_advantages(logprobs, ref, values, mask, scores, config=ppo, kl_coef=0.3)
        torch.testing.assert_close(found.advantages, plain.advantages, atol=1e-5, rtol=1e-5)
