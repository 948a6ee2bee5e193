"""Roles on one rank: what they compute, and that padding cannot reach it."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from gearshift.engine.batch import Experience, Rollout
from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.checkpoint.export import export
from gearshift.engine.checkpoint.save import Checkpoints
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import PPOConfig, RewardConfig
from gearshift.engine.metrics import StepMetrics
from gearshift.engine.models.heads import HeadOptions
from gearshift.engine.models.load import load_model, load_tokenizer
from gearshift.engine.objective import token_weights
from gearshift.engine.roles import RewardModel, Trained
from tests.tiny import models as tiny
from tests.tiny import run as tiny_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with tiny_run.alone():
        yield tiny_run.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def judged(models):
    """A trainer with a critic that is not zero, and its first experience."""
    config = tiny_run.with_critic(tiny_run.config(models, score_batch_size=3), models / "reward")
    trainer = tiny_run.trainer(config)
    rollout = trainer.actor.generate(tiny_run.prompts(config.ppo, 0), config.sampling)
    experience = trainer.make_experience(rollout, StepMetrics(CPU))
    assert len(set(experience.lengths.tolist())) > 2
    return trainer, experience


def poisoned(experience: Experience, value: float) -> Experience:
    """`value` in every float and other tokens in every id that no mask covers."""
    mask, content = experience.response_mask, experience.tensors()
    for name, tensor in content.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() == 2:
            content[name] = torch.where(mask, tensor, value)
    content["response_ids"] = torch.where(mask, experience.response_ids, 7)
    content["prompt_ids"] = torch.where(experience.prompt_mask, experience.prompt_ids, 9)
    return Experience(**content)


def rollout_of(experience: Experience) -> Rollout:
    return Rollout(**{entry.name: getattr(experience, entry.name) for entry in fields(Rollout)})


def gradients(role, micro, weights):
    loss, stats = role.loss(micro, weights)
    role.backward(loss, last=True)
    parameters = dict(role.engine.module.named_parameters())
    found = {name: p.grad.clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return loss.detach(), found, stats


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e38])
def test_padding_changes_neither_loss_nor_gradient(judged, role, value):
    trainer, experience = judged
    weights = token_weights(experience.response_mask, "token_mean", 8, experience.lengths.sum())
    outside = torch.where(experience.response_mask, weights, value)
    role = getattr(trainer, role)
    loss, found, stats = gradients(role, experience, weights)
    other_loss, other, other_stats = gradients(role, poisoned(experience, value), outside)
    assert torch.isfinite(loss) and torch.equal(loss, other_loss)
    assert any(gradient.any() for gradient in found.values())
    for name, gradient in found.items():
        assert torch.equal(gradient, other[name]), name
    for name, values in stats.items():
        assert torch.equal(values, other_stats[name])


@pytest.mark.parametrize("value", [float("nan"), -1e38])
def test_padding_changes_no_judgement(judged, value):
    trainer, experience = judged
    again = trainer.make_experience(rollout_of(experience), StepMetrics(CPU))
    metrics = StepMetrics(CPU)
    dirty = trainer.make_experience(rollout_of(poisoned(experience, value)), metrics)
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        assert torch.equal(getattr(again, name), getattr(dirty, name)), name
        assert not getattr(dirty, name)[~experience.response_mask].any()
    assert all(number == number for number in metrics.reduce().values())


def test_padding_changes_no_update(models):
    """Every path of the trainer, with importance weights on: the weights after it are equal."""
    after = []
    for value in (0.0, float("nan")):
        trainer = tiny_run.trainer(tiny_run.config(models, rollout_is_cap=2.0))
        rollout = trainer.actor.generate(tiny_run.prompts(trainer.ppo, 0), trainer.config.sampling)
        experience = trainer.make_experience(rollout, StepMetrics(CPU))
        metrics = StepMetrics(CPU)
        trainer.update(poisoned(experience, value), metrics)
        assert all(number == number for number in metrics.reduce().values())
        after.append({**trainer.actor.lm.state_dict(), **trainer.critic.model.state_dict()})
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def own_logprobs(lm, rollout, row):
    """Of one row alone, without padding, by the model's own forward."""
    live = torch.cat(
        [
            rollout.prompt_ids[row][rollout.prompt_mask[row]],
            rollout.response_ids[row][rollout.response_mask[row]],
        ]
    )[None]
    count = int(rollout.lengths[row])
    with torch.no_grad():
        table = lm(input_ids=live).logits.log_softmax(-1)
    return table[0, -count - 1 : -1].gather(1, live[0, -count:, None])[:, 0]


