"""Planned beside measured, and the share of the GPUs' rate that was of use."""

from dataclasses import replace

import pytest

from gearshift.engine.config import load as config_load
from gearshift.engine.models.cast import cast
from gearshift.engine.plan import compare as ledger
from gearshift.engine.plan.hardware import GB, GPUS, Hardware, hardware
from gearshift.engine.plan.planner import plan
from gearshift.launch.docs.plan import offline


@pytest.fixture(scope="module")
def made():
    """The plan of a recipe of 0.5B models on one GPU."""
    path, models = offline("0.5b_24gb")
    plain = [
        f"--{role}.{key}"
        for role in ("actor", "critic")
        for key in ("deepspeed=trained_zero3_bf16.json", "optimizer.name=adamw")
    ]
    config = config_load.load(path, [*models, *plain]).config
    return plan(config, cast(config), hardware("rtx4090", 1, 1, 64))


def test_a_gpu_is_held_to_the_peak_of_a_phase(made):
    peaks = {phase.name: phase.total / GB for phase in made.phases}
    figures = {"memory_gb/generate": 1.04 * peaks["generate"], "memory_gb/ref": 2.0}
    near, far = ledger.compare(made, figures, first=False)
    assert near == f"generate {peaks['generate']:.3g}/{1.04 * peaks['generate']:.3g}"
    assert far.startswith(f"reference {peaks['reference']:.3g}/2 (")
    assert ledger.compare(made, {"step": 1}, first=False) == []


def test_the_first_step_has_no_moments_before_its_update(made):
    phase = next(p for p in made.phases if p.name == "generate")
    moments = sum(size for what, size in phase.gpu.items() if what.endswith("moments"))
    figures = {"memory_gb/generate": (phase.total - moments) / GB}
    assert "(" not in ledger.compare(made, figures, first=True)[0]
    assert "(" in ledger.compare(made, figures, first=False)[0]


def test_mfu_counts_what_the_algorithm_multiplies(made):
    """By hand, from parameters and tokens: attention adds a few per cent at these lengths."""
    rows, prompt, response = made.config.ppo.rows_per_step, 300.0, 200.0
    figures = {
        "tokens": rows * (prompt + response),
        "response_length/mean": response,
        "timing_s/step": 10.0,
        "timing_s/update_actor": 3.0,
        "timing_s/update_critic": 3.0,
    }
    shapes = {role.name: role.shape for role in made.roles}
    passes = {"actor": 2 + 3, "critic": 1 + 3}
    once = {
        name: 2 * rows * (shape.body * (prompt + response) + shape.head * response)
        for name, shape in shapes.items()
    }
    flops = sum(passes.get(name, 1) * count for name, count in once.items())
    least = flops / 10.0 / GPUS["rtx4090"].flops
    assert least < ledger.mfu(made, figures) < 1.1 * least
    frozen = {k: v for k, v in figures.items() if "update" not in k}
    assert ledger.mfu(made, frozen) < 0.6 * least


def test_no_mfu_where_the_rate_is_not_known(made):
    place = Hardware(gpu=GPUS["h100"], name="cpu", gpus_per_node=1, nodes=1, host_bytes=64e9)
    assert ledger.mfu(replace(made, hardware=place), {}) is None


def test_a_phase_needs_its_products_and_its_bytes(made):
    """By hand: decoding reads the weights once a token, an update reads AdamW's states."""
    ppo = made.config.ppo
    rows, prompt, response, longest = ppo.rows_per_step, 300.0, 200.0, 512.0
    figures = {
        "tokens": rows * (prompt + response),
        "response_length/mean": response,
        "response_length/max": longest,
    }
    found = ledger.needs(made, figures)
    actor = next(role for role in made.roles if role.name == "actor")
    once = 2 * rows * (actor.shape.body * (prompt + response) + actor.shape.head * response)
    assert once < found["logprobs"].flops == found["generate"].flops < 1.1 * once
    assert found["update_actor"].flops == 3 * ppo.epochs * found["logprobs"].flops
    weights = 2 * actor.shape.total
    assert found["logprobs"].bytes == weights
    steps = max(longest, rows * response / made.kv_slots)
    cache = rows * response * (prompt + response / 2) * actor.shape.kv_bytes_per_token(1, 2)
    assert found["generate"].bytes == pytest.approx(steps * weights + cache, rel=1e-3)
    states = 36 * actor.shape.total * ppo.updates("actor")
    moved = states if actor.zero.optimizer == "gpu" else 0
    read = 2 * ppo.epochs * weights
    assert found["update_actor"].bytes == pytest.approx(moved + read, rel=1e-3)
    floor = found["logprobs"].seconds(made.hardware)
    assert floor == pytest.approx(found["logprobs"].flops / GPUS["rtx4090"].flops)
    assert found["generate"].seconds(replace(made.hardware, name="cpu")) is None


def test_what_is_trained_together_is_one_phase(made):
    figures = {"tokens": 1e4, "response_length/mean": 50.0, "response_length/max": 50.0}
    joint = replace(made.config, ppo=replace(made.config.ppo, update="joint"))
    both = ledger.needs(replace(made, config=joint), figures)
    apart = ledger.needs(made, figures)
    assert "update_critic" not in both
    assert both["update_actor"] == apart["update_actor"] + apart["update_critic"]
