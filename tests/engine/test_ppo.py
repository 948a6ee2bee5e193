"""One PPO step and its parts: on one rank, on two, and against gradients made by autograd."""

import functools
from dataclasses import replace

import pytest
import torch

from gearshift.engine.attention import packed
from gearshift.engine.config.schema import OptimizerConfig
from gearshift.engine.metrics import StepMetrics
from tests.engine import ppo_on_ranks as ranks_ppo
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run

# Measured: 1.2e-7, one or two units in the last place of the largest weights.
SAME = 1e-6
CPU = torch.device("cpu")
FAST = ("zero3_micro1", "zero2_micro8", "tokens24", "tied", "critic", "gspo", "dr_grpo")
CASES = [pytest.param(c, marks=[] if c in FAST else pytest.mark.slow) for c in ranks_ppo.CASES]
# What the other runs are held against.
BY_TWO = {"attn": "auto", "micro_batch_size": 2}
BY_TWO |= {"micro_batch_tokens": "auto", "score_batch_tokens": "auto"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with tiny_run.alone():
        yield tiny_run.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    """A function from a case to what two real ranks made of it."""

    @functools.cache
    def made(cases: tuple[str, ...]) -> dict[str, dict]:
        out = tmp_path_factory.mktemp("two_ranks")
        on_ranks.launch("engine/ppo_on_ranks.py", models, out, ",".join(cases))
        return {case: torch.load(out / f"{case}.pt") for case in cases}

    more = tuple(case for case in ranks_ppo.CASES if case not in FAST)
    return lambda case: made(FAST if case in FAST else more)[case]


@pytest.fixture(scope="module")
def reference(models):
    """The first step of one rank, packed, in micro-batches of two."""
    return ranks_ppo.run(models, "zero0", **BY_TWO)


def make(models, **ppo):
    """A trainer on this rank and a judged rollout of its first prompts."""
    trainer = tiny_run.trainer(tiny_run.config(models, **ppo))
    rollout = trainer.actor.generate(
        tiny_run.prompts(trainer.ppo, 0), trainer.config.sampling, None
    )
    return trainer, trainer.make_experience(rollout, StepMetrics(CPU))


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("case", CASES)
def test_neither_ranks_nor_micro_batches_change_the_update(models, two_ranks, case):
    """Ragged rows, two epochs of two minibatches: all weights and figures of every optimizer step.

    One rank runs without ZeRO, packed and in micro-batches of two.
    """
    alone, together = ranks_ppo.run(models, case, zero="zero0", **BY_TWO), two_ranks(case)
    assert alone["figures"][0]["response_length/min"] < alone["figures"][0]["response_length/max"]
    check_same(alone, together)


@pytest.mark.parametrize("case", ["tokens1", "tokens24", "tokens10000", "padded"])
def test_micro_batches_by_tokens_change_nothing_on_one_rank(models, reference, case):
    """Nor does padding."""
    check_same(reference, ranks_ppo.run(models, case, zero="zero0"))


def check_same(first: dict, second: dict) -> None:
    """Weights and figures of two runs."""
    for role, weights in first["weights"].items():
        assert largest_difference(weights, second["weights"][role]) < SAME
    for one, two in zip(first["figures"], second["figures"], strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if name.startswith("batch/"):  # how rows were grouped, which is what differs
                continue
            if not name.startswith(("timing_s/", "memory_gb/", "states_gb/", "throughput/")):
                assert two[name] == pytest.approx(value, rel=1e-4, abs=2e-6, nan_ok=True), name


@pytest.mark.parametrize("case", [case for case in CASES if case.values != ("tied",)])
def test_the_update_is_far_larger_than_the_tolerance(models, two_ranks, case):
    start = tiny_run.trainer(tiny_run.config(models)).actor.lm.state_dict()
    # A case that updates the critic more often takes one step of the actor's: the least.
    assert largest_difference(start, two_ranks(case)["weights"]["actor"]) > 500 * SAME


def test_one_rank_under_zero3(models):
    plain = ranks_ppo.run(models, "zero0")
    sharded = ranks_ppo.run(models, "zero0", zero="zero3")
    for role, weights in plain["weights"].items():
        assert largest_difference(weights, sharded["weights"][role]) < SAME


@pytest.mark.parametrize("case", CASES)
def test_every_ratio_is_one_before_the_first_update(two_ranks, case):
    for figures in two_ranks(case)["figures"]:
        assert figures["rollout/ratio_first_max"] <= 1e-5
        assert figures["policy/approxkl_avg"] > 1e-9  # later passes did move
        assert figures["rollout/logprob_error_max"] < 1e-5


@pytest.mark.parametrize("update", ["separate", "joint"])
def test_optimizer_steps_are_minibatches_times_epochs(models, update):
    config = tiny_run.config(models, epochs=3, minibatch_size=2, update=update)
    trainer = tiny_run.trainer(config)
    for step in range(2):
        figures, _ = trainer.step(tiny_run.prompts(config.ppo, step))
        expected = (step + 1) * 3 * 4
        assert trainer.actor.engine.global_steps == expected
        assert trainer.critic.engine.global_steps == expected
        assert figures["policy/optimizer_steps"] == 12
        # The last of the step's learning rates: one schedule step per optimizer step.
        rates = trainer.actor.schedule.lr_lambdas[0]
        assert figures["lr"] == pytest.approx(1e-3 * rates(expected - 1))


@pytest.mark.parametrize("update", ["separate", "joint"])
def test_target_kl_stops_the_actor_only(models, update):
    config = tiny_run.config(models, target_kl=1e-12, update=update)
    trainer = tiny_run.trainer(config)
    figures, _ = trainer.step(tiny_run.prompts(config.ppo, 0))
    # The first pass has ratio 1; the second sees the first update.
    assert figures["policy/optimizer_steps"] == trainer.actor.engine.global_steps == 2
    assert trainer.critic.engine.global_steps == 4


def test_reported_losses_are_means_over_the_steps_taken(models):
    """The first minibatch has ratio 1, so its loss is minus the weighted mean advantage."""
    trainer, experience = make(models, target_kl=1e-12, epochs=1, minibatch_size=8)
    metrics = StepMetrics(CPU)
    trainer.update(experience, metrics)
    per_row = experience.advantages.sum(1) / experience.lengths
    assert metrics.reduce()["loss/policy_avg"] == pytest.approx(-float(per_row.mean()), abs=1e-6)

    trainer, experience = make(models, target_kl=1e-12, epochs=4, minibatch_size=8)
    metrics = StepMetrics(CPU)
    trainer.update(experience, metrics)
    figures = metrics.reduce()
    assert figures["policy/optimizer_steps"] == 2
    assert figures["loss/policy_avg"] == pytest.approx(-float(per_row.mean()), abs=1e-2)


@pytest.mark.parametrize("update", ["separate", "joint"])
def test_critic_warmup_leaves_the_actor_alone(models, update):
    config = tiny_run.config(models, critic_warmup_steps=1, update=update)
    trainer = tiny_run.trainer(config)
    before = {name: value.clone() for name, value in trainer.actor.lm.state_dict().items()}
    trainer.step(tiny_run.prompts(config.ppo, 0))
    assert trainer.actor.engine.global_steps == 0
    assert largest_difference(before, trainer.actor.lm.state_dict()) == 0
    assert trainer.critic.engine.global_steps == 4
    assert trainer.critic.model.score.weight.any()
    trainer.step(tiny_run.prompts(config.ppo, 1))
    assert trainer.actor.engine.global_steps == 4


def test_a_critic_has_updates_of_its_own(models):
    """Four epochs of one minibatch against two of two; the actor's steps are as without."""
    plain = ranks_ppo.run(models, "zero0")
    config = tiny_run.config(models, critic_epochs=4, critic_minibatch_size=8)
    trainer = tiny_run.trainer(config)
    figures, _ = trainer.step(tiny_run.prompts(config.ppo, 0))
    assert trainer.actor.engine.global_steps == trainer.critic.engine.global_steps == 4
    assert figures["policy/optimizer_steps"] == 4
    assert largest_difference(plain["weights"]["actor"], trainer.actor.lm.state_dict()) == 0
    assert largest_difference(plain["weights"]["critic"], trainer.critic.model.state_dict()) > SAME
    config = tiny_run.config(models, critic_epochs=3)
    trainer = tiny_run.trainer(config)
    trainer.step(tiny_run.prompts(config.ppo, 0))
    assert (trainer.actor.engine.global_steps, trainer.critic.engine.global_steps) == (4, 6)


def test_the_gradient_of_the_critic_is_a_mean_over_its_own_minibatch(models):
    """One critic step over all eight rows, whatever the actor's minibatch is."""
    norms = []
    for size in (4, 8):
        config = tiny_run.config(models, minibatch_size=size, critic_minibatch_size=8, epochs=1)
        trainer = tiny_run.trainer(config)
        figures, _ = trainer.step(tiny_run.prompts(config.ppo, 0))
        assert trainer.critic.engine.global_steps == 1
        norms.append(figures["critic/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize("update", ["separate", "joint"])
def test_the_schedule_of_the_actor_ends_with_its_own_steps(models, update):
    """Two of five PPO steps are warm-up: the actor's 12 updates decay from the peak to 0."""
    config = tiny_run.config(models, critic_warmup_steps=2, update=update)
    plain = replace(config.actor.optimizer, warmup=0.0)
    config = replace(config, actor=replace(config.actor, optimizer=plain))
    trainer = tiny_run.trainer(config, steps=5)
    rates = []
    for step in range(5):
        figures, _ = trainer.step(tiny_run.prompts(config.ppo, step))
        rates.append(figures.get("lr"))
    assert rates[:2] == [None, None]
    # The rate of each PPO step's last update: the 4th, the 8th and the 12th.
    assert rates[2:] == pytest.approx([1e-3 * (1 - taken / 12) for taken in (3, 7, 11)])
    assert trainer.actor.learning_rate == 0 and trainer.critic.learning_rate == 0


def test_joint_and_separate_agree_where_nothing_is_shared(models):
    """Two models, two optimizers: with vf_coef 1 the order of their steps cannot matter."""
    results = [
        ranks_ppo.run(models, "zero0", update=update, vf_coef=1.0)["weights"]
        for update in ("separate", "joint")
    ]
    for role in ("actor", "critic"):
        assert largest_difference(results[0][role], results[1][role]) == 0


def critic_norms(models, **ppo) -> list[float]:
    """Of the critic's gradient in four epochs of one minibatch; nothing moves the critic."""
    config = tiny_run.config(models, minibatch_size=8, epochs=4, **ppo)
    still = replace(config.critic, optimizer=OptimizerConfig(lr=0.0))
    trainer = tiny_run.trainer(replace(config, critic=still))
    rollout = trainer.actor.generate(tiny_run.prompts(config.ppo, 0), config.sampling, None)
    norms, take_step = [], trainer.critic.step

    def step():
        norms.append(take_step())
        return norms[-1]

    trainer.critic.step = step
    trainer.update(trainer.make_experience(rollout, StepMetrics(CPU)), StepMetrics(CPU))
    assert trainer.actor.engine.global_steps == (0 if "critic_warmup_steps" in ppo else 2)
    return [float(norm) for norm in norms]


@pytest.mark.parametrize("out", [{"critic_warmup_steps": 1}, {"target_kl": 1e-12}], ids=str)
def test_vf_coef_is_the_critics_also_while_the_actor_is_out(models, out):
    """The actor is out of every epoch, or of the last two."""
    whole = critic_norms(models, update="joint", vf_coef=1.0, **out)
    assert len(whole) == 4 and whole[0] > 0
    small = critic_norms(models, update="joint", vf_coef=0.25, **out)
    assert small == pytest.approx([0.25 * norm for norm in whole], rel=1e-4)
    assert critic_norms(models, update="separate", vf_coef=0.25, **out) == whole


def gradient_of_first_minibatch(trainer, experience):
    """What the actor's optimizer is about to see, by parameter name."""
    found = {}
    take_step = trainer.actor.step

    def step():
        for name, parameter in trainer.actor.lm.named_parameters():
            found.setdefault(name, parameter.grad.clone())
        return take_step()

    trainer.actor.step = step
    trainer.update(experience, StepMetrics(CPU))
    return found


def token_logprobs(lm, ids, mask, length):
    """[B, length, V] of the last tokens, by the model's own forward."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with packed.padded(lm):
        logits = lm(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits[:, -length - 1 : -1].log_softmax(-1)


def hand_made_loss(lm, experience, ppo, text=None):
    """The objective as one writes it on paper, over all rows at once, with every logit."""
    length = experience.response_ids.shape[1]
    table = token_logprobs(lm, experience.input_ids, experience.attention_mask, length)
    logprobs = table.gather(2, experience.response_ids[..., None])[..., 0]
    mask, advantages = experience.response_mask, experience.advantages
    log_ratio = torch.where(mask, logprobs - experience.logprobs, 0.0)
    if ppo.policy_loss == "gspo":
        mean = (log_ratio.sum(1) / mask.sum(1)).detach()
        log_ratio = mean[:, None] + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if ppo.policy_loss == "cispo":
        loss = -clipped.detach() * advantages * logprobs
    elif ppo.policy_loss == "dis":
        loss = -torch.where(clipped == ratio, ratio, 0.0) * advantages
    elif ppo.policy_loss == "sapo":
        tau = torch.where(advantages > 0, ppo.sapo_tau_pos, ppo.sapo_tau_neg)
        loss = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    if ppo.kl_in == "loss":
        difference = logprobs - experience.ref_logprobs
        loss = loss + ppo.kl_coef * ((-difference).exp() - 1 + difference)
    loss = loss + ppo.entropy_coef * (table.exp() * table).sum(-1)
    if ppo.rollout_is_cap:
        factor = (experience.logprobs - experience.rollout_logprobs).exp()
        loss = loss * factor.clamp(max=ppo.rollout_is_cap)
    if ppo.rollout_max_error:
        error = (experience.logprobs - experience.rollout_logprobs).abs().sum(1) / mask.sum(1)
        loss = torch.where(error[:, None] > ppo.rollout_max_error, 0.0, loss)
    if ppo.policy_loss == "dr_grpo":
        return torch.where(mask, loss, 0.0).sum() / (len(mask) * 8)  # max_new_tokens
    total = (torch.where(mask, loss, 0.0).sum(1) / mask.sum(1)).mean()
    if text is not None:
        table = token_logprobs(lm, text, torch.ones_like(text), text.shape[1] - 1)
        total = total - ppo.ptx_coef * table.gather(2, text[:, 1:, None]).mean()
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ptx_coef": 0.3},
        {"rollout_is_cap": 1.2},
        {"entropy_coef": 0.1},
        {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.7},
        {"rollout_max_error": 0.25},
        {"policy_loss": "gspo", "clip_low": 0.05, "clip_high": 0.05},
        {"policy_loss": "cispo", "rollout_is_cap": 1.2},
        {"policy_loss": "sapo", "sapo_tau_pos": 2.0},
        {"policy_loss": "dis"},
        {"policy_loss": "dr_grpo"},
    ],
    ids=lambda changes: changes.get("policy_loss", next(iter(changes), "plain")),
)
def test_the_gradient_is_that_of_the_formula(models, changes):
    config = tiny_run.config(models, epochs=1, minibatch_size=8, **changes)
    trainer = tiny_run.trainer(config, ranks_ppo.Text())
    rollout = trainer.actor.generate(tiny_run.prompts(config.ppo, 0), config.sampling)
    experience = trainer.make_experience(rollout, StepMetrics(CPU))
    torch.manual_seed(0)
    away = torch.where(experience.response_mask, torch.randn_like(experience.logprobs), 0.0)
    experience = type(experience)(
        **experience.tensors()
        | {
            "logprobs": experience.logprobs + 0.2 * away,  # so that the clip takes part
            "ref_logprobs": experience.ref_logprobs - 0.5 * away,
            "rollout_logprobs": experience.rollout_logprobs - 0.3 * away,
        }
    )
    text = ranks_ppo.Text().next_batch() if "ptx_coef" in changes else None
    loss = hand_made_loss(trainer.actor.lm, experience, config.ppo, text)
    if "rollout_max_error" in changes:
        removed = trainer._correction(experience).responses["rejected"]
        assert removed.any() and not removed.all()
    parameters = dict(trainer.actor.lm.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()))
    found = gradient_of_first_minibatch(trainer, experience)
    assert trainer.actor.engine.global_steps == 1
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("rule", "left_out"),
    [({"rollout_is_low": 1.0}, "is_masked"), ({"rollout_seq_low": 2.0}, "seq_masked")],
)
def test_what_a_correction_leaves_out_counts_in_no_figure(models, rule, left_out):
    """Such tokens have no log-prob in the update; without any there is no drift to stop at."""
    config = tiny_run.config(models, epochs=1, minibatch_size=8, target_kl=0.1, **rule)
    trainer = tiny_run.trainer(config)
    figures, _ = trainer.step(tiny_run.prompts(config.ppo, 0))
    share = figures[f"rollout/{left_out}"]
    assert share == 1 if "rollout_seq_low" in rule else 0 < share < 1
    assert figures["rollout/ratio_first_max"] < 1e-3
    if share < 1:
        assert abs(figures["policy/approxkl_avg"]) < 1e-6
        assert figures["policy/entropy_avg"] > 1


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce_pp"])
def test_estimators_without_a_critic(models, estimator):
    trainer, experience = make(models, estimator=estimator, samples_per_prompt=2, kl_coef=0.1)
    assert trainer.critic is None
    assert not experience.values.any()
    figures, _ = trainer.step(tiny_run.prompts(trainer.ppo, 0))
    assert trainer.actor.engine.global_steps == 8
    assert not any(name.startswith(("critic/", "loss/value")) for name in figures)


def test_without_a_kl_there_is_no_reference(models):
    trainer, experience = make(models, kl_coef=0.0)
    assert trainer.roles.reference is None
    assert torch.equal(experience.ref_logprobs, experience.logprobs)


def test_truncated_responses_bootstrap_from_the_critic(models):
    config = tiny_run.config(models, bootstrap_truncated=True, gamma=0.9, lam=0.8)
    config = tiny_run.with_critic(config, models / "reward")
    trainer = tiny_run.trainer(config)
    rollout = trainer.actor.generate(tiny_run.prompts(config.ppo, 0), config.sampling)
    experience = trainer.make_experience(rollout, StepMetrics(CPU))
    values, after = trainer.critic.values(rollout)
    assert after.abs().min() > 1e-3
    assert rollout.finished.any() and not rollout.finished.all()
    for row, length in enumerate(rollout.lengths.tolist()):
        kl = experience.logprobs[row] - experience.ref_logprobs[row]
        later = 0.0 if rollout.finished[row] else float(after[row])
        advantage = 0.0
        for t in reversed(range(length)):
            reward = -0.05 * float(kl[t]) + (
                float(experience.scores[row]) if t == length - 1 else 0
            )
            advantage = reward + 0.9 * later - float(values[row, t]) + 0.9 * 0.8 * advantage
            later = float(values[row, t])
            assert float(experience.returns[row, t]) == pytest.approx(advantage + later, abs=1e-5)


def test_scores_are_shaped_before_they_are_credited(models):
    trainer, experience = make(
        models, missing_eos="replace", missing_eos_value=7.0, score_shift=0.5, score_scale=2.0
    )
    rows = zip(experience.response_ids, experience.response_mask, strict=True)
    live = [ids[mask].tolist() for ids, mask in rows]
    raw = torch.tensor([sum(i % 5 for i in ids) / 4 - 1.5 for ids in live])
    expected = torch.where(experience.finished, (raw - 0.5) / 2.0, -7.0)
    torch.testing.assert_close(experience.scores, expected)


def test_the_sampler_is_trusted_only_within_bounds(models):
    trainer, experience = make(models, old_logprobs="rollout")
    assert torch.equal(experience.logprobs, experience.rollout_logprobs)
    recomputed = trainer.actor.logprobs(experience)
    torch.testing.assert_close(experience.logprobs, recomputed, atol=1e-5, rtol=0)
    wrong = experience.tensors() | {"rollout_logprobs": experience.rollout_logprobs - 0.2}
    with pytest.raises(ValueError, match=r"off by 0\.\d+ nats.*old_logprobs|old_logprobs.*off by"):
        trainer.make_experience(type(experience)(**wrong), StepMetrics(CPU))


def test_the_kl_coefficient_moves_after_the_step(models):
    config = tiny_run.config(
        models, kl_controller="adaptive", kl_target=0.01, kl_horizon=100, kl_coef=0.3
    )
    trainer = tiny_run.trainer(config)
    figures, _ = trainer.step(tiny_run.prompts(config.ppo, 0))
    assert figures["objective/kl_coef"] == 0.3
    assert figures["objective/kl"] == pytest.approx(0, abs=1e-5)  # the reference is the actor
    assert trainer.kl.coef == pytest.approx(0.3 * (1 - 0.2 * 8 / 100))


def test_a_response_cut_by_length_teaches_nothing_where_that_is_wanted(models):
    _, plain = make(models)
    _, filtered = make(models, overlong_filter=True)
    cut = ~plain.finished
    assert 0 < cut.sum() < len(cut)
    assert plain.advantages[cut].any()
    assert not filtered.advantages[cut].any()
    assert torch.equal(filtered.returns[cut], filtered.values[cut])
    assert torch.equal(filtered.advantages[~cut], plain.advantages[~cut])
    assert torch.equal(filtered.scores, plain.scores)


def test_several_samples_per_prompt_with_a_critic(models):
    """GAE by row, whitened over all of them; each minibatch updates both models."""
    trainer, experience = make(models, samples_per_prompt=2)
    assert len(experience) == 16
    half = experience.rows(torch.arange(8)), experience.rows(torch.arange(8, 16))
    assert torch.equal(half[0].prompt_ids, half[1].prompt_ids)
    assert not torch.equal(half[0].response_ids, half[1].response_ids)
    live = experience.advantages[experience.response_mask]
    assert float(live.mean()) == pytest.approx(0, abs=1e-5)
    assert float(live.var()) == pytest.approx(1, abs=1e-4)
    trainer.step(tiny_run.prompts(trainer.ppo, 0))
    assert trainer.actor.engine.global_steps == trainer.critic.engine.global_steps == 8
