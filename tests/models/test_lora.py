"""Adapters of a role: which layers have them, what they compute, and their directories."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from gearshift.engine import assemble
from gearshift.engine.checkpoint.export import export_role
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import LoraConfig, ModelConfig
from gearshift.engine.gearbox.adapters import adapters, fold, playing
from gearshift.engine.gearbox.quantised import packed_layers
from gearshift.engine.metrics import StepMetrics
from gearshift.engine.models import lora
from gearshift.engine.models.cast import cast, within_actor
from gearshift.engine.models.files import ADAPTER_CONFIG
from gearshift.engine.models.load import prepare
from gearshift.engine.models.shapes import shape_of
from gearshift.engine.objective import token_weights
from gearshift.engine.plan import planner
from gearshift.engine.plan.choice import choices
from gearshift.engine.plan.hardware import GPUS, Hardware
from tests.gearbox.quantised_on_ranks import needs_packing, write_models
from tests.tiny import models as tiny
from tests.tiny import run as tiny_run

WHOLE = {"zero_optimization": {"stage": 0}}
SHAPE = tiny.SHAPE | {"initializer_range": 0.2}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
FAMILIES = {
    "llama": ({}, ATTENTION | MLP),
    "qwen2": ({}, ATTENTION | MLP),
    "gemma2": ({"query_pre_attn_scalar": 4}, ATTENTION | MLP),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
             {"c_attn", "c_proj", "c_fc"}),
}  # fmt: skip


def policy(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family][0])
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return prepare(module, ModelConfig(path="x", attn="eager"), "policy")


def adapted(family: str, **settings) -> lora.Lora:
    return lora.Lora(
        settings=LoraConfig(r=4, **settings), base="x", revision=None, task="CAUSAL_LM"
    )


@torch.no_grad()
def spread(module) -> None:
    """Adapters as training leaves them: B is not 0, and m no longer the length of W's rows."""
    torch.manual_seed(1)
    for adapter in adapters(module):
        torch.nn.init.normal_(adapter.b, std=0.3)
        if adapter.m is not None:
            adapter.m.mul_(1 + 0.3 * torch.rand_like(adapter.m))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_base_to_the_bit_and_folded_is_on(family, dora, caplog):
    module, ids = policy(family), torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = module(ids).logits
    names = dict(module.named_parameters()).keys()
    made = adapted(family, rslora=family == "llama", dora=dora)
    lora.adapt(module, made, WHOLE, seed=3)
    assert all((adapter.m is not None) == dora for adapter in adapters(module))
    with torch.no_grad():
        assert torch.equal(module(ids).logits, before)
    assert {a.name.split(".")[-1] for a in adapters(module)} == FAMILIES[family][1]
    assert all((".lora_" in n) == p.requires_grad for n, p in module.named_parameters())
    assert ("experts" in caplog.text) == (family == "mixtral")
    spread(module)
    with torch.no_grad():
        on = module(ids).logits
        with playing(module, None):
            assert torch.equal(module(ids).logits, before)
        assert (on - before).abs().max() > 1e-2
        fold(module)
        assert dict(module.named_parameters()).keys() == names
        torch.testing.assert_close(module(ids).logits, on, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["wq"]}, r"lora.targets=\['wq'\]: .* has the name wq; there are down_proj"),
        (
            {"targets": ["lm_head"]},
            "inside the decoder layers has the name lm_head",
        ),
        ({"targets": []}, r"lora.targets=\[\]: names no layer; use auto, or names"),
        ({"modules_to_save": ["head"]}, "lora.modules_to_save='head': the model has no weights"),
        ({"modules_to_save": [""]}, "lora.modules_to_save='': the model has no weights"),
        ({"modules_to_save": ["q_proj"]}, "lora.modules_to_save='q_proj': it has adapters"),
        ({"modules_to_save": ["mlp"]}, "lora.modules_to_save='mlp': it has adapters"),
    ],
)
def test_layers_that_are_not_there_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        lora.inject(policy("llama"), adapted("llama", **settings))


def test_a_start_names_the_role_whose_layers_are_not_there(models):
    """Planning builds the adapters first."""
    config = with_lora(tiny_run.config(models), critic=False, targets=["wq"])
    place = Hardware(gpu=GPUS["h100"], name="x", gpus_per_node=1, nodes=1, host_bytes=64e9)
    with pytest.raises(ConfigError, match=r"^actor.lora.targets=\['wq'\]: "):
        planner.plan(config, cast(config), place)


