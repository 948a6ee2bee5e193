"""The records, and how rows are dealt to minibatches."""

import pytest
import torch

from gearshift.engine.batch import Experience, PromptBatch, Rollout, minibatches

P, R = 5, 6


def experience(row_ids, seed=0) -> Experience:
    """Ragged prompts and responses whose every number tells its row."""
    rows = torch.as_tensor(row_ids)
    generator = torch.Generator().manual_seed(seed)
    before = torch.randint(1, P + 1, (len(rows),), generator=generator)
    lengths = torch.randint(1, R + 1, (len(rows),), generator=generator)
    prompt_mask = torch.arange(P) >= P - before[:, None]
    mask = torch.arange(R) < lengths[:, None]
    grid = rows[:, None] * 10.0 + torch.arange(R)
    names = ("rollout_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns")
    return Experience(
        prompt_ids=torch.where(prompt_mask, rows[:, None] + 100, 0),
        prompt_mask=prompt_mask,
        row_ids=rows,
        columns={"name": [f"row {i}" for i in rows.tolist()]},
        response_ids=torch.where(mask, rows[:, None] + 200, 0),
        response_mask=mask,
        finished=lengths < R,
        scores=rows.float(),
        **{name: torch.where(mask, grid, 0.0) for name in names},
    )


def same(first: Experience, second: Experience) -> None:
    for name, value in first.tensors().items():
        other = second.tensors()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_rows_are_picked_in_every_field():
    whole = experience([7, 8, 9, 10])
    same(
        whole.rows(torch.tensor([2, 0])),
        whole.rows(torch.tensor([2, 3, 0])).rows(torch.tensor([0, 2])),
    )
    picked = whole.rows(torch.tensor([3, 1]))
    assert picked.columns == {"name": ["row 10", "row 8"]}
    assert picked.scores.tolist() == [10.0, 8.0]
    assert torch.equal(picked.logprobs, whole.logprobs[[3, 1]])
    assert len(picked) == 2


def test_pieces_lose_padding_and_nothing_else():
    whole = experience(range(9))
    sizes = []
    for start, piece in zip((0, 4, 8), whole.split(4), strict=True):
        rows = slice(start, start + len(piece))
        sizes.append(len(piece))
        used = int(whole.prompt_mask[rows].sum(1).max())
        length = int(whole.lengths[rows].max())
        assert piece.prompt_ids.shape == (len(piece), used)
        assert piece.response_ids.shape == piece.advantages.shape == (len(piece), length)
        assert torch.equal(piece.advantages, whole.advantages[rows, :length])
        assert torch.equal(piece.prompt_ids, whole.prompt_ids[rows, P - used :])
        assert piece.prompt_mask.sum() == whole.prompt_mask[rows].sum()
        assert piece.response_mask.sum() == whole.response_mask[rows].sum()
        assert torch.equal(piece.scores, whole.scores[rows])
    assert sizes == [4, 4, 1]
    assert whole.rows(torch.tensor([0])).trimmed().response_mask.all()


def test_prompt_and_response_of_equal_width_are_trimmed_apart():
    record = experience([1, 2])
    same_width = {
        "prompt_ids": record.prompt_ids[:, -3:],
        "prompt_mask": torch.tensor([[False, False, True], [False, True, True]]),
        "response_ids": record.response_ids[:, :3],
        "response_mask": torch.tensor([[True, False, False], [True, False, False]]),
        "rollout_logprobs": record.rollout_logprobs[:, :3],
    }
    others = {name: getattr(record, name) for name in ("row_ids", "columns", "finished")}
    trimmed = Rollout(**same_width, **others).trimmed()
    assert torch.equal(trimmed.prompt_ids, record.prompt_ids[:, -2:])
    assert torch.equal(trimmed.response_ids, record.response_ids[:, :1])


def test_prompt_batches_move_and_rollouts_join_prompt_and_response():
    batch = PromptBatch(
        prompt_ids=torch.tensor([[0, 0, 5], [0, 6, 7]]),
        prompt_mask=torch.tensor([[False, False, True], [False, True, True]]),
        row_ids=torch.tensor([0, 1]),
        columns={},
    )
    assert batch.to(torch.device("cpu")).row_ids.tolist() == [0, 1]
    record = experience([3])
    assert record.input_ids.shape == record.attention_mask.shape == (1, P + R)
    assert int(record.attention_mask.sum()) == int(record.prompt_mask.sum() + record.lengths.sum())


def shares(row_ids, size, world, seed):
    """[minibatch][rank] -> row ids, the rows dealt as the data stream deals them."""
    by_rank = []
    for rank in range(world):
        own = [i for i in row_ids if i % world == rank]
        dealt = list(minibatches(experience(own), size, world, seed))
        assert all(len(part) == size // world for part in dealt)
        by_rank.append([part.row_ids.tolist() for part in dealt])
    return list(zip(*by_rank, strict=True))


@pytest.mark.parametrize("first", [0, 48])
def test_minibatches_are_the_same_rows_on_any_number_of_ranks(first):
    rows = range(first, first + 24)
    alone = [sorted(parts[0]) for parts in shares(rows, 8, 1, seed=5)]
    assert sorted(sum(alone, [])) == list(rows)  # every row once an epoch
    for world in (2, 4, 8):
        split = [sorted(sum(parts, [])) for parts in shares(rows, 8, world, seed=5)]
        assert split == alone


def test_minibatches_do_not_depend_on_the_order_of_rows():
    shuffled = experience([5, 0, 3, 6, 1, 7, 2, 4])
    ordered = experience(range(8))
    for first, second in zip(
        minibatches(shuffled, 4, 1, 3), minibatches(ordered, 4, 1, 3), strict=True
    ):
        assert first.row_ids.tolist() == second.row_ids.tolist()


def test_epochs_differ_and_seeds_repeat():
    rows = range(64)
    first, again, other = (shares(rows, 8, 1, seed) for seed in (1, 1, 2))
    assert first == again
    assert [sorted(parts[0]) for parts in first] != [sorted(parts[0]) for parts in other]


def test_rows_that_are_not_dealt_evenly_are_our_own_fault():
    with pytest.raises(AssertionError, match="evenly"):
        next(minibatches(experience([0, 1, 2, 4]), 4, 2, 0))
