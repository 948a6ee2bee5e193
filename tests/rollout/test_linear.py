"""nn.functional.linear while generating: what is lifted, what is left, and the head's fp32."""

import pytest
import torch
import torch.nn.functional as F

from gearshift.engine.rollout.linear import generation_linear
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
