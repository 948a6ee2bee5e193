"""Prompts and pretraining text: what comes next depends on the seed, not on the world size.

Every rank walks the same global order of rows and keeps its share, so no rank talks to another and
a position is a few integers. Prompt p of a step belongs to rank p mod world size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.batch import AS_READ, PromptBatch
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import DataConfig, PretrainConfig, SourceConfig
from gearshift.engine.data.mixture import Mixture, Walk
from gearshift.engine.data.prompts import PromptEncoder, require_rows
from gearshift.engine.data.readers import Row, columns_of, require_unicode

# Between the row ids, and so the seeds, of one attempt to draw a step's prompts and the next.
_ROWS_PER_ATTEMPT = 2**40


@dataclass(frozen=True)
class Redrawn:
    """New prompts for slots of a step; every rank has equally many, so some have one twice.

    slots: those of the first prompts, in order; the rest only fill up.
    """

    prompts: PromptBatch
    slots: list[int]


@dataclass(frozen=True)
class Example:
    """One prompt: its token ids and the columns that travel with it."""

    ids: list[int]
    columns: Row

    def fits(self, limit: int) -> bool:
        """Whether it has tokens, and no more than `limit`."""
        return 0 < len(self.ids) <= limit


def open_prompts(
    sources: Sequence[SourceConfig], key: str, encoder: PromptEncoder, *, seed: int, shuffle: bool
) -> Mixture:
    """Datasets of prompts, each row of which was looked at: ConfigError for one that is no prompt,
    unless data.bad_rows drops it."""
    mixture = Mixture(sources, key, seed=seed, shuffle=shuffle)
    mixture.require_columns("messages")
    for walk in mixture.walks:
        read = partial(encoder.read, key=walk.source.prompt_key)
        walk.sift(read, drop=encoder.config.bad_rows == "drop")
    return mixture


def columns_in(*walks: Walk) -> list[str]:
    """The columns that rows of these datasets come with."""
    names = [name for walk in walks for name in columns_of(walk.rows)]
    return list(dict.fromkeys(["prompt", *names]))


def read_example(encoder: PromptEncoder, source: SourceConfig, number: int, row: Row) -> Example:
    """A row as a prompt; ConfigError where it does not fit and data.overlong is error."""
    text, limit = encoder.read(row, source.prompt_key), encoder.config.max_prompt_tokens
    example = Example(encoder.encode(text), row | {"prompt": text.prompt, AS_READ: text.as_read})
    if encoder.config.overlong == "error" and not example.fits(limit):
        fault, fix = "no tokens", "give it some text, or data.overlong=drop"
        if example.ids:
            fault = f"{len(example.ids)} tokens, more than data.max_prompt_tokens={limit}"
            fix = "raise it, or data.overlong=drop"
        raise ConfigError(f"{source.path}, row {number}", f"the prompt has {fault}", fix)
    return example


def nothing_fits(walk: Walk, limit: int, longer: bool) -> ConfigError:
    """No prompt of a dataset can be used. longer: some have more tokens than `limit`."""
    count = len(walk)
    if longer:
        limited = f"data.max_prompt_tokens={limit}"
        problem = f"all its {count} prompts have more tokens than {limited}"
        return ConfigError(walk.source.path, problem, "raise it")
    problem = f"the tokenizer makes no token of any of its {count} prompts"
    fix = f"check actor.tokenizer and the column {walk.source.prompt_key}"
    return ConfigError(walk.source.path, problem, fix)


def as_batch(
    examples: Sequence[Example],
    places: Sequence[int],
    columns: list[str],
    tokenizer: Any,
    *,
    samples: int,
    stride: int,
    base: int,
) -> PromptBatch:
    """`samples` rows of each example, as one record: row k * n + i is sample k of example i.

    places: the number of each example among `stride` of all ranks; sample k of place p has the row
    id base + k * stride + p.
    """
    every = [*examples] * samples
    ids, mask = left_padded([example.ids for example in every], pad_id(tokenizer))
    row_ids = [base + k * stride + place for k in range(samples) for place in places]
    names = [*columns, AS_READ]
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=mask,
        row_ids=torch.tensor(row_ids),
        columns={name: [example.columns.get(name) for example in every] for name in names},
    )


class PromptStream:
    """Batches of tokenised prompts, without end.

    Prompt p of step s gets the row_ids s * rows_per_step + k * prompts_per_step + p for its samples
    k. A batch lists all of this rank's prompts for k = 0, then all for k = 1, and so on.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        *,
        prompts_per_step: int,
        samples_per_prompt: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        ids: int | None = None,
    ):
        """prompts_per_step: of all ranks. ids: as of PromptEncoder.

        Raises ConfigError for unreadable data or a missing column.
        """
        assert prompts_per_step % world_size == 0
        self.config, self.tokenizer = config, tokenizer
        self.prompts_per_step, self.samples_per_prompt = prompts_per_step, samples_per_prompt
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.encoder = PromptEncoder(config, tokenizer, ids)
        self.mixture = open_prompts(
            config.sources, "data.sources", self.encoder, seed=seed, shuffle=config.shuffle
        )
        self.columns = columns_in(*self.mixture.walks)
        self.limit = config.max_prompt_tokens
        self.step = 0
        self.kept = [0] * len(self.mixture.walks)
        self.dropped = [0] * len(self.mixture.walks)
        self.empty = [0] * len(self.mixture.walks)  # of the dropped ones

    def next_batch(self) -> PromptBatch:
        """This rank's rows of the next step."""
        count = self.prompts_per_step
        places = range(self.rank, count, self.world_size)
        drawn = [self._draw() for _ in range(count)]
        self.step += 1
        return self._batch([drawn[place] for place in places], places)

    def _batch(
        self, examples: Sequence[Example], places: Sequence[int], *, attempt: int = 0
    ) -> PromptBatch:
        """Of the step that was begun last; places: in the step."""
        count, samples = self.prompts_per_step, self.samples_per_prompt
        base = (self.step - 1) * count * samples + attempt * _ROWS_PER_ATTEMPT
        sizes = {"samples": samples, "stride": count, "base": base}
        return as_batch(examples, places, self.columns, self.tokenizer, **sizes)

    def look(self, read: Callable[[Row], Any]) -> None:
        """Has `read` see every row that takes part; ConfigError names file and row of one that it
        refuses. A collective."""
        for walk in self.mixture.walks:
            walk.sift(read)

    def redraw(self, slots: Sequence[int], attempt: int) -> Redrawn:
        """The next prompts for `slots` of the last batch, the same on every rank: prompts of a step
        are counted over all ranks. attempt: how often this step has drawn before.

        Row ids are those of the slots, moved on by the attempt, so that responses differ.
        """
        rank, world = self.rank, self.world_size
        drawn = {slot: self._draw() for slot in slots}
        shares = [[slot for slot in slots if slot % world == r] for r in range(world)]
        own = shares[rank]
        filled = own + [(own or list(slots))[-1]] * (max(map(len, shares)) - len(own))
        batch = self._batch([drawn[slot] for slot in filled], filled, attempt=attempt)
        return Redrawn(batch, own)

    def rendered_example(self) -> str:
        """The first prompt as the model reads it, special tokens included. Moves nothing."""
        state = self.state_dict()
        example = self._draw()
        self.load_state_dict(state)
        return self.tokenizer.decode(example.ids, skip_special_tokens=False)

    def counts(self) -> dict[str, Any]:
        """Prompts drawn so far over all ranks, in total and for each dataset."""
        per_source = [
            {
                "path": walk.source.path,
                "rows": len(walk),
                "epoch": walk.epoch,
                "kept": self.kept[i],
                "dropped": self.dropped[i],
                "empty": self.empty[i],
            }
            for i, walk in enumerate(self.mixture.walks)
        ]
        return {"kept": sum(self.kept), "dropped": sum(self.dropped), "sources": per_source}

    def report(self) -> str:
        """`counts` in one line."""
        counts = self.counts()
        sources = ", ".join(
            f"{entry['path']} ({entry['rows']} rows)" for entry in counts["sources"]
        )
        empty = sum(self.empty)
        return (
            f"prompts from {sources}: {counts['kept']} drawn, {counts['dropped'] - empty} dropped "
            f"with more than {self.limit} tokens" + (f", {empty} without any" if empty else "")
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank; plain JSON values."""
        counts = {name: list(getattr(self, name)) for name in ("kept", "dropped", "empty")}
        return {"step": self.step, **self._identity(), **counts, **self.mixture.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, on any world size.

        Raises ConfigError when the seed, the rows per step or the datasets have changed.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                section = "run" if name == "seed" else "ppo"
                problem = f"the checkpoint was written with {state[name]}"
                fix = "restore it, or start a new run"
                raise ConfigError(f"{section}.{name}", problem, fix, value)
        self.mixture.load_state_dict(state)
        self.step = state["step"]
        self.kept, self.dropped = list(state["kept"]), list(state["dropped"])
        self.empty = list(state.get("empty", self.empty))

    def _identity(self) -> dict[str, int]:
        wanted = ("prompts_per_step", "samples_per_prompt", "seed")
        return {name: getattr(self, name) for name in wanted}

    def _draw(self) -> Example:
        """The next prompt of the global order that has tokens, and not too many."""
        walk, longer = self.mixture.next_walk(), False
        for _ in range(2 * len(walk)):  # at least one whole epoch
            example = read_example(self.encoder, walk.source, *walk.next())
            if example.fits(self.limit):
                self.kept[walk.index] += 1
                return example
            self.dropped[walk.index] += 1
            self.empty[walk.index] += not example.ids
            longer |= bool(example.ids)
        raise nothing_fits(walk, self.limit, longer)


class TextStream:
    """Rows of packed text for PPO-ptx: documents end to end, each closed by the end token.

    Row r of a step belongs to rank r mod world size. `prompt_key` names the text column.
    """

    def __init__(
        self,
        config: PretrainConfig,
        tokenizer: Any,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        ids: int | None = None,
    ):
        """ids: as of PromptEncoder."""
        assert config.rows % world_size == 0
        problem = "the tokenizer has no end token to join texts with"
        refuse_if(tokenizer.eos_token_id is None, "pretrain.sources", problem)
        self.config, self.tokenizer = config, tokenizer
        self.rank, self.world_size = rank, world_size
        self.mixture = Mixture(config.sources, "pretrain.sources", seed=seed, shuffle=True)
        self.mixture.require_columns()
        for walk in self.mixture.walks:
            walk.sift(partial(_check_text, key=walk.source.prompt_key))
            if ids is not None and ids < len(tokenizer):
                walk.sift(partial(self._check_ids, key=walk.source.prompt_key, count=ids))
        self.seed = seed
        self.left_over: list[int] = []

    def next_batch(self) -> Tensor:
        """[rows / world size, max_tokens] int64, every token live."""
        rows = [self._row() for _ in range(self.config.rows)]
        return torch.tensor(rows[self.rank :: self.world_size])

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank; plain JSON values."""
        return {"seed": self.seed, "left_over": list(self.left_over), **self.mixture.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; ConfigError for another seed or dataset."""
        problem = f"the checkpoint was written with {state['seed']}"
        refuse_if(state["seed"] != self.seed, "run.seed", problem, value=self.seed)
        self.mixture.load_state_dict(state)
        self.left_over = list(state["left_over"])

    def _row(self) -> list[int]:
        length = self.config.max_tokens
        while len(self.left_over) < length:
            self.left_over += self._document()
        row, self.left_over = self.left_over[:length], self.left_over[length:]
        return row

    def _document(self) -> list[int]:
        """The next text that has tokens, and the end token."""
        walk = self.mixture.next_walk()
        for _ in range(2 * len(walk)):  # at least one whole epoch
            _, row = walk.next()
            text = row[walk.source.prompt_key]
            ids = self._ids(text)
            if ids:
                return [*ids, self.tokenizer.eos_token_id]
        raise ConfigError(walk.source.path, f"all its {len(walk)} texts are empty")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _check_ids(self, row: Row, key: str, count: int) -> None:
        require_rows(self._ids(row[key]), count, key, row[key])


def _check_text(row: Row, key: str) -> None:
    text = row.get(key)
    refuse_if(not isinstance(text, str), key, "must be a string", value=repr(str(text)[:60]))
    require_unicode(str(text), key)


def pad_id(tokenizer: Any) -> int:
    """What fills masked positions: the pad token, else the end token, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def left_padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] int64 and mask [B, P] bool, P the longest sequence."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = True
    return ids, mask
