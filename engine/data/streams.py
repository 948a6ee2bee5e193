"""Prompts and pretraining text: what comes next depends on the seed, not on the world size.

Every rank walks the same global order of rows and keeps its share, so no rank talks to another and
a position is a few integers. Prompt p of a step belongs to rank p mod world size.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.batch import AS_READ, PromptBatch
from gearshift.engine.config.schema import DataConfig, PretrainConfig
from gearshift.engine.data.mixture import Mixture, Walk
from gearshift.engine.data.prompts import PromptEncoder
from gearshift.engine.data.readers import Row, columns_of


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How many prompts a step has, and which of them are this rank's.

    max_context: longest prompt and response together that the model can read; None: no limit.
    """

    prompts_per_step: int
    samples_per_prompt: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    max_context: int | None = None
    max_new_tokens: int = 0

    def __post_init__(self):
        if self.prompts_per_step % self.world_size:
            raise ValueError(
                f"ppo.prompts_per_step={self.prompts_per_step}: must be a multiple of the "
                f"{self.world_size} ranks"
            )


@dataclass(frozen=True)
class Example:
    """One prompt: its token ids and the columns that travel with it."""

    ids: list[int]
    columns: Row


class PromptStream:
    """Batches of tokenised prompts, without end.

    Prompt p of step s gets the row_ids s * rows_per_step + k * prompts_per_step + p for its samples
    k. A batch lists all of this rank's prompts for k = 0, then all for k = 1, and so on.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, **batching: Any):
        """batching: the fields of `Batching`.

        Raises ValueError for unreadable data, a missing column or counts that do not divide.
        """
        self.config, self.tokenizer = config, tokenizer
        self.batching = Batching(**batching)
        self.encoder = PromptEncoder(config, tokenizer)
        self.mixture = Mixture(
            config.sources, "data.sources", seed=self.batching.seed, shuffle=config.shuffle
        )
        self.mixture.require_columns("messages")
        names = [name for walk in self.mixture.walks for name in columns_of(walk.rows)]
        self.columns = list(dict.fromkeys(["prompt", *names]))
        self.limit, self.limit_name = _prompt_limit(config, self.batching)
        self.step = 0
        self.kept = [0] * len(self.mixture.walks)
        self.dropped = [0] * len(self.mixture.walks)
        self.empty = [0] * len(self.mixture.walks)  # of the dropped ones

    def next_batch(self) -> PromptBatch:
        """This rank's rows of the next step."""
        count, samples = self.batching.prompts_per_step, self.batching.samples_per_prompt
        rank, world = self.batching.rank, self.batching.world_size
        mine = [self._draw() for _ in range(count)][rank::world] * samples
        base = self.step * count * samples
        row_ids = [base + k * count + p for k in range(samples) for p in range(rank, count, world)]
        self.step += 1
        ids, mask = left_padded([example.ids for example in mine], pad_id(self.tokenizer))
        names = [*self.columns, AS_READ]
        columns = {name: [example.columns.get(name) for example in mine] for name in names}
        return PromptBatch(
            prompt_ids=ids, prompt_mask=mask, row_ids=torch.tensor(row_ids), columns=columns
        )

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
                "rows": len(walk.rows),
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

        Raises ValueError when the seed, the rows per step or the datasets have changed.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                section = "run" if name == "seed" else "ppo"
                raise ValueError(
                    f"{section}.{name}={value}: the checkpoint was written with {state[name]}; "
                    "restore it, or start a new run"
                )
        self.mixture.load_state_dict(state)
        self.step = state["step"]
        self.kept, self.dropped = list(state["kept"]), list(state["dropped"])
        self.empty = list(state.get("empty", self.empty))

    def _identity(self) -> dict[str, int]:
        wanted = ("prompts_per_step", "samples_per_prompt", "seed")
        return {name: value for name, value in asdict(self.batching).items() if name in wanted}

    def _draw(self) -> Example:
        """The next prompt of the global order that has tokens, and not too many."""
        walk, longer = self.mixture.next_walk(), False
        for _ in range(2 * len(walk.rows)):  # at least one whole epoch
            number, row = walk.next()
            example = self._example(walk, number, row)
            if 0 < len(example.ids) <= self.limit:
                self.kept[walk.index] += 1
                return example
            if self.config.overlong == "error":
                fault = (
                    f"{len(example.ids)} tokens, more than {self.limit_name}={self.limit}; raise it"
                    if example.ids
                    else "no tokens; give it some text"
                )
                raise ValueError(
                    f"{walk.source.path}, row {number}: the prompt has {fault}, or "
                    "data.overlong=drop"
                )
            self.dropped[walk.index] += 1
            self.empty[walk.index] += not example.ids
            longer |= bool(example.ids)
        count = len(walk.rows)
        if longer:
            raise ValueError(
                f"{walk.source.path}: all its {count} prompts have more tokens than "
                f"{self.limit_name}={self.limit}; raise it"
            )
        raise ValueError(
            f"{walk.source.path}: the tokenizer makes no token of any of its {count} prompts; "
            f"check actor.tokenizer and the column {walk.source.prompt_key}"
        )

    def _example(self, walk: Walk, number: int, row: Row) -> Example:
        try:
            text = self.encoder.read(row, walk.source.prompt_key)
            own = {"prompt": text.prompt, AS_READ: text.as_read}
            return Example(self.encoder.encode(text), row | own)
        except ValueError as error:  # the encoder names the value, we add where it stands
            raise ValueError(f"{walk.source.path}, row {number}: {error}") from None


