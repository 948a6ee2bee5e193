"""Adapters in the generation gear: cut as their weights are, added in its own memory, resumed."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from gearshift.engine.attention import packed
from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.config.check import check
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import DataConfig, LoraConfig, RolloutConfig, SourceConfig
from gearshift.engine.gearbox.adapters import adapters
from gearshift.engine.gearbox.gearbox import Gearbox
from gearshift.engine.gearbox.module import meta_twin
from gearshift.engine.gearbox.slicing import plan_tensor_parallel
from gearshift.engine.models import lora
from gearshift.engine.zero.state import whole
from tests.gearbox.adapters_on_ranks import config
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run

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


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Phi3", "Mixtral"])
def test_every_rank_s_parts_of_an_adapter_are_those_of_its_weight(family, size):
    """Also packed projections, whose shards are several ranges of rows."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**COMMON)
    module = getattr(transformers, f"{family}ForCausalLM")(made)
    plan = plan_tensor_parallel(meta_twin(module), size)
    own = lora.Lora(settings=LoraConfig(r=4), base="x", revision=None, task="CAUSAL_LM")
    lora.adapt(module, own, {"zero_optimization": {"stage": 0}}, seed=0)
    found = adapters(module)
    assert len(found) == (4 if family in ("Phi3", "Mixtral") else 7)
    for adapter in found:
        torch.nn.init.normal_(adapter.b)
        merged = adapter.weight.detach().clone()
        adapter.add_to(merged, adapter.a.detach(), adapter.b.detach())
        specs = plan.specs[f"{adapter.name}.weight"]
        for spec, of_a, of_b in zip(specs, *adapter.specs(specs), strict=True):
            parts = [cut(s, t) for s, t in ((spec, adapter.weight), (of_a, adapter.a))]
            weight, a = parts
            adapter.add_to(weight, a, cut(of_b, adapter.b))
            torch.testing.assert_close(weight, cut(spec, merged), atol=1e-6, rtol=1e-6)


def cut(spec, whole):
    """A rank's part of a parameter, as a shift fills it."""
    part = torch.empty(spec.local_shape)
    spec.extract(whole.detach().reshape(-1), 0, part.view(-1))
    return part


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


def test_merged_generation_is_the_training_forward_at_every_tp_size(two_ranks):
    for rank in two_ranks[0]:
        assert rank["lora1"]["tokens"] == rank["lora2"]["tokens"]
        for case in ("lora1", "lora2"):
            for figures in rank[case]["figures"]:
                assert figures["rollout/logprob_error_max"] <= 1e-5
            assert rank[case]["figures"][2]["objective/kl"] > 0.1  # the adapters do something
            assert rank[case]["left"] == 0


def test_a_shift_moves_what_it_did_and_the_adapters(two_ranks):
    for rank in two_ranks[0]:
        for tp in ("1", "2"):
            plain, own = rank[f"plain{tp}"], rank[f"lora{tp}"]
            assert own["received"] == own["minimum"]
            assert own["received"] == plain["received"] + own["of_adapters"]
            assert own["of_adapters"] > 0


def test_two_ranks_are_one_rank(two_ranks, models, alone):
    made = config(models, 4, 1)
    trainer = tiny_run.trainer(made)
    for step in range(3):
        figures, _ = trainer.step(tiny_run.prompts(made.ppo, step))
        close(two_ranks[0][0]["lora1"]["figures"][step], figures)


def close(found: dict, expected: dict) -> None:
    keys = [k for k in expected if k.startswith(("loss/", "objective/", "policy/", "val/"))]
    assert len(keys) > 8
    for key in [*keys, "actor/grad_norm", "critic/grad_norm"]:
        assert found[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-4), key


@pytest.mark.bits
def test_a_run_goes_on_exactly_and_under_another_stage_and_rank_count(
    two_ranks, models, alone, tmp_path
):
    """Checkpoints hold adapters and the value head, and nothing of the base."""
    saved = two_ranks[1] / "checkpoints" / "step_000002"
    for role in ("actor", "critic"):
        names = dict(whole(sorted(saved.glob(f"{role}.rank*.safetensors"))))
        assert names and all(".lora_" in n or n.startswith("model.score") for n in names)
    made = config(models, 4, 1, "zero0")
    other = tiny_run.trainer(made)
    checkpoint.load(saved, other, {})
    parameters = dict(other.actor.engine.module.named_parameters())
    for name, weights in whole(sorted(saved.glob("actor.rank*.safetensors"))):
        assert torch.equal(weights, parameters[name].detach().reshape(-1))
    figures, _ = other.step(tiny_run.prompts(made.ppo, 2))
    close(figures, two_ranks[0][0]["lora1"]["figures"][2])

    tiny_run.save(other, tmp_path / "checkpoints")
    again = tiny_run.trainer(made)
    checkpoint.load(tmp_path / "checkpoints" / "step_000003", again, {})
    tiny_run.same_step(other, again, 3)


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_alone_only_adapted_weights_are_copied(models, alone, zero):
    """Nothing merged stays in the training weights; resident copies keep their addresses; adapters
    beside the weights need no copy at all, and compute the same."""
    made = config(models, 4, 1, zero)
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
    first, *others = seen.values()
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)
    after = [getattr(p, "ds_tensor", p) for p in lm.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_adapters_beside_the_weights_are_not_cut(models):
    made = config(models, 4, 2)
    own = replace(made.actor.lora, generate="unmerged")
    wrong = replace(made, actor=replace(made.actor, lora=own))
    wrong = replace(wrong, data=DataConfig(sources=[SourceConfig(path="x")]))
    with pytest.raises(ConfigError, match="actor.lora.generate=unmerged: .* rollout.tp=2"):
        check(wrong)