def test_keys_that_adapters_leave_without_effect_are_told(models, tmp_path):
    (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    config = tiny_run.config(models)
    for path, settings, expected in (
        (None, {"alpha": 8.0}, "actor.lora.alpha=8.0: has no effect; actor.lora.r=0: every"),
        (None, {"r": 4, "base": "x"}, "actor.lora.base=x: has no effect; actor.path is no"),
        (tmp_path, {"alpha": 8.0, "base": "x"}, "actor.lora.alpha=8.0: has no effect; those in"),
        (tmp_path, {"dora": True, "base": "x"}, "actor.lora.dora=True: has no effect; those in"),
        (None, {"r": 4, "alpha": 8.0}, None),
        (None, {}, None),
    ):
        own = replace(
            config.actor, path=str(path or config.actor.path), lora=LoraConfig(**settings)
        )
        said = assemble.told(SimpleNamespace(config=replace(config, actor=own), cast={}))
        found = [line for line in said if "no effect" in line]
        assert len(found) == bool(expected) and all(line.startswith(expected) for line in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generate": "unmerged"}, "^actor.lora.generate=unmerged: DoRA's norms .*; use merged"),
        ({"load_in_4bit": True}, "^actor.lora.load_in_4bit=true: DoRA reads weights .* whole"),
    ],
)
def test_what_dora_cannot_be_with_is_refused(models, settings, message):
    config = with_lora(tiny_run.config(models), critic=False, dora=True, **settings)
    with pytest.raises(ConfigError, match=message):
        tiny_run.trainer(config)


def test_dora_with_an_old_peft_is_one_line(monkeypatch):
    """Which has nowhere to say that a layer computes something else."""
    real = peft.inject_adapter_in_model

    def old(config, module, *args, **kwargs):
        real(config, module, *args, **kwargs)
        for adapter in adapters(module):
            del module.get_submodule(adapter.name).lora_variant

    monkeypatch.setattr(peft, "inject_adapter_in_model", old)
    lora.inject(policy("llama"), adapted("llama"))
    with pytest.raises(ConfigError, match=r"^lora.dora=true: needs peft 0.19 or newer"):
        lora.inject(policy("llama"), adapted("llama", dora=True))


def test_the_plan_leaves_dora_merged_and_counts_magnitudes(models):
    config = with_lora(tiny_run.config(models), critic=False, dora=True)
    asked = {choice.actor.lora.generate for choice in choices(config, ["actor"], shared=False)}
    assert asked == {"auto"}
    plain = with_lora(config, critic=False)
    asked = {choice.actor.lora.generate for choice in choices(plain, ["actor"], shared=False)}
    assert asked == {"auto", "unmerged"}
    own, other = (cast(made)["actor"] for made in (config, plain))
    own, other = (shape_of(part.hf_config, "policy", part.lora) for part in (own, other))
    rows = sum(len(a.b) for a in adapters(tiny_run.trainer(config).actor.lm))
    assert own.magnitudes == own.updated - other.updated == own.total - other.total == rows


def test_without_peft_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"^lora: adapters need the package peft; install it"):
        lora.inject(policy("llama"), adapted("llama"))


def test_modules_to_save_train_whole_and_are_no_reference(models):
    config = with_lora(tiny_run.config(models), modules_to_save=["lm_head"])
    assert within_actor(config) is None and "reference" in cast(config)
    trainer = tiny_run.trainer(config)
    before = trainer.actor.lm.lm_head.weight.detach().clone()
    trainer.step(tiny_run.prompts(config.ppo, 0))
    assert not torch.equal(trainer.actor.lm.lm_head.weight, before)
    tied = with_lora(tiny_run.config(models, model="tied"), modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="its weights are those of another module"):
        tiny_run.trainer(tied)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with tiny_run.alone():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def with_lora(config, critic: bool = True, **settings):
    own = LoraConfig(**{"r": 4, "alpha": 8.0} | settings)
    config = replace(config, actor=replace(config.actor, lora=own))
    theirs = LoraConfig(r=2, dora=own.dora)
    return replace(config, critic=replace(config.critic, lora=theirs)) if critic else config


@pytest.mark.parametrize(
    ("zero", "dora"), [("zero0", False), ("zero2", False), ("zero3", False), ("zero2", True)]
)
def test_only_adapters_and_the_value_head_train(models, zero, dora):
    config = with_lora(tiny_run.config(models, zero, lr=1e-2), dora=dora)
    trainer = tiny_run.trainer(config)
    roles = {"actor": trainer.actor.lm, "critic": trainer.critic.model}
    state = {role: whole(module) for role, module in roles.items()}
    trainer.step(tiny_run.prompts(config.ppo, 0))
    assert not trainer.guards.drain()
    for role, module in roles.items():
        after = whole(module)
        changed = {n for n, value in after.items() if not torch.equal(value, state[role][n])}
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        assert changed == trained
        heads = {n for n in trained if ".lora_" not in n}
        assert heads == ({"score.weight", "score.bias"} & trained if role == "critic" else set())
        assert all(p.grad is None for n, p in module.named_parameters() if n not in trained)