class TextStream:
    """Rows of packed text for PPO-ptx: documents end to end, each closed by the end token.

    Row r of a step belongs to rank r mod world size. `prompt_key` names the text column.
    """

    def __init__(
        self, config: PretrainConfig, tokenizer: Any, seed: int, rank: int = 0, world_size: int = 1
    ):
        if config.rows % world_size:
            raise ValueError(
                f"pretrain.rows={config.rows}: must be a multiple of the {world_size} ranks"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("pretrain.sources: the tokenizer has no end token to join texts with")
        self.config, self.tokenizer, self.rank, self.world_size = (
            config,
            tokenizer,
            rank,
            world_size,
        )
        self.mixture = Mixture(config.sources, "pretrain.sources", seed=seed, shuffle=True)
        self.mixture.require_columns()
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
        """Continues where `state_dict` was taken; raises ValueError for another seed or dataset."""
        if state["seed"] != self.seed:
            raise ValueError(
                f"run.seed={self.seed}: the checkpoint was written with {state['seed']}"
            )
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
        for _ in range(2 * len(walk.rows)):  # at least one whole epoch
            number, row = walk.next()
            text = row.get(walk.source.prompt_key)
            if not isinstance(text, str):
                raise ValueError(
                    f"{walk.source.path}, row {number}: {walk.source.prompt_key}="
                    f"{str(text)[:60]!r}: must be a string"
                )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids:
                return [*ids, self.tokenizer.eos_token_id]
        raise ValueError(f"{walk.source.path}: all its {len(walk.rows)} texts are empty")


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


def _prompt_limit(config: DataConfig, batching: Batching) -> tuple[int, str]:
    """The longest prompt, in tokens, and the name of what limits it."""
    if batching.max_context is None:
        return config.max_prompt_tokens, "data.max_prompt_tokens"
    left = batching.max_context - batching.max_new_tokens
    if left < 1:
        raise ValueError(
            f"sampling.max_new_tokens={batching.max_new_tokens}: leaves no room for a prompt in "
            f"the model's {batching.max_context} positions; lower it"
        )
    if left < config.max_prompt_tokens:
        return left, "model positions - sampling.max_new_tokens"
    return config.max_prompt_tokens, "data.max_prompt_tokens"
