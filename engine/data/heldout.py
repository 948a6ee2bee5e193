"""Held-out prompts: read once, in the order of their files, and dealt over the ranks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.batch import PromptBatch
from gearshift.engine.config.schema import DataConfig, EvalConfig, EvalSourceConfig
from gearshift.engine.data.mixture import Walk
from gearshift.engine.data.prompts import PromptEncoder
from gearshift.engine.data.streams import (
    Example,
    as_batch,
    columns_in,
    nothing_fits,
    open_prompts,
    read_example,
)

# Row ids of held-out prompts begin here: no training response has the seed of one of theirs.
_FIRST_ROW, _ROWS_PER_SET = 2**61, 2**40


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One dataset of held-out prompts. They follow the rules of `data`: template, longest prompt,
    and what becomes of rows that are too long or no prompt."""

    name: str
    examples: list[Example]
    columns: list[str]
    dropped: int  # prompts without tokens, or with too many
    index: int

    def share(
        self, samples: int, rank: int, world: int, tokenizer: Any
    ) -> tuple[PromptBatch, Tensor]:
        """This rank's prompts, `samples` times: row k * n + i is sample k of its prompt i; and [n]
        bool, which of the n count.

        Every rank has equally many, so some have their last prompt, or the first of all, again.
        Prompt p has the same row ids, and so the same seeds, at every call and on any world size.
        """
        count = len(self.examples)
        own = list(range(rank, count, world)) or [0]
        counts = torch.arange(-(-count // world)) < len(range(rank, count, world))
        own += [own[-1]] * (len(counts) - len(own))
        mine, base = [self.examples[p] for p in own], _FIRST_ROW + self.index * _ROWS_PER_SET
        sizes = {"samples": samples, "stride": count, "base": base}
        return as_batch(mine, own, self.columns, tokenizer, **sizes), counts


def read_held_out(
    config: EvalConfig, data: DataConfig, tokenizer: Any, ids: int | None = None
) -> list[HeldOut]:
    """The datasets of `eval.sources`; ConfigError as for those of `data.sources`. ids: as of
    PromptEncoder."""
    if not config.sources:
        return []
    encoder = PromptEncoder(data, tokenizer, ids)
    mixture = open_prompts(config.sources, "eval.sources", encoder, seed=0, shuffle=False)
    return [
        _read(encoder, walk, source)
        for walk, source in zip(mixture.walks, config.sources, strict=True)
    ]


def _read(encoder: PromptEncoder, walk: Walk, source: EvalSourceConfig) -> HeldOut:
    limit, wanted = encoder.config.max_prompt_tokens, source.rows or len(walk)
    examples, dropped, longer = list[Example](), 0, False
    for number in map(int, walk.numbers):
        example = read_example(encoder, source, number, walk.rows[number])
        if example.fits(limit):
            examples.append(example)
        else:
            dropped, longer = dropped + 1, longer or bool(example.ids)
        if len(examples) == wanted:
            break
    if not examples:
        raise nothing_fits(walk, limit, longer)
    return HeldOut(
        name=source.label,
        examples=examples,
        columns=columns_in(walk),
        dropped=dropped,
        index=walk.index,
    )
