"""The global order of dataset rows: endless, shuffled, mixed by weights, with a saved position."""

import hashlib
import json
from functools import cached_property
from typing import Any

import numpy as np

from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import SourceConfig
from gearshift.engine.data.readers import Row, columns_of, read_rows

# Fractional part of the golden ratio: n * GOLDEN mod 1 fills [0, 1) evenly for every range of n.
GOLDEN = 0.6180339887498949
SAMPLED = 64  # rows of a dataset that tell it from another of as many rows


class Walk:
    """The endless order in which one dataset's rows are read, a new permutation every epoch."""

    def __init__(self, source: SourceConfig, index: int, *, seed: int, shuffle: bool):
        self.source, self.index, self.seed, self.shuffle = source, index, seed, shuffle
        self.rows = read_rows(source)
        self.epoch = self.offset = 0
        self._order = self._permutation()

    @cached_property
    def digest(self) -> str:
        """What the rows are, wherever they lie: a hash of some of them, the first and last too."""
        numbers = np.linspace(0, len(self.rows) - 1, min(SAMPLED, len(self.rows))).round()
        rows = [self.rows[int(number)] for number in numbers]
        # A value that JSON has no word for may print its address: only its type counts.
        text = json.dumps(rows, sort_keys=True, default=lambda value: type(value).__name__)
        return hashlib.sha256(text.encode()).hexdigest()

    def next(self) -> tuple[int, Row]:
        """(number of the row in its dataset, the row)."""
        if self.offset == len(self.rows):
            self.seek(self.epoch + 1, 0)
        number = int(self._order[self.offset])
        self.offset += 1
        return number, self.rows[number]

    def seek(self, epoch: int, offset: int) -> None:
        self.epoch, self.offset = epoch, offset
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        # RandomState's streams are frozen: a resumed run sees the same order under any NumPy.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, self.index, self.epoch]))
        return np.random.RandomState(bits).permutation(len(self.rows))


class Mixture:
    """Several walks, drawn in proportion to their weights; item n never changes its walk."""

    def __init__(self, sources: list[SourceConfig], key: str, *, seed: int, shuffle: bool):
        refuse_if(not sources, key, "give at least one dataset", value="[]")
        self.key = key
        self.walks = [
            Walk(source, index, seed=seed, shuffle=shuffle) for index, source in enumerate(sources)
        ]
        weights = np.array([source.weight for source in sources])
        self.upper = np.cumsum(weights / weights.sum())
        self.start = np.random.RandomState(seed % 2**32).random_sample()
        self.drawn = 0

    def next_walk(self) -> Walk:
        point = (self.start + self.drawn * GOLDEN) % 1.0
        self.drawn += 1
        chosen = int(np.searchsorted(self.upper, point, side="right"))
        return self.walks[min(chosen, len(self.walks) - 1)]

    def require_columns(self, *alternatives: str) -> None:
        """Raises ConfigError when a dataset has neither its `prompt_key` nor an alternative."""
        for walk in self.walks:
            columns, wanted = columns_of(walk.rows), walk.source.prompt_key
            if not {wanted, *alternatives} & set(columns):
                problem = f"no such column in {walk.source.path}"
                fix = f"its columns are {', '.join(columns)}"
                raise ConfigError(f"{self.key}.{walk.index}.prompt_key", problem, fix, wanted)

    def state_dict(self) -> dict[str, Any]:
        walks = [
            {
                "path": walk.source.path,
                "rows": len(walk.rows),
                "digest": walk.digest,
                "epoch": walk.epoch,
                "offset": walk.offset,
            }
            for walk in self.walks
        ]
        return {"drawn": self.drawn, "sources": walks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError for other rows than those that were drawn from, wherever they lie."""
        saved = state["sources"]
        fix, now = "restore them, or start a new run", len(self.walks)
        problem = f"the checkpoint was written with {len(saved)} datasets, now there are {now}"
        refuse_if(len(saved) != now, self.key, problem, fix)
        for walk, entry in zip(self.walks, saved, strict=True):
            # A checkpoint may be older than the digest: then only the count is compared.
            same = entry.get("digest", walk.digest) == walk.digest
            if entry["rows"] != len(walk.rows) or not same:
                was = f"the {entry['rows']} of the checkpoint's {entry['path']}"
                problem = f"its {len(walk.rows)} rows are not {was}"
                raise ConfigError(f"{self.key}.{walk.index}.path", problem, fix, walk.source.path)
        self.drawn = state["drawn"]
        for walk, entry in zip(self.walks, saved, strict=True):
            walk.seek(entry["epoch"], entry["offset"])
