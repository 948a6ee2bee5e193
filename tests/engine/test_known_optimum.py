"""The whole loop against a known answer: does PPO reach the one policy that it should?

Everything is real: a transformer actor and critic, generation, reference, rewards, DeepSpeed.
"""

from dataclasses import replace

import pytest
import torch

from gearshift.engine import ppo
from gearshift.kernels import ops
from tests.tiny import run as tiny_run
from tests.tiny import table_task
from tests.tiny.table_task import divergence, response_logprobs

# Of 0.40 nats at the start, a short run leaves 0.04.
SHORT = 0.08


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with tiny_run.alone():
        yield table_task.write(tmp_path_factory.mktemp("table"))


def short_run(task, **ppo) -> float:
    """KL(pi || pi*) in nats after 20 steps of the default algorithm, or of one that `ppo` changes;
    inf if it broke."""
    trainer, solution, _ = table_task.train(table_task.config(task, 20, 256, **ppo), task)
    gap = solution.gap(response_logprobs(trainer.actor.lm))
    return gap if gap == gap else torch.inf


def test_listed_responses_are_all_there_are(task):
    trainer = tiny_run.trainer(table_task.config(task, 1, 256))
    solution = table_task.solve(task, trainer.actor.lm, 1.0)
    assert torch.allclose(solution.reference.exp().sum(1), torch.ones(2).double())
    assert 0.3 < solution.gap(solution.reference) < 0.5
    # J* - J(pi) = beta KL(pi || pi*), for any policy: here for the reference.
    best = (solution.reference + solution.scores).logsumexp(1).mean()
    reached = (solution.reference.exp() * solution.scores).sum(1).mean()
    assert float(best - reached) == pytest.approx(solution.gap(solution.reference))


def test_a_short_run_gets_most_of_the_way(task):
    assert short_run(task) < SHORT


@pytest.mark.slow
@pytest.mark.parametrize(
    "ppo",
    [
        {"lam": 0.5, "lam_critic": 1.0},
        {"lam_critic": 1.0, "critic_epochs": 4, "critic_minibatch_size": 64},
        {"lam_length_alpha": 1.0, "lam_critic": 1.0},
        {"policy_loss": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    ],
    ids=str,
)
def test_every_way_to_it_gets_there(task, ppo):
    """Lambdas and updates of the critic's own, and the ratio of a response.

    Losses without the pessimistic min are still on their way at this learning rate: measured, cispo
    leaves 0.25 and sapo 0.14.
    """
    assert short_run(task, **ppo) < SHORT


@pytest.mark.slow
def test_responses_that_several_policies_drew_get_there(task):
    config = table_task.config(task, 20, 256, rollout_is_cap=2.0)
    config = replace(config, rollout=replace(config.rollout, defer_stragglers=0.5))
    trainer, solution, figures = table_task.train(config, task)
    assert figures[-1]["rollout/stale_fraction"] > 0.02
    assert solution.gap(response_logprobs(trainer.actor.lm)) < SHORT


@pytest.mark.slow
def test_a_long_run_arrives(task):
    """Advantages vanish at the optimum; unwhitened, so does the noise that they make."""
    config = table_task.config(task, 80, 512, epochs=4, whiten_advantages=False)
    trainer, solution, figures = table_task.train(config, task)
    final = response_logprobs(trainer.actor.lm)
    assert solution.gap(final) <= 1e-3
    # The figures say so too: the optimum's KL and its reward.
    assert divergence(final, solution.reference) == pytest.approx(
        divergence(solution.optimal, solution.reference), rel=0.05
    )
    assert figures[-1]["critic/vf_explained_var"] > 0.5


@pytest.mark.slow
def test_the_adaptive_controller_settles_at_its_target(task):
    config = table_task.config(
        task,
        100,
        256,
        kl_coef=2.0,
        kl_controller="adaptive",
        kl_target=0.3,
        kl_horizon=1000,
    )
    _, _, figures = table_task.train(table_task.with_schedule(config, "constant"), task)
    last = [entry["objective/kl"] for entry in figures[-50:]]
    assert sum(last) / len(last) == pytest.approx(0.3, rel=0.03)
    # Far from where it began, near the coefficient whose optimum has that KL.
    assert figures[-1]["objective/kl_coef"] == pytest.approx(1.0, abs=0.25)


def wrong_loss(change):
    """linear_ppo_loss of what `change` makes of (advantages, weights)."""
    right = ops.linear_ppo_loss

    def loss(hidden, weight, ids, old, advantages, weights, **settings):
        return right(hidden, weight, ids, old, *change(advantages, weights), **settings)

    return loss


def wrong_estimate(change, **settings):
    right = ppo.estimate_advantages

    def estimate(*tensors, **given):
        return change(right(*tensors, **given | settings))

    return estimate


def plant(monkeypatch, fault: str) -> None:
    if fault == "sign":
        monkeypatch.setattr(ops, "linear_ppo_loss", wrong_loss(lambda a, w: (-a, w)))
    elif fault == "clip":
        # clip(ratio, 1 + eps, 1 - eps) is 1 - eps everywhere: A > 0 has no gradient near ratio 1.
        halved = wrong_loss(lambda a, w: (a, torch.where(a > 0, 0.0, w)))
        monkeypatch.setattr(ops, "linear_ppo_loss", halved)
    elif fault == "mask":  # the end token is not trained
        right = ppo.token_weights

        def weights(mask, *rest):
            ended = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
            return torch.where(ended, 0.0, right(mask, *rest))

        monkeypatch.setattr(ppo, "token_weights", weights)
    elif fault == "shift":  # each token is paid what the next one earned
        roll = lambda e: e._replace(advantages=e.advantages.roll(-1, 1))
        monkeypatch.setattr(ppo, "estimate_advantages", wrong_estimate(roll))
    else:
        coefficient = {"no kl": 0.0, "kl sign": -1.0}[fault]
        estimate = wrong_estimate(lambda e: e, kl_coef=coefficient)
        monkeypatch.setattr(ppo, "estimate_advantages", estimate)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sign", "clip", "mask", "shift", "no kl", "kl sign"])
def test_a_short_run_tells_a_wrong_algorithm(task, monkeypatch, fault):
    """Measured: clip 0.16, mask 0.35, shift 0.38, the others above 1."""
    plant(monkeypatch, fault)
    assert short_run(task) > 1.5 * SHORT
