"""The records that travel between the stages: PromptBatch -> Rollout -> Experience.

B rows on this rank, P prompt tokens (left-padded), R response tokens (right-padded).
Column t of any [B, R] tensor belongs to response token t: its log-prob, the value of the state
before it, the reward after it. One `response_mask`, made by the sampler from what it sampled; the
end token is part of the response. Every row has at least one live response token.

Two prompts (5 6 and 7), and responses "8 9 <end>" and "8" that was cut by length (. is padding, T a
True and - a False of a mask):

    PromptBatch   prompt_ids        5 6     prompt_mask        T T
                                    . 7                        - T
    Rollout       response_ids      8 9 2   response_mask      T T T   finished  T
                                    8 . .                      T - -             -
                  rollout_logprobs  -0.7 -1.2 -0.1
                                    -0.7  0    0
    Experience    logprobs          as rollout_logprobs, from the training path
                  values            V(5 6)  V(5 6 8)  V(5 6 8 9)
                                    V(7)    0         0
                  scores            1.0 for the first row, which a reward gives after token 2;
                                    -1.0 for the second, after token 8
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gearshift.engine.cluster import distributed

# A column beside the dataset's: the prompt as the policy's template read it, a string or the
# template's arguments, system turn included.
AS_READ = "prompt as read"


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """This rank's prompts.

    row_ids number the responses of a whole run over all ranks. The sampler's seeds and the deal of
    rows to minibatches follow from them, so that neither depends on the world size.
    """

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool
    row_ids: Tensor  # [B] int64
    columns: dict[str, list[Any]]  # dataset columns, one entry per row, for reward functions

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def tensors(self) -> dict[str, Any]:
        """All fields by name; what the next record is built from."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def to(self, device: torch.device) -> Self:
        """The same record with its tensors on `device`."""
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.tensors().items()
        }
        return type(self)(**moved)

    def token_ids(self) -> list[list[int]]:
        """Each prompt without its padding."""
        pairs = zip(self.prompt_ids, self.prompt_mask, strict=True)
        return [row[live].tolist() for row, live in pairs]

    def rows(self, index: Tensor) -> Self:
        """The rows `index` [n] int64, in that order."""
        order, own = index.tolist(), self.tensors()
        columns = {name: [cells[i] for i in order] for name, cells in own.pop("columns").items()}
        return type(self)(**{name: value[index] for name, value in own.items()}, columns=columns)


@dataclass(frozen=True, kw_only=True)
class Rollout(PromptBatch):
    """Prompts with one sampled response each."""

    response_ids: Tensor  # [B, R] int64
    response_mask: Tensor  # [B, R] bool, True up to and including the end token
    rollout_logprobs: Tensor  # [B, R] float32, of the sampler; 0 where masked
    finished: Tensor  # [B] bool: ended by an end token or stop string, not by length

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive pieces of at most `size` rows, without columns that are padding in all."""
        for index in torch.arange(len(self), device=self.prompt_ids.device).split(size):
            yield self.rows(index).trimmed()

    def trimmed(self) -> Self:
        """Without prompt or response columns that are padding in every row."""
        used, last = int(self.prompt_mask.sum(1).max()), self.response_mask.any(0).nonzero().max()
        width, length = self.response_ids.shape[1], int(last) + 1
        return type(self)(
            **{
                name: _trim(name, value, used, width, length)
                for name, value in self.tensors().items()
            }
        )

    @property
    def input_ids(self) -> Tensor:
        """[B, P + R] int64: what a model reads."""
        return torch.cat([self.prompt_ids, self.response_ids], 1)

    @property
    def attention_mask(self) -> Tensor:
        """[B, P + R] bool."""
        return torch.cat([self.prompt_mask, self.response_mask], 1)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: live response tokens."""
        return self.response_mask.sum(1)


@dataclass(frozen=True, kw_only=True)
class Experience(Rollout):
    """A judged rollout: what the epochs of an update read."""

    logprobs: Tensor  # [B, R] float32: log pi_old, from the training path
    ref_logprobs: Tensor  # [B, R] float32
    values: Tensor  # [B, R] float32: V before token t
    advantages: Tensor  # [B, R] float32
    returns: Tensor  # [B, R] float32
    scores: Tensor  # [B] float32: as they entered the reward


def _trim(name: str, value: Any, prompt: int, width: int, length: int) -> Any:
    if name in ("prompt_ids", "prompt_mask"):
        return value[:, -prompt:]
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width:
        return value[:, :length]
    return value


def _widened(rows: PromptBatch, prompt: int, response: int) -> dict[str, Any]:
    """All fields, with prompts of `prompt` columns and responses of `response`."""
    fields = rows.tensors()
    for name, value in fields.items():
        if name in ("prompt_ids", "prompt_mask"):
            fields[name] = pad(value, (prompt - value.shape[1], 0))
        elif isinstance(value, Tensor) and value.dim() == 2:
            fields[name] = pad(value, (0, response - value.shape[1]))
    return fields


def joined(first: Rollout, second: Rollout) -> Rollout:
    """The rows of one, and below them those of the other, which has the same dataset columns."""
    prompt = max(rows.prompt_ids.shape[1] for rows in (first, second))
    response = max(rows.response_ids.shape[1] for rows in (first, second))
    upper, lower = (_widened(rows, prompt, response) for rows in (first, second))
    columns = {name: own + lower["columns"][name] for name, own in upper.pop("columns").items()}
    return Rollout(
        **{name: torch.cat([own, lower[name]]) for name, own in upper.items()}, columns=columns
    )


def of_all_ranks(experience: Experience) -> Experience:
    """The rows of every rank, without dataset columns; ordered by row_id. A collective.

    Every rank has as many rows; widths may differ.
    """
    if distributed.world_size() == 1:
        return experience
    own = torch.tensor([experience.prompt_ids.shape[1], experience.response_ids.shape[1]])
    prompt, response = distributed.global_max(own.to(experience.prompt_ids.device)).tolist()
    gathered = {
        name: distributed.all_gather_rows(value)
        for name, value in _widened(experience, prompt, response).items()
        if isinstance(value, Tensor)
    }
    rows = Experience(**gathered, columns={})
    return rows.rows(rows.row_ids.argsort())


def minibatches(
    experience: Experience, size: int, world_size: int, generator_seed: int
) -> Iterator[Experience]:
    """Shuffled minibatches of `size` rows over all ranks; yields this rank's share of each.

    Row i of a step lies in column i mod size; every minibatch takes one row of each column, in an
    order shuffled per column. A rank owns whole columns (those congruent to it modulo the world
    size), so each minibatch has size / world_size rows on every rank and the same rows whatever
    the world size.
    """
    column = experience.row_ids % size
    order = torch.argsort(experience.row_ids)
    shuffled = []
    for c in column.unique().tolist():
        rows = order[column[order] == c]
        generator = torch.Generator().manual_seed((generator_seed * 1_000_003 + c) % 2**63)
        shuffled.append(rows[torch.randperm(len(rows), generator=generator).to(rows.device)])
    assert len(shuffled) * world_size == size, "rows are not dealt evenly over the ranks"
    for index in torch.stack(shuffled, 1):
        yield experience.rows(index)
