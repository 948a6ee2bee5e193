"""Adapters in the generation gear: cut as their weights are, added in its own memory, resumed."""

import argparse
import json
from dataclasses import asdict, replace

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from transformers.pytorch_utils import Conv1D

from gearshift.engine.attention import packed
from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.config.check import check
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import DataConfig, LoraConfig, RolloutConfig, SourceConfig
from gearshift.engine.gearbox import adapters as folding
from gearshift.engine.gearbox.adapters import adapters, add_magnitude
from gearshift.engine.gearbox.gearbox import Gearbox
from gearshift.engine.gearbox.module import meta_twin
from gearshift.engine.gearbox.slicing import plan_tensor_parallel
from gearshift.engine.models import lora
from gearshift.engine.rollout.linear import Products
from gearshift.engine.zero.state import whole
from gearshift.launch.commands import export
from tests.gearbox.adapters_on_ranks import config
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run

kinds = pytest.mark.parametrize("kind", ["lora", "dora"])
SCRIPT = "gearbox/adapters_on_ranks.py"
COMMON = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=66,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Phi3", "Mixtral"])
def test_every_rank_s_parts_of_an_adapter_are_those_of_its_weight(family, size, dora, monkeypatch):
    """Also packed projections, whose shards are several ranges of rows. Of DoRA, where ranks have
    columns, the squares of all are summed."""
    monkeypatch.setattr(folding, "BLOCK", 500)  # several to a weight
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**COMMON)
    module = getattr(transformers, f"{family}ForCausalLM")(made)
    plan = plan_tensor_parallel(meta_twin(module), size)
    own = lora.Lora(settings=LoraConfig(r=4, dora=dora), base="x", revision=None, task="CAUSAL_LM")
    lora.adapt(module, own, {"zero_optimization": {"stage": 0}}, seed=0)
    found = adapters(module)
    assert len(found) == (4 if family in ("Phi3", "Mixtral") else 7)
    for adapter in found:
        torch.nn.init.normal_(adapter.b)
        merged = adapter.weight.detach().clone()
        whole = [part.detach() for part in adapter.parts]
        squares = (merged + adapter.scaling * whole[1] @ whole[0]).square().sum(1)
        adapter.add_to(merged, whole)
        specs = plan.specs[f"{adapter.name}.weight"]
        column = f".{adapter.name.split('.')[-1]}" in (".o_proj", ".down_proj")
        assert (len(set(adapter.specs(specs)[0])) > 1) == column
        monkeypatch.setattr(dist, "all_reduce", lambda own, group, of=squares: own.copy_(of))
        group = "the ranks" if column else None
        for spec, *others in zip(specs, *adapter.specs(specs), strict=True):
            weight = cut(spec, adapter.weight)
            parts = [cut(of, part) for of, part in zip(others, whole, strict=True)]
            adapter.add_to(weight, parts, group)
            rtol = 1e-5 if dora else 1e-6
            torch.testing.assert_close(weight, cut(spec, merged), atol=1e-6, rtol=rtol)


def cut(spec, whole):
    """A rank's part of a parameter, as a shift fills it."""
    part = torch.empty(spec.local_shape)
    spec.extract(whole.detach().reshape(-1), 0, part.view(-1))
    return part


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_of_dora_computes_what_peft_s_own_does(transposed, monkeypatch):
    """Its output and gradients, with dropout in training too, from the same random numbers."""
    monkeypatch.setattr(folding, "BLOCK", 100)  # several to a weight
    torch.manual_seed(0)
    kind = Conv1D(12, 20) if transposed else torch.nn.Linear(20, 12)
    module = torch.nn.ModuleDict({"layer": kind})
    settings = peft.LoraConfig(r=4, target_modules=["layer"], lora_dropout=0.5, use_dora=True)
    settings.fan_in_fan_out = transposed
    layer = peft.inject_adapter_in_model(settings, module)["layer"]
    torch.nn.init.normal_(layer.lora_B.default.weight)
    torch.nn.init.normal_(layer.base_layer.bias)
    before = layer.lora_magnitude_vector.default.weight
    before.data *= 1 + torch.rand(12)
    x, found = torch.randn(7, 20, requires_grad=True), {}
    for own in (False, True):
        if own:
            add_magnitude(layer, "default")
            layer.lora_magnitude_vector.default.weight = torch.nn.Parameter(before.detach())
        for training in (False, True):
            torch.manual_seed(1)
            y = layer.train(training)(x)
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            found[own, training] = [y, *torch.autograd.grad((y**2).sum(), leaves)]
    for training in (False, True):
        assert len(found[True, training]) == 5
        pair = found[True, training], found[False, training]
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_run.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    """(what each rank saw, the folder)."""
    out = tmp_path_factory.mktemp("out")
    on_ranks.launch(SCRIPT, models, out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)], out


@pytest.fixture(scope="module")
def alone(models):
    with tiny_run.alone():
        yield


@kinds
def test_merged_generation_is_the_training_forward_at_every_tp_size(two_ranks, kind):
    for rank in two_ranks[0]:
        assert rank[f"{kind}1"]["tokens"] == rank[f"{kind}2"]["tokens"]
        for case in (f"{kind}1", f"{kind}2"):
            for figures in rank[case]["figures"]:
                assert figures["rollout/logprob_error_max"] <= 1e-5
            kls = [figures["objective/kl"] for figures in rank[case]["figures"]]
            # The adapters do something. Of DoRA's first steps it is a noisy estimate.
            assert kls[2] > 0.1 if kind == "lora" else max(map(abs, kls)) > 0.01
            assert rank[case]["left"] == 0


