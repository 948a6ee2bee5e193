"""AdamW on a split master as DeepSpeed's optimizer, on two real ranks; and what it refuses.

python -m pytest tests/zero/test_split_adamw.py
"""

import json

import pytest
import torch
from torch import nn

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import OptimizerConfig
from gearshift.engine.zero.optim import check_optimizer
from gearshift.engine.zero.split_adamw import SplitAdamW
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run

pytestmark = pytest.mark.bits

PARTS = (
    *("bytes.stock", "bytes.split_fp32", "bytes.split_bf16", "bytes.split_bf16_twice"),
    *("exact.1", "exact.2", "exact.3", "resume.2", "resume.3", "ppo"),
)
DS = ds_config.load("actor_zero3_bf16_split")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found, by part."""
    out = tmp_path_factory.mktemp("split")
    tiny_run.write_models(out / "models")
    on_ranks.launch("zero/split_on_ranks.py", out, ",".join(PARTS))
    lines = [(out / f"rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    return [{entry["part"]: entry for entry in map(json.loads, rank)} for rank in lines]


@pytest.mark.parametrize(
    "choice, expected", [("stock", 16), ("split_fp32", 14), ("split_bf16", 10)]
)
def test_state_takes_as_many_bytes_per_parameter_as_promised(ranks, choice, expected):
    for rank in ranks:
        assert rank[f"bytes.{choice}"]["bytes"] == pytest.approx(expected, abs=0.1)


def test_deepspeed_still_keeps_a_second_copy(ranks):
    """If this fails, DeepSpeed shares the copies itself: share_weights can go."""
    for rank in ranks:
        twice = rank["bytes.split_bf16_twice"]["bytes"]
        assert twice - rank["bytes.split_bf16"]["bytes"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_are_float32_adamw_of_the_same_clipped_gradients(ranks, stage):
    for rank in ranks:
        found = rank[f"exact.{stage}"]
        assert found["clipped"] and found["equal"] == [True, True]
        assert found["nearest"] == [True] * 8


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_is_the_same_to_the_bit(ranks, stage):
    found = ranks[0][f"resume.{stage}"]
    assert found["equal"] == [True] * 8
    assert all(found["moved"])  # by less than a bfloat16 shows
    assert found["dtypes"] == ["torch.bfloat16", "torch.int16"]


def test_ppo_trains_with_it(ranks):
    found = ranks[0]["ppo"]
    assert found["ratio"] < 0.1  # its largest distance from 1
    for role in ("actor", "critic"):
        assert found[role]["shared"] and all(found[role]["shared"])
        # Four updates of at most about lr each, which would not move a bfloat16 weight of 1.
        assert all(0 < moved < 1e-5 for moved in found[role]["moved"])


def test_weights_must_be_bfloat16():
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    made = SplitAdamW([weight], lr=1e-6, betas=(0.9, 0.95), eps=1e-8)
    with pytest.raises(ValueError, match="weight_bf16 is torch.float32"):
        made.step()


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"moments": "bf16"}, "moments=bf16: only split_adamw"),
        ({"name": "split_adamw", "moments": "bf16", "beta2": 0.999}, "beta2=0.999: bf16 moments"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    "name, ds, says",
    [
        ("adamw", DS, "plain AdamW would round its steps away"),
        ("split_adamw", ds_config.load("actor_zero3_bf16"), "needs a DeepSpeed JSON with"),
        (
            "split_adamw",
            DS | {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(name, ds, says):
    with pytest.raises(ValueError, match=says):
        check_optimizer(OptimizerConfig(name=name), ds)
