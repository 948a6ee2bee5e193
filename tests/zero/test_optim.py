"""AdamW's groups and the learning-rate schedule."""

import math

import pytest
import torch
from torch import nn

from gearshift.engine.config.schema import OptimizerConfig
from gearshift.engine.zero.optim import build_optimizer, build_schedule

PLAIN = {"zero_optimization": {"stage": 0}}


def factors(schedule: str, warmup: float, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    config = OptimizerConfig(schedule=schedule, warmup=warmup)
    schedule = build_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps + 2):
        found.append(schedule.get_last_lr()[0] / 2.0)
        optimizer.step()
        schedule.step()
    return found


def test_linear_decay_uses_every_step_and_ends_at_zero():
    assert factors("linear", 0.0, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


def test_warm_up_rises_to_the_peak_without_a_step_at_zero():
    found = factors("linear", 0.2, 10)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert found[3] == pytest.approx(7 / 8) and found[10] == 0


def test_cosine_and_constant():
    found = factors("cosine", 0.0, 10)
    assert found[0] == 1 and found[5] == pytest.approx(0.5) and found[10] == pytest.approx(0)
    assert found[3] == pytest.approx(0.5 * (1 + math.cos(0.3 * math.pi)))
    assert factors("constant", 0.5, 4) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_weight_decay_spares_vectors_and_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2, bias=False))
    module[2].weight.requires_grad_(False)
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-5)
    groups = build_optimizer(module, config, PLAIN).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert groups[0]["params"][0] is module[0].weight
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-5)


def test_partitioned_matrices_are_told_apart_by_their_whole_shape():
    """Under ZeRO-3 every parameter on a rank is flat, or empty."""
    matrix, vector = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    matrix.ds_shape, vector.ds_shape = torch.Size([4, 4]), torch.Size([4])
    module = nn.ParameterList([matrix, vector])
    groups = build_optimizer(module, OptimizerConfig(weight_decay=0.1), PLAIN).param_groups
    assert groups[0]["params"][0] is matrix and groups[1]["params"][0] is vector


def test_an_optimizer_without_matrices_has_one_group():
    module = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    groups = build_optimizer(module, OptimizerConfig(weight_decay=0.1), PLAIN).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]
