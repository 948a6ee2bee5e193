"""Which rows share a forward, for random lengths, ranks and budgets; and what ranks exchange."""

import math
import random
from dataclasses import dataclass
from functools import cached_property

import pytest

from gearshift.engine import microbatch
from gearshift.engine.microbatch import Budget, deal

HIDDEN = 64


@dataclass(frozen=True)
class Case:
    """Arguments of `deal`."""

    lengths: list[int]
    ranks: int
    budget: Budget
    least: int

    @cached_property
    def dealt(self):
        return deal(self.lengths, self.ranks, self.budget, self.least)

    @property
    def groups(self):
        return [group for rank in self.dealt for group in rank]

    def tokens(self, group) -> int:
        """That count against the budget."""
        lengths = [self.lengths[row] for row in group]
        return sum(lengths) if self.budget.packed else len(group) * max(lengths)

    def cost(self, group) -> float:
        costs = [self.budget.cost(self.lengths[row]) for row in group]
        return sum(costs) if self.budget.packed else len(group) * max(costs)


def draw(seed: int) -> Case:
    """Rows are a multiple of the ranks, as those of an optimizer step are."""
    chosen = random.Random(seed)
    ranks, least = chosen.choice([1, 2, 3, 4, 8]), chosen.choice([1, 1, 2, 3])
    rows = ranks * (least + chosen.randrange(16))
    longest = chosen.choice([1, 20, 200, 3000])
    lengths = [chosen.randint(1, longest) for _ in range(rows)]
    if seed % 9 == 0:
        lengths = [longest] * rows
    budget = Budget(
        tokens=chosen.choice([None, 1, longest, 3 * longest, 100 * longest]),
        rows=chosen.choice([None, None, 1, 2, 5]),
        packed=bool(seed % 2),
        hidden=HIDDEN,
    )
    return Case(lengths, ranks, budget, least)


SEEDS = range(400)
CASES = [draw(seed) for seed in SEEDS]


def test_every_row_is_dealt_exactly_once():
    for case in CASES:
        assert sorted(row for group in case.groups for row in group) == [*range(len(case.lengths))]
        assert all(group == sorted(group) and group for group in case.groups)


def test_all_ranks_have_as_many_micro_batches_and_the_least():
    for case in CASES:
        (count,) = {len(groups) for groups in case.dealt}
        assert count >= case.least


def test_no_micro_batch_is_above_the_budget_but_a_single_row():
    """Padded rows count with their padding."""
    alone = 0
    for case in CASES:
        budget = case.budget
        for group in case.groups:
            if len(group) == 1:
                alone += bool(budget.tokens) and case.tokens(group) > budget.tokens
                continue
            assert budget.tokens is None or case.tokens(group) <= budget.tokens
            assert budget.rows is None or len(group) <= budget.rows
    assert alone > 100


def test_the_costliest_come_first():
    for case in CASES:
        for groups in case.dealt:
            costs = [case.cost(group) for group in groups]
            assert costs == pytest.approx(sorted(costs, reverse=True), rel=1e-9)


def test_at_each_turn_all_ranks_do_the_costliest_that_are_left():
    """So none waits for a costlier one than it has to."""
    for case in CASES:
        turns = list(zip(*case.dealt, strict=True))
        for now, later in zip(turns, turns[1:], strict=False):
            assert min(map(case.cost, now)) >= (1 - 1e-9) * max(map(case.cost, later))


def test_packed_micro_batches_are_at_most_twice_as_many_as_there_must_be():
    """Rows are placed from the longest on. Where one of n tokens finds no room among some groups,
    each of them has its limit of rows, or more than the budget less n and at least n: over half."""
    for case in CASES:
        lengths, budget = case.lengths, case.budget
        if not budget.packed:
            continue
        filled = most = 0.0
        if budget.tokens:  # a row beyond the budget fills one by itself
            filled = sum(min(length, budget.tokens) for length in lengths) / budget.tokens
        if budget.rows:
            most = len(lengths) / budget.rows
        turns = math.ceil((2 * filled + most) / case.ranks)
        assert len(case.dealt[0]) <= max(case.least, turns, 1), case


def test_padded_micro_batches_are_at_most_twice_as_many_as_when_filled_in_order():
    """Halving until every rank has as many adds less than one to each rank."""
    for case in CASES:
        if case.budget.packed:
            continue
        alone = deal(case.lengths, 1, case.budget)[0]
        turns = math.ceil(len(alone) / case.ranks)
        assert len(case.dealt[0]) == max(case.least, turns), case


