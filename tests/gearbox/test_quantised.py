"""Adapters beside weights in 4 bit: what those are, what is learned, generated, saved, exported."""

import argparse
import json
import weakref
from dataclasses import asdict, replace

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gearshift.engine.attention import packed
from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.checkpoint.export import export_role
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import LoraConfig
from gearshift.engine.gearbox.adapters import adapters
from gearshift.engine.gearbox.quantised import BLOCK, BYTES, Linear4bit, packed_layers
from gearshift.engine.models import lora
from gearshift.engine.models.cast import cast
from gearshift.engine.plan import planner
from gearshift.engine.plan.hardware import GPUS, Hardware
from gearshift.engine.zero.state import whole
from gearshift.launch.commands import export
from tests.gearbox.quantised_on_ranks import config, needs_packing, write_models
from tests.gearbox.test_adapters import close
from tests.models.share_on_ranks import run
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    """(what each rank saw, the folder)."""
    out = tmp_path_factory.mktemp("out")
    on_ranks.launch("gearbox/quantised_on_ranks.py", models, out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)], out


@pytest.fixture(scope="module", autouse=True)
def alone():
    with tiny_run.alone():
        yield


def dequantised(models, module):
    """The checkpoint's model in float32, with the weights that are in 4 bit in `module`."""
    plain = AutoModelForCausalLM.from_pretrained(models / "wide").eval()
    for name, layer in packed_layers(module):
        plain.get_submodule(name).weight.data.copy_(layer.whole())
    return plain


def plan_of(made, gpu: str = "h100"):
    """Of one GPU."""
    place = Hardware(gpu=GPUS[gpu], name=gpu, gpus_per_node=1, nodes=1, host_bytes=64e9)
    return planner.plan(made, cast(made), place)