def test_logprobs_and_values_are_those_of_the_checkpoints(models, judged):
    trainer, experience = judged
    lm = AutoModelForCausalLM.from_pretrained(models / "policy")
    judge = AutoModelForSequenceClassification.from_pretrained(models / "reward")
    critic = AutoModelForTokenClassification.from_pretrained(models / "policy", num_labels=1)
    critic.model, critic.score.weight = judge.model, judge.score.weight
    torch.nn.init.zeros_(critic.score.bias)
    _, after = trainer.critic.values(experience)
    for row, count in enumerate(experience.lengths.tolist()):
        expected = own_logprobs(lm, experience, row)
        for name in ("logprobs", "ref_logprobs", "rollout_logprobs"):
            torch.testing.assert_close(
                getattr(experience, name)[row, :count], expected, atol=1e-5, rtol=1e-5
            )
        live = experience.rows(torch.tensor([row])).trimmed()
        with torch.no_grad():
            read = critic.eval()(live.input_ids).logits[0, -count - 1 :, 0]
        torch.testing.assert_close(experience.values[row, :count], read[:-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after[row], read[-1], atol=1e-5, rtol=1e-5)


def test_a_critic_from_the_actor_values_everything_at_zero(models):
    trainer = tiny_run.trainer(tiny_run.config(models))
    rollout = trainer.actor.generate(tiny_run.prompts(trainer.ppo, 0), trainer.config.sampling)
    values, after = trainer.critic.values(rollout)
    assert not values.any() and not after.any()


SEQUENCES_ONLY = {
    "gemma3_text": {"query_pre_attn_scalar": 4, "sliding_window": 4, "num_hidden_layers": 6},
    "olmo2": {},
}


@pytest.mark.parametrize("family", SEQUENCES_ONLY)
def test_a_critic_of_a_family_that_only_classifies_sequences(models, tmp_path, family):
    """It trains, resumes, and starts again from what was exported."""
    shape = tiny.llama_config(tiny_run.VOCABULARY).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "eos_token_id")
    names += ("num_attention_heads", "num_key_value_heads", "pad_token_id", "bos_token_id")
    shape = {name: shape[name] for name in names} | {"initializer_range": 0.2}
    lm = AutoConfig.for_model(family, **shape | {"head_dim": 4} | SEQUENCES_ONLY[family])
    AutoModelForCausalLM.from_config(lm).save_pretrained(tmp_path / "lm")
    tiny.tokenizer(tiny_run.VOCABULARY).save_pretrained(tmp_path / "lm")
    config = tiny_run.config(models, "zero3", str(tmp_path / "lm"))
    trainer = tiny_run.trainer(config)
    _, experience = trainer.step(tiny_run.prompts(config.ppo, 0))
    assert not experience.values.any()  # before the step
    expected, after = trainer.critic.values(experience)
    assert expected.shape == experience.response_ids.shape
    assert expected[experience.response_mask].std() > 1e-3

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, background=False)
    checkpoints.take(trainer, {}, reward=0.0)
    checkpoints.publish()
    export(trainer.critic.model, trainer.actor.tokenizer, tmp_path / "critic")
    resumed = tiny_run.trainer(config)
    checkpoint.load(tmp_path / "checkpoints" / "step_000001", resumed, {})
    again = tiny_run.trainer(tiny_run.with_critic(config, tmp_path / "critic"))
    for other in (resumed, again):
        found = other.critic.values(experience)
        assert torch.equal(found[0], expected) and torch.equal(found[1], after)


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_the_gradient_norm_is_that_before_clipping(models, zero):
    trainer = tiny_run.trainer(tiny_run.config(models, zero))
    rollout = trainer.actor.generate(tiny_run.prompts(trainer.ppo, 0), trainer.config.sampling)
    experience = trainer.make_experience(rollout, StepMetrics(CPU))
    weights = token_weights(experience.response_mask, "seq_sum", 1, experience.lengths.sum())
    trainer.actor.backward(trainer.actor.loss(experience, weights)[0], last=True)
    norm = trainer.actor.step()
    plain = tiny_run.trainer(tiny_run.config(models))
    plain.actor.backward(plain.actor.loss(experience, weights)[0], last=True)
    squares = sum(float((p.grad.double() ** 2).sum()) for p in plain.actor.lm.parameters())
    assert squares**0.5 > 1.0  # above gradient_clipping
    assert norm == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("limits", "rows"), [({}, 2), ({}, None), ({"score_batch_tokens": 1}, None)]
)
@pytest.mark.parametrize("attn", ["auto", "sdpa"])
@pytest.mark.parametrize("deepspeed", ["frozen_zero3", "frozen_zero3_cpu"])
def test_reward_models_read_the_last_live_token_in_any_batch(models, deepspeed, attn, limits, rows):
    place = {"path": str(models / "reward"), "deepspeed": deepspeed}
    config = RewardConfig(**place, kind="model", attn=attn)
    settings = ds_config.load(deepspeed)
    module, tokenizer = load_model(config, "reward", settings), load_tokenizer(config)
    role = RewardModel(module, tokenizer, PPOConfig(**limits), rows, settings)
    sequences = [[1, 5, 0, 2], [4], [0, 0, 0], [6, 7, 8, 9, 10]]  # 0 is a token here, not padding
    judge = AutoModelForSequenceClassification.from_pretrained(models / "reward")
    with torch.no_grad():
        expected = [
            float(judge.score(judge.model(torch.tensor([s])).last_hidden_state)[0, -1, 0])
            for s in sequences
        ]
    found = role.score_ids(sequences)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_head_that_we_get_wrong_is_refused_at_start_up(models, monkeypatch):
    monkeypatch.setattr(HeadOptions, "of", classmethod(lambda cls, config: cls(logit_scale=0.5)))
    with pytest.raises(ValueError, match="LlamaForCausalLM.*differ from ours"):
        tiny_run.trainer(tiny_run.config(models, kl_coef=0.0, estimator="reinforce_pp"))


def test_routers_draw_no_noise_while_they_train():
    """Phi-MoE's would, in training mode; layers that compute again need it."""
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    # So wide that no expert's score is masked: the draw then decides.
    config = AutoConfig.for_model("phimoe", **sizes, router_jitter_noise=9.0)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(12)[None]
    expected = lm(input_ids=ids).logits
    engine = torch.nn.Module()
    engine.module = lm
    Trained.prepare_to_train(SimpleNamespace(engine=engine))
    assert all(layer.training for layer in lm.model.layers)
    assert torch.equal(lm(input_ids=ids).logits, expected)
    assert not torch.equal(lm.train()(input_ids=ids).logits, expected)