def whole(module) -> dict:
    found = {}
    for name, p in module.named_parameters():
        part = getattr(p, "ds_tensor", p)
        found[name] = part.detach().clone()
    return found


def test_the_reference_is_the_base_to_the_bit(models):
    """As the model of its own that it is without adapters; also once they have trained."""
    config = with_lora(tiny_run.config(models, lr=1e-2), critic=False)
    trainer, plain = tiny_run.trainer(config), tiny_run.trainer(tiny_run.config(models))
    assert type(trainer.roles.reference).__name__ == "ActorsStart"
    told = assemble.told(SimpleNamespace(config=config, cast={}))
    assert told == ["reference: the actor with its adapters off, at no memory of its own"]
    for step in range(2):
        _, rows = trainer.step(tiny_run.prompts(config.ppo, step))
    expected = plain.actor.logprobs(rows)
    assert torch.equal(trainer.roles.reference.logprobs(rows), expected)
    assert torch.equal(plain.roles.reference.logprobs(rows), expected)
    assert (trainer.actor.logprobs(rows) - expected).abs().max() > 0.05
    assert torch.equal(trainer.roles.reference.logprobs(rows), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_in_updates_alone_and_alike_where_layers_are_computed_again(models, dora):
    learned = {}
    for rate, again in ((0.0, False), (0.5, False), (0.5, True)):
        config = with_lora(tiny_run.config(models, lr=1e-2), critic=False, dropout=rate, dora=dora)
        actor = replace(config.actor, gradient_checkpointing=again)
        trainer = tiny_run.trainer(replace(config, actor=actor))
        torch.manual_seed(7)
        _, rows = trainer.step(tiny_run.prompts(config.ppo, 0))
        learned[rate, again] = torch.cat(
            [a.b.detach().flatten() for a in adapters(trainer.actor.lm)]
        )
        assert torch.equal(trainer.actor.logprobs(rows), trainer.actor.logprobs(rows))
    assert (learned[0.5, False] - learned[0.0, False]).abs().max() > 1e-3
    assert torch.equal(learned[0.5, True], learned[0.5, False])


@pytest.mark.parametrize(
    ("model", "dora"),
    [("policy", False), pytest.param("wide", False, marks=needs_packing), ("wide", True)],
)
def test_gradients_are_those_of_a_float64_model(models, model, dora):
    """Of A and B, by the plain model's forward with weights W + s B A: at full rank, and beside
    weights in 4 bit, which are dequantised for it. Of A, B and m with m (W + s B A) over the norms
    of its rows, which are constants (DoRA's sections 4.1 and 4.3); layers have biases."""
    config, packs = tiny_run.config(models, model=model), model == "wide" and not dora
    config = with_lora(config, critic=False, r=16, alpha=8.0, load_in_4bit=packs, dora=dora)
    trainer = tiny_run.trainer(config)
    actor = trainer.actor
    spread(actor.lm)
    rollout = actor.generate(tiny_run.prompts(trainer.ppo, 0), config.sampling)
    rows = trainer.make_experience(rollout, StepMetrics(torch.device("cpu")))
    rows = replace(rows, logprobs=rows.logprobs + 0.1 * torch.randn(rows.logprobs.shape))
    live = rows.response_mask
    weights = token_weights(live, "seq_sum", 1, live.sum())
    actor.backward(actor.loss(rows, weights)[0], last=False)

    plain = AutoModelForCausalLM.from_pretrained(models / model).double()
    layers = dict(packed_layers(actor.lm))
    assert len(layers) == 14 * packs
    for name, layer in layers.items():
        plain.get_submodule(name).weight.data.copy_(layer.whole())
    leaves, merged = [], {n: p.detach() for n, p in plain.named_parameters()}
    for adapter in adapters(actor.lm):
        a, b, *m = parts = [part.detach().double().requires_grad_() for part in adapter.parts]
        leaves += zip(parts, [part.grad for part in adapter.parts], strict=True)
        weight = merged[f"{adapter.name}.weight"] + 0.5 * b @ a
        if dora:
            weight = m[0][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
        merged[f"{adapter.name}.weight"] = weight
    loss = 0.0
    for row in range(len(rows)):
        ids = torch.cat(
            [rows.prompt_ids[row][rows.prompt_mask[row]], rows.response_ids[row][live[row]]]
        )
        count = int(live[row].sum())
        table = functional_call(plain, merged, (ids[None],)).logits.log_softmax(-1)
        logp = table[0, -count - 1 : -1].gather(1, ids[-count:, None])[:, 0]
        old, gain = rows.logprobs[row, :count].double(), rows.advantages[row, :count].double()
        ratio = (logp - old).exp()
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        loss = loss - (weights[row, :count].double() * surrogate).sum()
    loss.backward()
    for leaf, found in leaves:
        torch.testing.assert_close(found.double(), leaf.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_directories_of_peft_go_out_and_come_in(models, tmp_path, dora):
    """Merged and beside its base a model computes the same; the adapters are a start."""
    config = with_lora(tiny_run.config(models, "zero3", lr=1e-2), dora=dora)
    trainer = tiny_run.trainer(config)
    _, rows = trainer.step(tiny_run.prompts(config.ppo, 0))
    for role, module in (("actor", trainer.actor.lm), ("critic", trainer.critic.model)):
        out = export_role(module, trainer.actor.tokenizer, tmp_path / role)
        assert [path.name for path in out] == [role, f"{role}_adapter"]
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        for auto, role, labels in (
            (AutoModelForCausalLM, "actor", {}),
            (AutoModelForTokenClassification, "critic", {"num_labels": 1}),
        ):
            base = auto.from_pretrained(models / "policy", **labels)
            beside = peft.PeftModel.from_pretrained(base, tmp_path / f"{role}_adapter").eval()
            merged = auto.from_pretrained(tmp_path / role).eval()
            torch.testing.assert_close(beside(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
            assert any("magnitude" in name for name, _ in beside.named_parameters()) == dora
    start = tmp_path / "actor_adapter"
    again = replace(
        config,
        actor=replace(config.actor, path=str(start), lora=LoraConfig()),
        critic=replace(config.critic, path=str(tmp_path / "critic_adapter"), lora=LoraConfig()),
    )
    assert within_actor(again) == "start"
    other = tiny_run.trainer(again)
    expected = trainer.actor.logprobs(rows)
    assert torch.equal(other.actor.logprobs(rows), expected)
    assert torch.equal(other.critic.values(rows)[0], trainer.critic.values(rows)[0])
    other.step(tiny_run.prompts(config.ppo, 1))
    assert torch.equal(other.roles.reference.logprobs(rows), expected)
    assert not torch.equal(other.actor.logprobs(rows), expected)
    named = replace(again, reference=replace(again.reference, path=str(models / "policy")))
    assert within_actor(named) == "base"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lora_bias": True}, r"neither plain LoRA nor DoRA \(lora_bias=True\)"),
        ({"peft_type": "VERA"}, r"neither plain LoRA nor DoRA \(VERA\)"),
        ({"use_dora": True}, r"lora_magnitude_vector is absent in adapter_model.safetensors"),
        ({"base_model_name_or_path": None}, "actor.lora.base=null: .* names no base model"),
        ({"r": 2}, "is .* in adapter_model.safetensors and"),
        (
            {"r": None},
            "actor.path=.*: r is None in adapter_config.json; it must be a number above 0",
        ),
        ({"r": "4"}, "r is '4' in adapter_config.json"),
        ({"lora_alpha": None}, "lora_alpha is None in adapter_config.json"),
        ({"base_model_name_or_path": "/gone"}, "actor.lora.base='/gone': no such directory"),
    ],
)
def test_directories_that_do_not_fit_are_refused(models, tmp_path, change, key):
    module = policy("llama")
    lora.adapt(module, adapted("llama"), WHOLE, seed=0)
    module.config.vocab_size = tiny_run.VOCABULARY
    export_role(module, tiny.tokenizer(tiny_run.VOCABULARY), tmp_path / "x")
    folder = tmp_path / "x_adapter"
    stored = json.loads((folder / ADAPTER_CONFIG).read_text())
    stored |= {"base_model_name_or_path": str(models / "policy")} | change
    (folder / ADAPTER_CONFIG).write_text(json.dumps(stored))
    config = tiny_run.config(models)
    with pytest.raises(ConfigError, match=key):
        tiny_run.trainer(replace(config, actor=replace(config.actor, path=str(folder))))


def test_a_reference_with_adapters_beside_its_weights_is_refused(models, tmp_path):
    folder = shutil.copytree(models / "policy", tmp_path / "both")
    (folder / ADAPTER_CONFIG).write_text("{}")
    config = tiny_run.config(models)
    config = replace(config, reference=replace(config.reference, path=str(folder)))
    with pytest.raises(ConfigError, match="^reference.path='.*both': holds adapters, which a ref"):
        assemble.draw_up(config)


def test_the_start_is_drawn_alike_and_is_kaiming_s(models):
    first, second = policy("llama"), policy("llama")
    for module in (first, second):
        torch.manual_seed(id(module) % 1000)
        lora.adapt(module, adapted("llama"), WHOLE, seed=5)
    for one, two in zip(adapters(first), adapters(second), strict=True):
        assert torch.equal(one.a, two.a) and not one.b.any()
        bound = one.a.shape[1] ** -0.5
        assert 0.8 * bound < one.a.abs().max() <= bound
