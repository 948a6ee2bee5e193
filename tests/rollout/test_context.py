"""How many tokens a model reads: its positions, stretched or cut where its rotary scaling says."""

import pytest
from transformers import AutoConfig

from gearshift.engine.rollout.context import moves, positions


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("bert", {"max_position_embeddings": 512}, 512),
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("xlm-roberta", {"max_position_embeddings": 20, "pad_token_id": 3}, 16),
        ("gpt2", {"n_positions": 64}, 64),
        ("llama", {"max_position_embeddings": 2048}, 2048),
        ("t5", {}, None),
        ("xlnet", {}, None),
        ("bloom", {}, None),
    ],
)
def test_positions(family, settings, limit):
    assert positions(AutoConfig.for_model(family, **settings)) == limit


def rope(kind: str, **settings):
    return {"rope_type": kind, "rope_theta": 10000.0, **settings}


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
BOTH = {"original_max_position_embeddings": 16, **FACTORS}


@pytest.mark.parametrize(
    ("parameters", "count", "limit", "moving"),
    [
        (rope("default"), 128, 128, False),
        (rope("yarn", factor=4.0, original_max_position_embeddings=32), 32, 128, False),
        (rope("yarn", factor=4.0), 32, 128, False),
        (rope("yarn", factor=4.0, original_max_position_embeddings=32), 128, 128, False),
        (rope("yarn", factor=40.0, original_max_position_embeddings=4), 170, 170, False),
        (rope("linear", factor=4.0), 128, 128, False),
        (rope("dynamic", factor=2.0), 128, 128, True),
        (rope("longrope", **BOTH), 128, 16, True),
        ({"full_attention": rope("longrope", **BOTH)}, 128, 16, True),
    ],
)
def test_rotary_scaling(parameters, count, limit, moving):
    """A row must not cross the length at which the frequencies of all rows change."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": count}
    config = AutoConfig.for_model("llama", **sizes)
    config.rope_parameters = parameters
    assert (positions(config), moves(config)) == (limit, moving)
