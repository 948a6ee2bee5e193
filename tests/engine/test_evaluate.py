"""pass@k against counting, and how held-out prompts are dealt to ranks."""

from itertools import combinations
from math import comb

import pytest
import torch

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import DataConfig, EvalConfig
from gearshift.engine.data.heldout import read_held_out
from gearshift.engine.evaluate import pass_at_k
from tests.tiny import job as tiny_job
from tests.tiny import models as tiny


def passed(n: int, c: int) -> torch.Tensor:
    """[1, n]: c samples of n pass."""
    return (torch.arange(n) < c)[None]


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_the_subsets_that_pass(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
            found = pass_at_k(passed(n, c), k)
            assert found.dtype == torch.float64
            assert float(found) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(200, 3, 100), (100, 1, 10), (64, 60, 8), (50, 25, 50)])
def test_pass_at_k_of_many_samples(n, c, k):
    expected = 1 - comb(n - c, k) / comb(n, k)
    assert float(pass_at_k(passed(n, c), k)) == pytest.approx(expected, rel=1e-13)


def test_pass_at_k_is_by_prompt():
    rows = torch.cat([passed(4, c) for c in (0, 1, 4)])
    assert pass_at_k(rows, 2).tolist() == pytest.approx([0.0, 0.5, 1.0])


def held_out(path, **data):
    config = EvalConfig(sources=[{"path": str(path)}], samples_per_prompt=2)
    return read_held_out(config, DataConfig(**data), tiny.tokenizer())[0]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_prompt_counts_once_and_ranks_have_equally_many(tmp_path, count, world):
    rows = [{"prompt": f"w{4 + i}", "number": i} for i in range(count)]
    held = held_out(tiny_job.write_rows(tmp_path / "a.jsonl", rows))
    seen, sizes = [], set()
    for rank in range(world):
        prompts, counts = held.share(2, rank, world, tiny.tokenizer())
        assert len(prompts) == 2 * len(counts)
        sizes.add(len(counts))
        numbers = torch.tensor(prompts.columns["number"]).view(2, -1)
        assert torch.equal(numbers[0], numbers[1]), "sample-major"
        offsets = prompts.row_ids.view(2, -1) - 2**61
        assert torch.equal(offsets, numbers + torch.tensor([[0], [count]])), "on any world size"
        seen += numbers[0][counts].tolist()
    assert sorted(seen) == list(range(count)) and len(sizes) == 1


def test_rows_follow_the_rules_of_the_training_data(tmp_path):
    rows = [{"prompt": "w4 w5 w6"}, {"prompt": 7}, {"prompt": "w5"}, {"prompt": "w6"}]
    path = tiny_job.write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=r"a\.jsonl, row 1: prompt='7': must be a string"):
        held_out(path)
    kept = held_out(path, bad_rows="drop", max_prompt_tokens=2)
    assert [example.columns["prompt"] for example in kept.examples] == ["w5", "w6"]
    assert kept.dropped == 1
    with pytest.raises(ConfigError, match=r"row 0: the prompt has 3 tokens, more than data\.max_p"):
        held_out(path, bad_rows="drop", max_prompt_tokens=2, overlong="error")
    config = EvalConfig(sources=[{"path": str(path), "rows": 1, "name": "first"}])
    data = DataConfig(bad_rows="drop", max_prompt_tokens=2)
    (limited,) = read_held_out(config, data, tiny.tokenizer())
    assert (limited.name, len(limited.examples)) == ("first", 1)
