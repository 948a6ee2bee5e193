"""Saving and taking up again: two real ranks under ZeRO-3, and the folders on disk."""

import json

import pytest
import torch

from gearshift.engine import checkpoint
from tests import tiny_run


@pytest.fixture(scope="module")
def two_ranks():
    return tiny_run.outcome("ranks_checkpoint.py")


def deterministic(figures: dict) -> dict:
    return {k: v for k, v in figures.items() if not k.startswith(("timing", "memory", "through"))}


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


def test_only_the_last_checkpoints_are_kept(two_ranks):
    (last,) = (two_ranks / "checkpoints").iterdir()
    assert last.name == "step_000002"
    state = json.loads((last / "trainer.json").read_text())
    assert (state["steps_done"], state["world_size"]) == (2, 2)
    assert state["streams"] == {"prompts": {"step": 2}}


def test_an_interrupted_save_leaves_no_half_checkpoint(two_ranks):
    """The critic could not be written: what is found is the checkpoint before."""
    folder = two_ranks / "interrupted"
    assert (folder / "step_000005.partial" / "actor").is_dir()
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step_000004"]
    assert checkpoint.find("auto", folder) == folder / "step_000004"


def complete(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "trainer.json").write_text("{}")
    return folder / name


def test_find(tmp_path):
    assert checkpoint.find("none", tmp_path) is None
    assert checkpoint.find("auto", tmp_path / "absent") is None
    first, second = complete(tmp_path, "step_000002"), complete(tmp_path, "step_000010")
    complete(tmp_path, "step_000011.partial")
    (tmp_path / "step_000012").mkdir()
    assert checkpoint.checkpoints(tmp_path) == [first, second]
    assert checkpoint.find("auto", tmp_path) == second
    assert checkpoint.find(str(first), tmp_path) == first
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.find(str(tmp_path / "step_000012"), tmp_path)


def test_another_world_size_is_refused(two_ranks):
    """This process is one rank; the checkpoint is of two."""
    with pytest.raises(ValueError, match="saved by 2 ranks, this run has 1; start as many"):
        checkpoint.load(two_ranks / "checkpoints" / "step_000002", None, {})
