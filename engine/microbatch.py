"""Which rows share a forward: micro-batches filled by tokens, of like number and cost on all ranks.

Only the grouping is decided here. A row's weight in the loss does not depend on it, so neither does
the update, to rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gearshift.engine.batch import Experience, Rollout, of_all_ranks
from gearshift.engine.cluster import distributed

Group = list[int]  # rows of one micro-batch, ascending


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a micro-batch may hold; a row beyond the budget is one by itself.

    tokens: live ones where rows are packed, else rows times the longest. rows: the most, None: any.
    hidden: of the model, for the share of attention in a row's cost.
    """

    tokens: int | None
    rows: int | None
    packed: bool
    hidden: int

    def cost(self, length: int) -> float:
        """Of a row, in tokens: attention grows with the square of its length.

        A layer's products take about 24 H^2 FLOPs a token, causal attention 2 H per token before it
        (Kaplan et al. 2020, table 1).
        """
        return length * (1 + length / (12 * self.hidden))

    def holds(self, rows: Any, live: Any, longest: int) -> Any:
        """Whether one micro-batch may hold `rows` rows with `live` tokens in all; of several at
        once where these are arrays."""
        tokens = live if self.packed else rows * longest
        most_tokens, most_rows = self.tokens or math.inf, self.rows or math.inf
        return (rows == 1) | (tokens <= most_tokens) & (rows <= most_rows)


def deal(lengths: Sequence[int], ranks: int, budget: Budget, least: int = 1) -> list[list[Group]]:
    """Rows for each rank and micro-batch: every rank gets equally many micro-batches, of like cost
    at each turn, since under ZeRO-3 ranks wait for one another in every layer.

    lengths: live tokens of each row; a multiple of ranks, and least times ranks or more. Costliest
    first, so that memory is at its peak at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups = (_packed if budget.packed else _padded)(order, lengths, ranks, budget, least)
    groups.sort(key=lambda group: -_cost(group, lengths, budget))
    dealt: list[list[Group]] = [[] for _ in range(ranks)]
    spent = [0.0] * ranks
    for turn in range(0, len(groups), ranks):
        # Whoever has done least gets the costliest of this turn.
        for rank, group in zip(
            sorted(range(ranks), key=lambda rank: spent[rank]),
            groups[turn : turn + ranks],
            strict=True,
        ):
            dealt[rank].append(sorted(group))
            spent[rank] += _cost(group, lengths, budget)
    return dealt


def _cost(group: Group, lengths: Sequence[int], budget: Budget) -> float:
    if budget.packed:
        return sum(budget.cost(lengths[row]) for row in group)
    return len(group) * budget.cost(max(lengths[row] for row in group))


def _packed(
    order: list[int], lengths: Sequence[int], ranks: int, budget: Budget, least: int
) -> list[Group]:
    """As few groups as hold all rows, longest rows first, each row where the cost is least
    (Graham 1969)."""
    bound = [float(least)]
    if budget.tokens:
        bound.append(sum(min(n, budget.tokens) for n in lengths) / (budget.tokens * ranks))
    bound += [len(order) / (budget.rows * ranks)] if budget.rows else []
    turns = math.ceil(max(bound))
    while (groups := _fill(order, lengths, turns * ranks, budget)) is None:
        turns += 1
    return groups


def _fill(
    order: list[int], lengths: Sequence[int], count: int, budget: Budget
) -> list[Group] | None:
    """`count` groups, or None where a row finds no room."""
    assert len(order) >= count, "fewer rows than micro-batches"
    groups: list[Group] = [[] for _ in range(count)]
    live, costs, sizes = (np.zeros(count, kind) for kind in (np.int64, np.float64, np.int64))
    for row in order:
        length = lengths[row]
        room = budget.holds(sizes + 1, live + length, length)
        if not room.any():
            return None
        best = int(np.where(room, costs, np.inf).argmin())
        groups[best].append(row)
        live[best] += length
        costs[best] += budget.cost(length)
        sizes[best] += 1
    return groups


def _padded(
    order: list[int], lengths: Sequence[int], ranks: int, budget: Budget, least: int
) -> list[Group]:
    """Rows of like length together, then the costliest halved until every rank has as many."""
    groups: list[Group] = []
    for row in order:
        last = groups[-1] if groups else []
        if last and budget.holds(len(last) + 1, 0, lengths[last[0]]):
            last.append(row)
        else:
            groups.append([row])
    while len(groups) % ranks or len(groups) < ranks * least:
        several = [group for group in groups if len(group) > 1]
        widest = max(several, key=lambda group: _cost(group, lengths, budget))
        half = len(widest) // 2
        groups.append(widest[half:])
        del widest[half:]
    return groups


def share(lengths: Sequence[int], budget: Budget, device: torch.device) -> list[Group]:
    """This rank's own rows in micro-batches, as many as every other rank's. A collective."""
    groups = deal(lengths, 1, budget)[0]
    most = int(distributed.global_max(torch.tensor(len(groups), device=device)))
    return groups if most == len(groups) else deal(lengths, 1, budget, most)[0]


def pieces(rollout: Rollout, budget: Budget) -> list[tuple[Tensor, Rollout]]:
    """This rank's rows to be scored: (which rows, trimmed micro-batch). A collective."""
    device = rollout.prompt_ids.device
    groups = share(rollout.attention_mask.sum(1).tolist(), budget, device)
    rows = [torch.tensor(group, device=device) for group in groups]
    return [(index, rollout.rows(index).trimmed()) for index in rows]


def micro_batches(minibatch: Experience, budget: Budget) -> list[Experience]:
    """This rank's part of one optimizer step, dealt anew over all ranks. A collective.

    minibatch: as many rows on every rank. What comes back has no dataset columns where there are
    several ranks.
    """
    everyones = of_all_ranks(minibatch)
    lengths = everyones.attention_mask.sum(1).tolist()
    groups = deal(lengths, distributed.world_size(), budget)[distributed.rank()]
    device = minibatch.prompt_ids.device
    return [everyones.rows(torch.tensor(group, device=device)).trimmed() for group in groups]
