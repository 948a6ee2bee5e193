"""What a trunk reads: the live tokens of some rows end to end, or the rows, padded on the right.

B rows, T columns of prompt and response, H hidden size. Whoever makes a reading also gets the place
of every live token in what the trunk returns, so that nobody else knows how the rows were laid out.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gearshift.engine.attention import packed
from gearshift.engine.attention.sequences import Sequences
from gearshift.engine.batch import Rollout


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Packed: [1, N] without a mask; padded: [B, longest row]."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    sequences: Sequences | None


def lay_out(input_ids: Tensor, mask: Tensor, *, packs: bool) -> tuple[Reading, Tensor]:
    """A reading of rows [B, T], and the place [B, T] int64 of each live token in its tokens.

    mask: bool; a row's live tokens are neighbours. Positions are numbered from the first of them.
    Padding comes last: no token that a decoder reads then depends on how it treats padding.
    """
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    if not packs:
        longest = int(mask.sum(1).max())
        columns = torch.arange(longest, device=mask.device)
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        index = (mask.int().argmax(1, keepdim=True) + columns).clamp(max=mask.shape[1] - 1)
        made = Reading(
            input_ids=input_ids[rows, index],
            position_ids=columns.expand(len(mask), -1),
            attention_mask=columns < mask.sum(1, keepdim=True),
            sequences=None,
        )
        return made, rows * longest + positions
    made = Reading(
        input_ids=input_ids[mask][None],
        position_ids=positions[mask][None],
        attention_mask=None,
        sequences=Sequences.of(mask.sum(1).tolist(), mask.device),
    )
    return made, (mask.flatten().cumsum(0) - 1).view_as(mask)


def lay_out_rollout(rollout: Rollout, *, packs: bool) -> tuple[Reading, Tensor, Tensor]:
    """A reading of prompts and responses, with two kinds of places in its tokens: [N] the token
    before each of the N live response tokens, where that is predicted; [B] each row's last one."""
    reading, places = lay_out(rollout.input_ids, rollout.attention_mask, packs=packs)
    ends = places[:, rollout.prompt_ids.shape[1] :]
    before = ends[rollout.response_mask] - 1
    return reading, before, ends.gather(1, rollout.lengths[:, None] - 1)[:, 0]


def hidden_states(model: nn.Module, reading: Reading, places: Tensor) -> Tensor:
    """[places, H] of the trunk, without its head, at `places` [int64] of the reading's tokens, each
    named once."""
    trunk = packed.trunk(model)
    mask, sequences = reading.attention_mask, reading.sequences
    if sequences is not None:
        sequences = replace(sequences, read=places)
    told = packed.accepts(trunk, "position_ids")
    positions = {"position_ids": reading.position_ids} if told else {}
    with packed.reading(sequences):
        output = trunk(
            input_ids=reading.input_ids,
            attention_mask=None if mask is None else mask.long(),  # some subtract it
            use_cache=False,
            **positions,
        )
    return output.last_hidden_state.flatten(0, 1)[places]
