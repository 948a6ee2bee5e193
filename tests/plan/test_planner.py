"""The planner's arithmetic against real tensors: states on ranks, and what autograd saves."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import LoraConfig, OptimizerConfig
from gearshift.engine.models.lora import Lora, adapt
from gearshift.engine.models.shapes import published, shape_of
from gearshift.engine.plan import bytes as memory_model
from gearshift.engine.plan.bytes import Zero
from tests.tiny import models as tiny
from tests.tiny import on_ranks

# Hidden size, layers, the ending of the DeepSpeed files, how far actor and critic sleep, and their
# adapters' rank, of LoRA on a base each or on a shared one, or of DoRA.
CASES = (
    (192, 4, "zero3_bf16", "exchange", 0),
    (128, 4, "zero3", "never", "8:dora"),
    (192, 4, "zero1_bf16_split", "always", "4:shared"),
)
MORE = (
    (128, 4, "zero3", "never", 0),
    (128, 4, "zero3", "never", 8),
    (256, 6, "zero3_bf16_split", "always", 0),
    (128, 4, "zero3", "never", "8:shared"),
)


@functools.cache
def on_two_ranks(wanted: tuple) -> dict[tuple, dict]:
    """By case what rank 0 found: planned and measured bytes by phase."""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for hidden, layers, precision, sleep, r in wanted:
            sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": 32}
            path = tiny.save_policy(
                Path(folder, f"model{len(cases)}"), 2048, num_hidden_layers=layers, **sizes
            )
            cases.append(f"{path}:{precision}:{sleep}:{r}")
        found = on_ranks.lines("plan/memory_on_ranks.py", 2, Path(folder), ",".join(cases))[0]
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_planned_bytes_are_the_tensors_that_live(case):
    """Of a whole PPO step, phase by phase; and the ledger's own figures."""
    found = on_two_ranks(CASES if case in CASES else MORE)[case]
    assert {*found["measured"]} == {"generate", "values", "update_actor", "update_critic"}
    for phase in found["measured"]:
        planned = found["planned"][phase]
        # The buckets are far larger than these models: they would hide them.
        measured = found["measured"][phase] - planned["buckets"]
        expected = planned["bytes"] - planned["buckets"]
        assert measured == pytest.approx(expected, rel=0.05), (phase, json.dumps(found))
        ledger = found["states"][f"states_gb/{phase}"] * 1e9
        states = planned["states"] - planned["buckets"]
        assert ledger - planned["buckets"] == pytest.approx(states, rel=0.01), (phase, found)


@functools.cache
def in_flight() -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 192, "intermediate_size": 576, "head_dim": 32}
        path = tiny.save_policy(Path(folder, "model"), 2048, num_hidden_layers=4, **sizes)
        endings = "zero1_bf16_split,zero2_bf16_split"
        found = on_ranks.lines("plan/flight_on_ranks.py", 1, Path(folder), path, endings)[0]
        return {case["ending"]: case for case in found}


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_several_micro_batches_take_what_is_planned(stage):
    """Of one rank: added in place under stage 1, and a second buffer under stage 2, whose absence
    from the plan once ended a run of a 7B model."""
    found = in_flight()[f"zero{stage}_bf16_split"]
    first, *others = found["seen"]
    assert len(others) == 3, "four micro-batches"
    whole = 2 * found["parameters"]
    assert max(others) == pytest.approx(stage * whole, rel=0.2)
    assert first < 1.1 * whole, "nothing is accumulated before the first"
    own = found["planned"] - found["largest"]
    assert own == pytest.approx(stage * whole, rel=0.05)
    assert max(others) <= found["planned"], "largest: of the parameter that is on its way"


def saved_bytes(
    layers: int, dtype: torch.dtype, batch: int, length: int, adapters: Lora | None = None
) -> int:
    """Storages that a forward keeps for backward, without the weights."""
    config = tiny.llama_config(
        64,
        hidden_size=256,
        intermediate_size=640,
        head_dim=64,
        num_hidden_layers=layers,
        attn_implementation="sdpa",
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if adapters:
        adapt(model, adapters, {"zero_optimization": {"stage": 0}}, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(batch, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding: SDPA gets a mask, as in training
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_per_layer_are_what_autograd_saves(dtype):
    batch, length = 2, 64
    three, one = (saved_bytes(layers, dtype, batch, length) for layers in (3, 1))
    measured = (three - one) / 2 / (batch * length)
    config = tiny.llama_config(64, hidden_size=256, intermediate_size=640, head_dim=64)
    planned = memory_model.saved_per_token(shape_of(config, "policy"), dtype.itemsize)
    assert measured == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dora_keeps_what_its_magnitudes_multiply(dtype):
    """More than LoRA does, by what is planned."""
    measured, planned = [], []
    config = tiny.llama_config(64, hidden_size=256, intermediate_size=640, head_dim=64)
    for dora in (False, True):
        settings = LoraConfig(r=4, dora=dora)
        own = Lora(settings=settings, base="x", revision=None, task="CAUSAL_LM")
        measured.append(saved_bytes(config.num_hidden_layers, dtype, 2, 64, own))
        shape, zero = shape_of(config, "policy", own), Zero.of(ds_config.load("actor_zero0"))
        zero = replace(zero, size=dtype.itemsize)
        planned.append(memory_model.training_activations(shape, zero, 2 * 64, recompute=False))
    assert measured[1] - measured[0] == pytest.approx(planned[1] - planned[0], rel=0.05)


def test_published_parameter_counts():
    """Of the model cards: 7,615,616,512 and 8,030,261,248."""
    assert shape_of(published("qwen2.5-7b"), "policy").total == 7_615_616_512
    llama = shape_of(published("llama3-8b"), "policy")
    assert llama.total == 8_030_261_248
    assert llama.body == pytest.approx(6.98e9, rel=0.001)
    assert llama.kv_bytes_per_token(1, 2) == 131_072
    assert llama.kv_bytes_per_token(16, 2) == 131_072 // 8  # a head is not cut


def bytes_per_parameter(settings: str, **optimizer) -> tuple[float, float]:
    """(on the GPU, on the host) at one rank, without buckets, small weights and rounding."""
    shape = shape_of(published("llama3-8b"), "policy")
    zero = Zero.of(ds_config.load(settings))
    states = memory_model.trained_states(shape, zero, 1, OptimizerConfig(**optimizer))
    left_out = ("reduce buckets", "small weights, whole", "pinned rounding")
    gpu, host = (
        sum(size for what, size in place.items() if what not in left_out)
        for place in (states.gpu, states.host)
    )
    return gpu / shape.total, host / shape.total


def test_bytes_per_parameter_follow_the_json_and_the_optimizer():
    assert bytes_per_parameter("actor_zero3_bf16") == (18, 0)
    assert bytes_per_parameter("actor_zero3_bf16_offload") == (0, 22)
    assert bytes_per_parameter("actor_zero2_bf16") == (14, 0)  # gradients live in the update only


def test_bytes_per_parameter_of_a_split_master():
    pytest.importorskip("gearshift.engine.zero.split_adamw")
    split = {"name": "split_adamw"}
    assert bytes_per_parameter("actor_zero3_bf16_split", **split, moments="fp32") == (14, 0)
    assert bytes_per_parameter("actor_zero3_bf16_split", **split, moments="bf16") == (10, 0)