def test_padded_rows_of_like_length_go_together():
    """Sorted by length, every micro-batch is a run of neighbours."""
    for case in CASES:
        if case.budget.packed:
            continue
        spans = sorted(
            (max(case.lengths[row] for row in group), min(case.lengths[row] for row in group))
            for group in case.groups
        )
        for (longest, _), (_, shortest) in zip(spans, spans[1:], strict=False):
            assert longest <= shortest


def test_the_deal_is_the_same_every_time():
    assert all(case.dealt == draw(seed).dealt for seed, case in zip(SEEDS, CASES, strict=True))


def exponential_rows(seed: int, longest: int = 2048) -> list[int]:
    """64 rows, most of them short: a mean of about a quarter of the longest."""
    chosen = random.Random(seed)
    drawn = [int(chosen.expovariate(4 / longest)) for _ in range(64)]
    return [min(longest, max(16, length)) for length in drawn]


@pytest.mark.parametrize("hidden", [896, 4096])
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_two_ranks_have_as_much_to_do(hidden, tokens):
    """Cost within 1 %; tokens within 3 % where attention is a small part of it."""
    mean = []
    for seed in range(30):
        lengths = exponential_rows(seed)
        mean.append(sum(lengths) / 64)
        budget = Budget(tokens=tokens, rows=None, packed=True, hidden=hidden)
        rows = [[row for group in groups for row in group] for groups in deal(lengths, 2, budget)]
        costs = [sum(budget.cost(lengths[row]) for row in own) for own in rows]
        assert max(costs) <= 1.01 * min(costs), seed
        live = [sum(lengths[row] for row in own) for own in rows]
        assert hidden == 896 or max(live) <= 1.03 * min(live), seed
    assert sum(mean) / len(mean) == pytest.approx(2048 / 4, rel=0.1)


def test_ranks_wait_little_for_one_another():
    """Under ZeRO-3 a turn takes as long as its costliest micro-batch: within 2 % of no waiting."""
    for seed in range(30):
        lengths = exponential_rows(seed)
        budget = Budget(tokens=4096, rows=None, packed=True, hidden=896)
        dealt = deal(lengths, 4, budget)
        costs = [
            [sum(budget.cost(lengths[row]) for row in group) for group in groups]
            for groups in dealt
        ]
        waited = sum(map(max, zip(*costs, strict=True)))
        assert 4 * waited <= 1.02 * sum(map(sum, costs)), seed


def test_attention_counts_in_the_cost_of_long_rows():
    """That of a row of 12 H tokens costs as much as its products."""
    budget = Budget(tokens=None, rows=None, packed=True, hidden=HIDDEN)
    long, short = 12 * HIDDEN, 12 * HIDDEN // 100
    assert budget.cost(long) == 2 * long
    lengths = [long] + [short] * 300
    one, two = (groups[0] for groups in deal(lengths, 2, budget))
    fewer, more = sorted((one, two), key=len)
    assert 0 in fewer
    costs = [sum(budget.cost(lengths[row]) for row in group) for group in (one, two)]
    assert abs(costs[0] - costs[1]) <= budget.cost(short)
    assert short * len(more) > 1.2 * (long + short * (len(fewer) - 1))


def test_more_micro_batches_than_rows_are_refused():
    budget = Budget(tokens=None, rows=None, packed=True, hidden=HIDDEN)
    with pytest.raises(AssertionError, match="fewer rows than micro-batches"):
        deal([3, 4], 2, budget, least=2)


@pytest.mark.parametrize("packed", [True, False])
def test_a_rank_makes_as_many_forwards_as_the_one_that_needs_most(packed, monkeypatch):
    """Ranks score their own rows; under ZeRO-3 each forward is a collective."""
    budget = Budget(tokens=100, rows=None, packed=packed, hidden=HIDDEN)
    lengths = [20, 30, 10, 40, 25]
    own = microbatch.share(lengths, budget, "cpu")
    assert len(own) == len(deal(lengths, 1, budget)[0]) < 5
    monkeypatch.setattr(microbatch.distributed, "global_max", lambda value: value.new_tensor(5))
    assert len(microbatch.share(lengths, budget, "cpu")) == 5
