"""nn.functional.linear while generating: what is lifted, what is left, and the head's fp32."""

import pytest
import torch
import torch.nn.functional as F

from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout import linear
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.linear import Products, generation_linear
from gearshift.kernels import ops
from tests.tiny import rollout as tiny


def test_deepspeeds_wrapper_is_lifted_and_put_back():
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = F.linear
    F.linear = zero3_linear_wrap
    try:
        with pytest.raises(ZeroDivisionError), generation_linear(tiny.build("Llama")):
            assert F.linear is torch._C._nn.linear
            1 / 0  # noqa: B018
        assert F.linear is zero3_linear_wrap
    finally:
        F.linear = before


def test_a_replacement_of_unknown_origin_stays(monkeypatch):
    def quantized(input, weight, bias=None):
        return input

    monkeypatch.setattr(F, "linear", quantized)
    with generation_linear(tiny.build("Llama").bfloat16()):
        assert F.linear is quantized
    assert F.linear is quantized


@torch.no_grad()
def test_a_head_of_16_bits_gives_the_logits_that_training_has():
    model = tiny.build("Llama").bfloat16()
    hidden = torch.randn(2, 5, model.config.hidden_size).bfloat16()
    ids = torch.randint(131, (10,))
    with generation_linear(model):
        logits = model.lm_head(hidden)
        inner = model.model.layers[0].mlp.up_proj(hidden)
    assert logits.dtype == torch.float32 and inner.dtype == torch.bfloat16
    chosen = logits.flatten(0, 1).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    trained = ops.linear_logprob(hidden.flatten(0, 1), model.lm_head.weight, ids)[0]
    assert (chosen - trained).abs().max() < 1e-5
    rounded = model.lm_head(hidden).float().flatten(0, 1).log_softmax(-1).gather(1, ids[:, None])
    assert (rounded[:, 0] - trained).abs().max() > 1e-3, "what it would be without"


def test_layers_of_one_input_become_one_product():
    model = tiny.build("Qwen2")
    products, x = Products(model, grouped=True), torch.randn(1, 5, model.config.hidden_size)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad(), generation_linear(model, products):
        with products.watching():
            model(torch.tensor([[3]]), use_cache=False)
        products.refresh()
        apart = [layer(x) for layer in layers]  # the first makes all three
        again = attention.k_proj(x)  # and is asked for once more
        x.mul_(2)
        assert not torch.equal(attention.q_proj(x), apart[0]), "of what x was before"
        up, other = mlp.up_proj(x), mlp.gate_proj(x + 0)
        with torch.no_grad():
            mlp.gate_proj.weight.add_(1)
        assert torch.equal(mlp.gate_proj(x + 0), other), "a copy, until it is refreshed"
        products.refresh()
        assert not torch.equal(mlp.gate_proj(x + 0), other)
    assert products.nbytes == 4 * sum(
        layer.weight.numel()
        for block in model.model.layers
        for layer in (
            *(getattr(block.self_attn, f"{name}_proj") for name in "qkv"),
            block.mlp.gate_proj,
            block.mlp.up_proj,
        )
    )
    x.div_(2)
    with torch.no_grad():
        for layer, found in zip(layers, apart, strict=True):
            torch.testing.assert_close(found, layer(x))
        torch.testing.assert_close(again, attention.k_proj(x))
        torch.testing.assert_close(up, mlp.up_proj(2 * x))
    products.release()
    assert products.nbytes == 0


def test_wide_layers_stay_apart(monkeypatch):
    monkeypatch.setattr(linear, "NARROW", 4 * 48 * 80 - 1)  # q, k and v have 80 outputs
    model = tiny.build("Llama")
    products = Products(model, grouped=True)
    with torch.no_grad(), generation_linear(model, products):
        with products.watching():
            model(torch.tensor([[3]]), use_cache=False)
        products.refresh()
    assert products.nbytes == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_generates_the_same_with_grouped_layers(family):
    model = tiny.build(family)
    prompts, sampling = tiny.make_prompts([11, 1, 26, 5]), SamplingConfig(max_new_tokens=10)

    def run(grouped):
        config = RolloutConfig(block_size=4, cuda_graphs=False)
        engine = RolloutEngine(model, config, eos_token_ids=[130_000], pad_token_id=0)
        engine._products = Products(model, grouped=grouped)
        first, second = (engine.generate(prompts, sampling, [3, 1, 4, 1]) for _ in range(2))
        assert first == second
        return first, engine._products.nbytes

    (expected, none), (found, some) = run(False), run(True)
    assert not none and bool(some) == (family not in ("Phi3", "GPT2"))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    logprobs = [torch.tensor([c.logprobs for c in made]) for made in (found, expected)]
    torch.testing.assert_close(*logprobs, atol=1e-5, rtol=0)


def test_a_kept_cache_does_not_keep_old_weights():
    model, made = tiny.build("Llama"), []
    prompts, sampling = tiny.make_prompts([11, 5]), SamplingConfig(max_new_tokens=10)
    config = RolloutConfig(block_size=4, cuda_graphs=False)
    engine = RolloutEngine(model, config, eos_token_ids=[130_000], pad_token_id=0)
    engine._products = Products(model, grouped=True)
    for _ in range(2):
        made.append(engine.generate(prompts, sampling, [3, 1]))
        model.model.layers[0].self_attn.q_proj.weight.data.neg_()
    assert made[0] != made[1]
    assert made[0] == engine.generate(prompts, sampling, [3, 1]), "the first weights again"
