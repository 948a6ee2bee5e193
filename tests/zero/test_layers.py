"""What a decoder layer must do for ZeRO-3 to see its gradients."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from gearshift.engine.zero.layers import decoder_layers, fetch_by_layer

ZERO3 = {"zero_optimization": {"stage": 3}}


class Loop(nn.Module):
    """Two layers, each of which runs `times` times."""

    def __init__(self, times: int = 1, recompute: bool = False):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.times, self.recompute = times, recompute

    def forward(self, x):
        for layer in [*self.layers] * self.times:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def test_gradients_of_layers_that_return_lists_are_seen():
    """DeepSpeed reduces a layer's in a full backward hook."""
    config = transformers.OpenAIGPTConfig(vocab_size=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.OpenAIGPTLMHeadModel(config)
    fetch_by_layer(model, ZERO3, model.transformer)
    seen = []
    for layer in decoder_layers(model):
        layer.register_full_backward_hook(lambda layer, *_: seen.append(layer))
    model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    assert seen == decoder_layers(model)[::-1]


@pytest.mark.parametrize("recompute", [False, True])
def test_forwards_one_after_the_other_are_no_loop(recompute):
    model = Loop(recompute=recompute)
    fetch_by_layer(model, ZERO3, model)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()


def test_a_model_that_calls_what_is_inside_its_trunk_is_no_loop():
    """OPT's forward calls the decoder of its trunk; scoring calls the trunk."""
    sizes = dict(hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=16, **sizes))
    fetch_by_layer(model, ZERO3, model, model.model)
    ids = torch.arange(5)[None]
    for part in (model, model.model, model, model):
        part(input_ids=ids)


def test_a_layer_that_runs_again_is_refused():
    model = Loop(times=2)
    model(torch.ones(1, 4))
    fetch_by_layer(model, ZERO3, model)
    with pytest.raises(ValueError, match="Linear runs several times.*DeepSpeed JSON of stage 2"):
        model(torch.ones(1, 4))