@needs_packing
def test_a_weight_is_nf4_of_blocks_of_64_in_half_a_byte_an_element():
    """Against NF4's definition: the nearest of 16 values of each block's largest magnitude; the
    widest gap between two of them is 0.304, and 8 bit of a magnitude are off by 1 %."""
    torch.manual_seed(0)
    weight = torch.randn(48, 3 * BLOCK)
    layer = Linear4bit(torch.nn.Parameter(weight.clone()), None)
    layer.pack()
    blocks = weight.view(-1, BLOCK)
    most = blocks.abs().amax(1, keepdim=True)
    error = (layer.whole().view(-1, BLOCK) - blocks).abs()
    assert (error <= (0.152 + 0.02) * most).all() and (error > 0.1 * most).any()
    assert all(len(block.unique()) <= 16 for block in layer.whole().view(-1, BLOCK))
    held = layer.weight.nbytes + sum(tensor.nbytes for tensor in layer.magnitudes)
    assert held == pytest.approx(BYTES * weight.numel(), rel=1e-3)
    x = torch.randn(5, 3 * BLOCK, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, x @ layer.whole().t())
    torch.testing.assert_close(x.grad, layer.whole().sum(0).expand_as(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


@needs_packing
def test_a_wider_copy_of_what_a_run_quantised_has_the_same_bits():
    """As an export has, in fp32, of a checkpoint that bf16 has trained on."""
    torch.manual_seed(0)
    wide = torch.randn(8, BLOCK)
    layers = [
        Linear4bit(torch.nn.Parameter(wide.bfloat16()), None),
        Linear4bit(torch.nn.Parameter(wide.clone()), None, rounds=torch.bfloat16),
        Linear4bit(torch.nn.Parameter(wide.clone()), None),
    ]
    for layer in layers:
        layer.pack()
    trained, exported, other = (layer.whole() for layer in layers)
    assert exported.dtype == torch.float32 and torch.equal(exported.bfloat16(), trained)
    assert not torch.equal(other.bfloat16(), trained)


@needs_packing
def test_weights_are_let_go_of_once_they_are_packed(models, monkeypatch):
    alive, counts, real = [], [], Linear4bit.pack

    def pack(layer):
        alive.append(weakref.ref(layer.weight))
        real(layer)
        counts.append(sum(weight() is not None for weight in alive))

    monkeypatch.setattr(Linear4bit, "pack", pack)
    tiny_run.trainer(config(models))
    assert len(counts) == 28 and max(counts) <= 2


@needs_packing
def test_adapters_off_are_the_quantised_base_and_train_alone(models):
    """Its log-probs are the dequantised model's, before and after training, to the bit the same."""
    made = config(models)
    trainer = tiny_run.trainer(made)
    lm, critic = trainer.actor.lm, trainer.critic.model
    assert len(list(packed_layers(lm))) == len(list(packed_layers(critic))) == 14
    before = [layer.whole() for _, layer in packed_layers(lm)]
    _, rows = trainer.step(tiny_run.prompts(made.ppo, 0))
    first = trainer.roles.reference.logprobs(rows)
    plain = dequantised(models, lm)
    found = AutoModelForCausalLM.from_pretrained(models / "wide")
    assert torch.equal(plain.lm_head.weight, found.lm_head.weight)
    live = rows.response_mask[0]
    ids = torch.cat([rows.prompt_ids[0][rows.prompt_mask[0]], rows.response_ids[0][live]])
    count = int(live.sum())
    with torch.no_grad():
        table = plain(ids[None]).logits.log_softmax(-1)
        other = found(ids[None]).logits.log_softmax(-1)
    expected = table[0, -count - 1 : -1].gather(1, ids[-count:, None])[:, 0]
    torch.testing.assert_close(first[0, :count], expected, atol=1e-5, rtol=1e-5)
    assert (other - table).abs().max() > 1e-3  # quantising did something
    trainer.step(tiny_run.prompts(made.ppo, 1))
    assert torch.equal(trainer.roles.reference.logprobs(rows), first)
    assert (trainer.actor.logprobs(rows) - first).abs().max() > 1e-2
    after = [layer.whole() for _, layer in packed_layers(lm)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@needs_packing
@pytest.mark.parametrize("zero", ["zero0", "zero2_bf16"])
def test_layers_that_are_computed_again_learn_the_same(models, zero):
    """In either dtype, which adapters and products have."""
    learned, dtype = [], torch.bfloat16 if "bf16" in zero else torch.float32
    for again in (False, True):
        made = config(models, zero=zero)
        made = replace(made, actor=replace(made.actor, gradient_checkpointing=again))
        trainer = tiny_run.trainer(made)
        assert {layer.state.dtype for _, layer in packed_layers(trainer.actor.lm)} == {dtype}
        figures, _ = trainer.step(tiny_run.prompts(made.ppo, 0))
        assert figures["rollout/logprob_error_max"] <= 10 * torch.finfo(dtype).eps
        assert {a.b.dtype for a in adapters(trainer.actor.lm)} == {dtype}
        learned.append(torch.cat([a.b.detach().flatten() for a in adapters(trainer.actor.lm)]))
    assert torch.equal(*learned) and learned[0].any()


@needs_packing
def test_modules_that_train_whole_are_not_packed(models):
    made = config(models, targets=["v_proj"], modules_to_save=["o_proj"])
    made = replace(made, reference=replace(made.reference, path=str(models / "wide")))
    lm = tiny_run.trainer(made).actor.lm
    found = {name.split(".")[-1] for name, _ in packed_layers(lm)}
    assert found == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert lm.model.layers[0].self_attn.o_proj.weight.requires_grad


@needs_packing
def test_generation_is_the_training_forward_merged_and_beside_at_every_tp_size(two_ranks):
    for rank in two_ranks[0]:
        for case in rank.values():
            assert case["tokens"] == rank["unmerged1"]["tokens"]
            for figures in case["figures"]:
                assert figures["rollout/logprob_error_max"] <= 1e-5
            assert case["figures"][2]["objective/kl_std"] > 0.1  # the adapters do something


@needs_packing
def test_two_ranks_are_one_rank_and_bytes_are_as_planned(two_ranks, models):
    made = config(models)
    trainer = tiny_run.trainer(made)
    for step in range(3):
        figures, _ = trainer.step(tiny_run.prompts(made.ppo, step))
        close(two_ranks[0][0]["unmerged1"]["figures"][step], figures)
    states = {role.name: role.states.gpu for role in plan_of(made).roles}
    for name in ("actor", "critic"):
        held = getattr(trainer, name).sleeper.device_bytes(set())
        assert held["weights"] == pytest.approx(states[name]["weights"], rel=1e-3)


@needs_packing
@pytest.mark.bits
def test_a_base_in_4_bit_is_shared_to_the_bit(models):
    """Held once, planned so, and not shared with a role that has it in 16 bit."""
    numbers, held = [], []
    for share in (False, True):
        made = config(models)
        made = replace(made, critic=replace(made.critic, share_base=share))
        trainer, found = run(made, range(2))
        numbers.append(found)
        held.append(trainer.residence.device_bytes()["critic weights"])
        states = {role.name: role.states.gpu for role in plan_of(made).roles}
        assert held[-1] == pytest.approx(states["critic"]["weights"], rel=1e-2)
    assert numbers[0] == numbers[1]
    assert held[1] < held[0] / 2
    made = replace(made, critic=replace(made.critic, lora=LoraConfig(r=2)))
    with pytest.raises(ConfigError, match="load_in_4bit is False of critic and True of the actor"):
        tiny_run.trainer(made)


@needs_packing
def test_a_run_goes_on_exactly_and_on_another_rank_count(two_ranks, models, tmp_path):
    """Checkpoints hold adapters and the value head; the base is quantised anew, alike."""
    saved = two_ranks[1] / "checkpoints" / "step_000002"
    for role in ("actor", "critic"):
        names = dict(whole(sorted(saved.glob(f"{role}.rank*.safetensors"))))
        assert names and all(".lora_" in n or n.startswith("model.score") for n in names)
    made = config(models)
    other = tiny_run.trainer(made)
    checkpoint.load(saved, other, {})
    figures, _ = other.step(tiny_run.prompts(made.ppo, 2))
    close(figures, two_ranks[0][0]["unmerged1"]["figures"][2])
    tiny_run.save(other, tmp_path / "checkpoints", about={"config": asdict(made)})
    again = tiny_run.trainer(made)
    checkpoint.load(tmp_path / "checkpoints" / "step_000003", again, {})
    tiny_run.same_step(other, again, 3)


@needs_packing
def test_exports_are_the_policy_that_was_trained(two_ranks, models, tmp_path):
    """At the end of a run and from a checkpoint: the merged model, and a directory of peft that
    computes the same on the dequantised base and loads on the checkpoint's."""
    made = config(models)
    trainer = tiny_run.trainer(made)
    saved = two_ranks[1] / "checkpoints" / "step_000002"
    checkpoint.load(saved, trainer, {})
    lm, ids = trainer.actor.lm, torch.arange(3, 9)[None]
    export_role(lm, trainer.actor.tokenizer, tmp_path / "now" / "actor")
    args = argparse.Namespace(checkpoint=str(saved), out=str(tmp_path / "later"), dtype="float32")
    assert export.main(args) == 0
    with torch.no_grad():
        with packed.padded(lm):
            expected = lm(ids).logits
        for folder in ("now", "later"):
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / folder / "actor").eval()
            torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)
            base, beside = dequantised(models, lm), tmp_path / folder / "actor_adapter"
            told = base.state_dict().keys()
            assert merged.state_dict().keys() == told
            adapted = peft.PeftModel.from_pretrained(base, beside).eval()
            torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-5, rtol=1e-5)
        own = AutoModelForCausalLM.from_pretrained(models / "wide")
        assert not torch.allclose(own(ids).logits, expected, atol=1e-3)
        peft.PeftModel.from_pretrained(own, tmp_path / "later" / "actor_adapter")
    assert (tmp_path / "later" / "critic_adapter").is_dir()
    start = replace(
        made.actor,
        path=str(tmp_path / "now" / "actor_adapter"),
        lora=LoraConfig(load_in_4bit=True),
    )
    other = tiny_run.trainer(replace(made, actor=start)).actor.lm
    with torch.no_grad(), packed.padded(other):
        assert torch.equal(other(ids).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero": "zero3"}, "actor.deepspeed=actor_zero3.json: ZeRO-3 does not cut .* in 4 bit"),
        ({"r": 0}, "actor.lora.load_in_4bit=true: quantises what is frozen, .* set lora.r"),
        ({"model": "policy"}, "actor.lora.load_in_4bit=true: .*q_proj has rows of 16"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan(models, change, message):
    model = change.pop("model", None)
    made = config(models, **change)
    if model:
        made = replace(made, actor=replace(made.actor, path=str(models / model)))
    with pytest.raises(ConfigError, match=message):
        plan_of(made)


def test_without_bitsandbytes_it_is_one_line(models, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    message = r"^actor.lora.load_in_4bit=true: needs the package bitsandbytes; install it: pip"
    with pytest.raises(ConfigError, match=message):
        tiny_run.trainer(config(models))


def test_transposed_weights_are_refused():
    made = AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64)
    own = lora.Lora(
        settings=LoraConfig(r=4, load_in_4bit=True), base="x", revision=None, task="CAUSAL_LM"
    )
    with pytest.raises(ConfigError, match="c_attn has a transposed weight"):
        lora.quantisable(AutoModelForCausalLM.from_config(made), own)


def test_a_plan_counts_4_bit_and_generates_beside_them_where_a_copy_does_not_fit(models):
    made = config(models)
    own = replace(made.actor.lora, generate="auto")
    seven = {"path": "shape:qwen2.5-7b", "tokenizer": str(models / "wide")}
    actor = replace(made.actor, lora=own, **seven)
    critic = replace(made.critic, **seven)
    made = replace(made, actor=actor, critic=critic)
    found = plan_of(made, "rtx4090")
    assert found.fits and found.config.actor.lora.generate == "unmerged"
    weights = found.phases[0].gpu["actor weights"]
    # 6.525e9 elements in the layers' seven projections; fp32 for the rest, as the JSON has it.
    assert 6.5e9 * BYTES + 4 * 1.0e9 < weights < 6.6e9 * BYTES + 4 * 1.15e9
    roomy = plan_of(made, "h200")
    assert roomy.fits and roomy.config.actor.lora.generate == "auto"
