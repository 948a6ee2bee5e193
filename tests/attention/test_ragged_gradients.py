"""Ragged rows, padded or end to end: finite gradients, near those of float32, at any length.

On Hopper GPUs cuDNN attention gave NaN at lengths of 128 k + 64 (cluster/distributed.py); on a CPU
the same check runs in float32 at one length.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gearshift.engine.attention import packed
from gearshift.engine.cluster import distributed
from gearshift.engine.models.reading import hidden_states, lay_out

ROWS = 8
SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
WAYS = pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])


def gradients(model, ids, mask) -> dict[str, torch.Tensor]:
    """Of a loss over live positions only."""
    reading, places = lay_out(ids, mask, packs=packed.packs(model))
    hidden = hidden_states(model, reading)[places[mask]].float()
    hidden.pow(2).mean().backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def check(device: str, dtype: torch.dtype, length: int, most: float, *, packs: bool) -> None:
    """most: the error of a parameter's gradient, relative to its norm in float32."""
    distributed.forbid_cudnn_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **SIZES)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        truth = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    truth.load_state_dict(model.state_dict())
    if packs:
        packed.adopt(model)
    ids = torch.randint(SIZES["vocab_size"], (ROWS, length), device=device)
    mask = torch.ones(ROWS, length, dtype=torch.bool, device=device)
    for row in range(ROWS):
        mask[row, : 7 * row] = False
        mask[row, length - 3 * row :] = False
    mask[0] = True
    found, expected = (gradients(m, ids, mask) for m in (model, truth))
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < most, (name, float(error))


@pytest.mark.gpu
@WAYS
@pytest.mark.parametrize("length", [192, 704, 768, 1024])
def test_on_a_gpu(length, packs):
    check("cuda", torch.bfloat16, length, 0.05, packs=packs)


@WAYS
def test_on_a_cpu(packs):
    check("cpu", torch.float32, 192, 1e-4, packs=packs)