@kinds
def test_a_shift_moves_what_it_did_and_the_adapters(two_ranks, kind):
    for rank in two_ranks[0]:
        for tp in ("1", "2"):
            plain, own = rank[f"plain{tp}"], rank[f"{kind}{tp}"]
            assert own["received"] == own["minimum"]
            assert own["received"] == plain["received"] + own["of_adapters"]
            assert own["of_adapters"] > (kind == "dora" and rank[f"lora{tp}"]["of_adapters"])


@kinds
def test_two_ranks_are_one_rank(two_ranks, models, alone, kind):
    made = config(models, kind)
    trainer = tiny_run.trainer(made)
    for step in range(3):
        figures, _ = trainer.step(tiny_run.prompts(made.ppo, step))
        close(two_ranks[0][0][f"{kind}1"]["figures"][step], figures)


def close(found: dict, expected: dict) -> None:
    keys = [k for k in expected if k.startswith(("loss/", "objective/", "policy/", "val/"))]
    assert len(keys) > 8
    for key in [*keys, "actor/grad_norm", "critic/grad_norm"]:
        assert found[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-4), key


@kinds
def test_a_run_goes_on_exactly_and_under_another_stage_and_rank_count(
    two_ranks, models, alone, tmp_path, kind
):
    """Checkpoints hold adapters and the value head, and nothing of the base; they are exported as
    the model that was trained."""
    saved = two_ranks[1] / kind / "step_000002"
    for role in ("actor", "critic"):
        names = dict(whole(sorted(saved.glob(f"{role}.rank*.safetensors"))))
        assert names and all(".lora_" in n or n.startswith("model.score") for n in names)
    made = config(models, kind, zero="zero0")
    other = tiny_run.trainer(made)
    checkpoint.load(saved, other, {})
    parameters = dict(other.actor.engine.module.named_parameters())
    for name, weights in whole(sorted(saved.glob("actor.rank*.safetensors"))):
        assert torch.equal(weights, parameters[name].detach().reshape(-1))
    figures, _ = other.step(tiny_run.prompts(made.ppo, 2))
    close(figures, two_ranks[0][0][f"{kind}1"]["figures"][2])

    tiny_run.save(other, tmp_path / "checkpoints", about={"config": asdict(made)})
    saved, lm, ids = tmp_path / "checkpoints" / "step_000003", other.actor.lm, torch.arange(3, 9)
    with torch.no_grad(), packed.padded(lm):
        expected = lm(ids[None]).logits
        args = argparse.Namespace(checkpoint=str(saved), out=str(tmp_path), dtype="float32")
        assert export.main(args) == 0
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "actor").eval()
        torch.testing.assert_close(merged(ids[None]).logits, expected, atol=1e-5, rtol=1e-5)
    again = tiny_run.trainer(made)
    checkpoint.load(saved, again, {})
    tiny_run.same_step(other, again, 3)


@pytest.mark.parametrize(
    ("zero", "kind"), [("zero0", "lora"), ("zero3", "lora"), ("zero3", "dora")]
)
def test_alone_only_adapted_weights_are_copied(models, alone, zero, kind):
    """Nothing merged stays in the training weights; resident copies keep their addresses; adapters
    beside the weights need no copy at all, and compute the same, DoRA by its layers."""
    made = config(models, kind, zero=zero)
    trainer = tiny_run.trainer(made)
    _, rows = trainer.step(tiny_run.prompts(made.ppo, 0))
    lm, ids, seen = trainer.actor.lm, torch.arange(3, 9)[None], {}
    before = [getattr(p, "ds_tensor", p).detach().clone() for p in lm.parameters()]
    for weights in ("release", "resident"):
        for merged in (True, False):
            place = RolloutConfig(tp=1, weights=weights)
            gearbox = Gearbox(trainer.actor.engine, lm, place, device=ids.device, merged=merged)
            addresses = []
            for _ in range(2):
                with gearbox.generation() as module, torch.no_grad(), packed.padded(module):
                    seen[weights, merged] = module(ids).logits
                    addresses.append([p.data_ptr() for p in module.parameters()])
            copied = sum(a.weight.ds_numel if zero == "zero3" else a.weight.numel()
                         for a in adapters(lm))  # fmt: skip
            assert gearbox.stats.shard_bytes == (4 * copied if merged else 0)
            assert weights == "release" or addresses[0] == addresses[1]
            # Beside an adapter no layer is copied to make one product of it and its A.
            assert Products(gearbox.module, grouped=True).grouped == merged
    first, *others = seen.values()
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)
    after = [getattr(p, "ds_tensor", p) for p in lm.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_adapters_beside_the_weights_are_not_cut(models):
    made = config(models, "lora", 2)
    own = replace(made.actor.lora, generate="unmerged")
    wrong = replace(made, actor=replace(made.actor, lora=own))
    wrong = replace(wrong, data=DataConfig(sources=[SourceConfig(path="x")]))
    with pytest.raises(ConfigError, match="actor.lora.generate=unmerged: .* rollout.tp=2"):
        check(wrong)
