"""Saving and taking up again on two real ranks under ZeRO-3, and saves that fail on the way."""

import json

import pytest
import torch

from gearshift.engine.checkpoint import store
from tests.tiny import job as tiny_job
from tests.tiny import on_ranks

pytestmark = pytest.mark.bits


@pytest.fixture(scope="module")
def two_ranks():
    return on_ranks.outcome("checkpoint/save_on_ranks.py")


def deterministic(figures: dict) -> dict:
    return {k: v for k, v in figures.items() if not k.startswith(tiny_job.COSTS)}


def test_a_resumed_run_is_bit_for_bit_the_one_that_went_on(two_ranks):
    whole, resumed = (torch.load(two_ranks / f"{name}.pt") for name in ("whole", "resumed"))
    for role in ("actor", "critic"):
        for name, value in whole["weights"][role].items():
            assert torch.equal(value, resumed["weights"][role][name]), name
        assert len(whole["moments"][role]) >= 2
        for one, two in zip(whole["moments"][role], resumed["moments"][role], strict=True):
            assert torch.equal(one, two)
    assert whole["schedule"] == resumed["schedule"] == {"actor": 16, "critic": 16}
    assert whole["kl_coef"] == resumed["kl_coef"] != 0.05
    for one, two in zip(whole["figures"], resumed["figures"], strict=True):
        assert deterministic(one) == deterministic(two)
    assert [figures["step"] for figures in resumed["figures"]] == [3, 4]


def test_every_generator_of_every_rank_goes_on(two_ranks):
    drawn = [
        [torch.load(two_ranks / f"{name}.random{rank}.pt") for name in ("whole", "resumed")]
        for rank in (0, 1)
    ]
    for whole, resumed in drawn:
        assert whole == resumed
    assert drawn[0][0][2] != drawn[1][0][2], "the ranks have generators of their own"


def test_what_a_checkpoint_holds(two_ranks):
    (last,) = store.steps(two_ranks / "checkpoints")
    assert last.name == "step_000002", "the one before is deleted, though this one is best"
    assert json.loads((two_ranks / "checkpoints" / "latest").read_text()) == {
        "checkpoint": "step_000002"
    }
    ranks = ("rank0000", "rank0001")
    files = {f"{role}.{rank}.safetensors" for role in ("actor", "critic") for rank in ranks}
    files |= {f"random.{rank}.json" for rank in ranks} | {"state.json"}
    assert {path.name for path in last.iterdir()} == files | {"manifest.json"}
    manifest = store.read_manifest(last)
    assert set(manifest["files"]) == files
    assert (manifest["step"], manifest["world_size"], manifest["reward"]) == (2, 2, 2.0)
    state = json.loads((last / "state.json").read_text())
    assert (state["steps_done"], state["world_size"]) == (2, 2)
    assert state["stateful"] == {"prompts": {"step": 2}}
    assert state["roles"]["actor"]["optimizer_steps"] == state["roles"]["actor"]["schedule"] == 8


def test_a_full_disk_of_one_rank_is_told_once_and_tried_again(two_ranks):
    said = json.loads((two_ranks / "told.json").read_text())
    assert said["told"] == [
        "checkpoint step_000005 not written, the run goes on: rank 1: [Errno 28] No space left on "
        "device",
        "checkpoint step_000007 not written, the run goes on: rank 1: [Errno 28] No space left on "
        "device",
    ]  # by two runs, of four saves
    assert said["retry"] == [True, True, True, True, False]
    names = [
        sorted(p.name for p in (two_ranks / "interrupted" / way).iterdir())
        for way in ("thread", "wait")
    ]
    assert names == [["latest", "step_000004"], ["latest", "step_000006", "step_000009"]]
