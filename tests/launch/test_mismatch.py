"""`gearshift bench mismatch`: what it says of sound gears, and of faults planted in one."""

import argparse
import json

import pytest
import torch

from gearshift.engine.attention import paged
from gearshift.engine.rollout import engine as rollout_engine
from gearshift.engine.rollout import linear
from gearshift.engine.zero.layers import decoder_layers
from gearshift.launch import mismatch
from gearshift.launch.commands import bench
from tests.tiny import rollout as tiny

CPU = torch.device("cpu")


def figures(model, dtype: str) -> dict:
    args = argparse.Namespace(dtype=dtype, batch=5, prompt=12, new=14, ragged=True, shortest=0)
    torch.manual_seed(0)
    return mismatch.compare(*mismatch.read(args, model.to(getattr(torch, dtype)), CPU))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Qwen3Moe"])
def test_in_fp32_the_gears_agree_to_rounding(family):
    found = figures(tiny.build(family), "float32")
    assert [row["layer"] for row in found["layers"]] == [*(f"layer {i}" for i in range(4)), "norm"]
    for row in found["layers"]:
        assert 0 < row["training"] < 1e-5 and row["between"] < 1e-5
    assert found["logprobs"]["generation - training"]["largest"] < 1e-4


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_in_bf16_only_hidden_states_differ(family):
    """By no more than two gears that round independently; the head adds nothing."""
    found = figures(tiny.build(family, initializer_range=0.05), "bfloat16")
    for row in found["layers"]:
        assert 1e-4 < row["training"] < 0.1
        assert row["between"] < 1.5 * row["expected"]
    nats = {name: value["mean"] for name, value in found["logprobs"].items()}
    assert nats["of it by the head"] < 1e-5
    whole, hidden = nats["generation - training"], nats["of it by hidden states"]
    assert whole == pytest.approx(hidden, rel=1e-2, abs=1e-5)


def test_a_head_that_rounds_is_seen(monkeypatch):
    monkeypatch.setattr(linear, "fp32_logits", torch.nn.functional.linear)
    found = figures(tiny.build("Llama", initializer_range=0.1), "bfloat16")
    assert found["logprobs"]["of it by the head"]["mean"] > 3e-4


def test_a_layer_that_differs_is_seen():
    model = tiny.build("Llama")

    def off(module, inputs, output):
        return output * 1.001 if paged._current is not None else output

    decoder_layers(model)[2].mlp.register_forward_hook(off)
    rows = figures(model, "float32")["layers"]
    assert all(row["between"] < 2 * row["expected"] + 1e-7 for row in rows[:2])
    assert rows[2]["between"] > 100 * rows[1]["between"]


def test_the_command(tmp_path, capsys):
    file = tmp_path / "found.json"
    sizes = ["--layers", "1", "--vocab", "256", "--batch", "2", "--prompt", "8", "--new", "5"]
    words = ["mismatch", *sizes, "--json", str(file)]
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.main(parser.parse_args(words)) == 0
    told = capsys.readouterr().out
    assert "qwen2.5-0.5b, 1 layers, bfloat16" in told and "of it by the head" in told
    assert set(json.loads(file.read_text())) >= {"machine", "layers", "logprobs", "tokens"}
    assert rollout_engine.pack.__module__.endswith("packing"), "what was patched is put back"
