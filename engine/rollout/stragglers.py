"""Stragglers: responses that go on in the next step, so that no step waits for its longest.

A step generates `rollout.defer_stragglers` more responses than it trains on, and takes the first
that end. The others keep what they have drawn, with the log-probs of the policy that drew it, and
go on under the policy of the next step (partial rollouts: Kimi Team 2025, arXiv 2501.12599). Their
importance weights are those of every rollout: see objective.correct_rollout.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gearshift.engine.batch import PromptBatch
from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError, said
from gearshift.engine.data.streams import PromptStream, left_padded
from gearshift.engine.rollout.sampling import Completion


@dataclass(kw_only=True)
class Waiting:
    """A prompt whose response has not been trained on."""

    prompt: list[int]
    row_id: int  # it seeds the response, whichever step goes on with it
    columns: dict[str, Any]
    drawn: Completion | None = None

    @property
    def ended(self) -> bool:
        return self.drawn is not None and self.drawn.ended

    @property
    def drawn_tokens(self) -> int:
        return len(self.drawn.token_ids) if self.drawn else 0


class Backlog:
    """This rank's prompts that wait for their response, or for the rest of it; oldest first.

    rows: that this rank trains on in a step. share: of them, that may be in flight beside them.
    Between two steps every rank has `rows` of them.
    """

    def __init__(self, rows: int, share: float):
        self.rows, self.beside = rows, math.ceil(share * rows)
        self.waiting: list[Waiting] = []
        self.stale_tokens = 0  # of the last step's rows: drawn by earlier policies
        self._launched: list[Waiting] = []

    @property
    def is_empty(self) -> bool:
        """Before the first step, which needs the prompts of two."""
        return not self.waiting

    @property
    def begun(self) -> int:
        """Responses that go on in the next step."""
        return sum(bool(w.drawn_tokens) and not w.ended for w in self.waiting)

    def fill(self, prompts: PromptBatch) -> None:
        """The prompts of a step more than there are steps, before the first."""
        self.waiting += _rows(prompts)

    def launch(self, prompts: PromptBatch) -> tuple[list[Waiting], int]:
        """What to generate now, with these prompts at the end, and how many of it must end before
        generation may stop."""
        self._launched = [*self.waiting, *_rows(prompts)]
        taken = self._launched[: self.rows + self.beside]
        flying = [w for w in taken if not w.ended]
        return flying, self.rows - (len(taken) - len(flying))

    def land(self, flying: Sequence[Waiting], completions: Sequence[Completion]) -> list[Waiting]:
        """Takes the responses to what `launch` gave; returns the rows of this step."""
        begun = {w.row_id: w.drawn_tokens for w in self._launched}
        for waiting, completion in zip(flying, completions, strict=True):
            waiting.drawn = completion if completion.token_ids else None
        ended = [w for w in self._launched if w.ended][: self.rows]
        chosen = {w.row_id for w in ended}
        self.waiting = [w for w in self._launched if w.row_id not in chosen]
        self.stale_tokens = sum(begun[w.row_id] for w in ended)
        return ended

    def state_dict(self) -> list[dict[str, Any]]:
        """The prompts of all ranks, oldest first; plain JSON values. A collective."""
        every = distributed.all_gather_objects([asdict(w) for w in self.waiting])
        return sorted((w for theirs in every for w in theirs), key=lambda w: w["row_id"])

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continues where `state_dict` was taken, on any world size."""
        own = state[distributed.rank() :: distributed.world_size()]
        self.waiting = [
            Waiting(**w | {"drawn": Completion(**w["drawn"]) if w["drawn"] else None}) for w in own
        ]


def _rows(prompts: PromptBatch) -> list[Waiting]:
    pairs = zip(prompts.token_ids(), prompts.row_ids.tolist(), strict=True)
    return [
        Waiting(
            prompt=prompt,
            row_id=row_id,
            columns={name: values[i] for name, values in prompts.columns.items()},
        )
        for i, (prompt, row_id) in enumerate(pairs)
    ]


def as_prompts(rows: Sequence[Waiting], like: PromptBatch) -> PromptBatch:
    """The prompts of `rows` as a record, on the device of `like`."""
    ids, mask = left_padded([w.prompt for w in rows], pad=0)
    record = PromptBatch(
        prompt_ids=ids,
        prompt_mask=mask,
        row_ids=torch.tensor([w.row_id for w in rows]),
        # A dataset may have got a column since a row began to wait.
        columns={name: [w.columns.get(name) for w in rows] for name in like.columns},
    )
    return record.to(like.prompt_ids.device)


def next_prompts(stream: PromptStream, backlog: Backlog | None) -> PromptBatch:
    """The prompts of a step; before the first, those of one more are left to wait."""
    if backlog and backlog.is_empty:
        backlog.fill(stream.next_batch())
    return stream.next_batch()


def check_row(row: dict[str, Any]) -> None:
    """Raises ConfigError for a row of a dataset that a checkpoint cannot hold while it waits."""
    try:
        json.dumps(row)
    except (TypeError, ValueError) as error:
        problem = f"a checkpoint cannot hold a row that waits ({said(error)})"
        raise ConfigError("rollout.defer_stragglers", problem, "drop the column") from None
