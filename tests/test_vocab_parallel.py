"""A vocabulary cut over gloo ranks gives what one rank gives, on both backends."""

import pytest
import torch

from gearshift.kernels import dispatch, ops
from tests.launch_ranks import launch

BACKENDS = 2 if dispatch.HAS_TRITON else 1
COMPARED = BACKENDS * (12 + 12 + 9)  # on ranks 0 and 1 of two groups, on rank 2 of one


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("ranks_vocab.py", 3, tmp_path_factory.mktemp("vocab"), launcher="torchrun")


def lines(ranks, *cases: str) -> list[dict]:
    """Of all ranks and backends, those of the named cases."""
    found = [line for rank in ranks for line in rank if line["case"] in cases]
    assert len(found) >= 3 * len(cases)
    return found


def test_loss_rows_and_gradients_are_those_of_one_rank(ranks):
    compared = [line for rank in ranks for line in rank if "float64" in line]
    assert len(compared) == COMPARED
    for line in compared:
        assert line["float64"] <= (4e-3 if line["case"] == "bf16" else 3e-6), line
        assert line["one_rank"] <= 2e-6, line  # rounding: one rank is as far from float64
        assert line["loss"] <= 3e-6 and line["rows"] <= 3e-6, line
        assert line["clipped"][1] == 0, line
    assert sum(line["clipped"][0] for line in compared) > COMPARED


def test_cross_entropy_also_where_a_part_weighs_nothing(ranks):
    for line in lines(ranks, "cross-entropy", "parts far apart"):
        assert line["loss"] <= 1e-6 and line["one_rank"] <= 1e-6, line


def test_parts_without_a_token_and_nan(ranks):
    """-inf in all of a part is no fault; in all parts it is, and NaN in one part is everybody's."""
    whole = lines(ranks, "no token in the middle part", "only the last part has tokens")
    broken = lines(ranks, "no token at all", "one NaN")
    assert all(line["close"] for line in whole + broken)
    assert all(line["finite"][3] == 9 for line in whole)
    assert all(line["finite"] == [0] * 4 for line in broken)


def test_all_ranks_have_the_same_bits(ranks):
    shared: dict[tuple, set] = {}
    for rank in ranks:
        for line in rank:
            if "bits" in line:
                shared.setdefault((line["case"], line["backend"]), set()).add(line["bits"])
    assert len(shared) > 16 * BACKENDS
    assert all(len(found) == 1 for found in shared.values()), shared


def test_nothing_live_and_less_than_all_gradients(ranks):
    assert all(line["zero"] and line["graph"] for line in lines(ranks, "all masked"))
    for line in lines(ranks, "less is asked"):
        assert line["frozen"] and line["quiet"] <= 3e-6


@pytest.mark.parametrize(
    "case, message",
    [
        ("gap", "vocab_start: [0, 401, 403] with [400, 3, 600] rows of weight"),
        ("one is silent", "vocab_start: [0, -1, -1]"),
        ("rows", "rows of hidden: [9, 8, 7] on the ranks"),
        ("gradients", "gradients wanted (1: hidden, 2: weight, 4: bias): [0, 2, 0]"),
        ("budget", "it must fit on every rank of the group"),
    ],
)
def test_every_rank_refuses_what_one_got_wrong(ranks, case, message):
    found = lines(ranks, f"refused: {case}")
    assert len(found) == 3
    assert all(message in line["said"] for line in found), found


def test_a_start_needs_a_group():
    hidden, weight, ids = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="vocab_start=5: pass the group"):
        ops.linear_logprob(hidden, weight, ids, vocab_start=5)
    with pytest.raises(ValueError, match=r"weight has shape \[0, 4\]: it holds no token"):
        ops.linear_logprob(hidden, weight[:0], ids)
