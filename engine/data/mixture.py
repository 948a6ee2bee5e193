"""The global order of dataset rows: endless, shuffled, mixed by weights, with a saved position."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import SourceConfig
from gearshift.engine.data.readers import Row, columns_of, read_rows

# Fractional part of the golden ratio: n * GOLDEN mod 1 fills [0, 1) evenly for every range of n.
GOLDEN = 0.6180339887498949
logger = logging.getLogger("gearshift")
SAMPLED = 64  # rows of a dataset that tell it from another of as many rows


class Walk:
    """The endless order in which one dataset's rows are read, a new permutation every epoch."""

    def __init__(self, source: SourceConfig, index: int, *, seed: int, shuffle: bool):
        self.source, self.index, self.seed, self.shuffle = source, index, seed, shuffle
        self.rows = read_rows(source)
        self.numbers = np.arange(len(self.rows))  # of the rows that take part
        self.weights: np.ndarray | None = None  # of the same rows
        self.epoch, self.offset, self.drawn = 0, 0, ""
        self._order = self._permutation()

    def __len__(self) -> int:
        return len(self.numbers)

    def sift(self, read: Callable[[Row], Any], *, drop: bool = False) -> None:
        """Has `read` see every row that takes part, before any is drawn. ConfigError, with file and
        row, where it refuses one; with `drop` such rows take no part any more, which is said.

        A collective: each rank reads its share of the rows, and all learn of every fault.
        """
        own: dict[int, ConfigError] = {}
        for number in map(int, self.numbers[distributed.rank() :: distributed.world_size()]):
            try:
                read(self.rows[number])
            except ConfigError as error:
                own[number] = error.at(f"{self.source.path}, row {number}")
                if not drop:
                    break
        shares = distributed.all_gather_objects(own)
        faults = dict(sorted(item for share in shares for item in share.items()))
        if faults and not drop:
            raise next(iter(faults.values()))
        if faults:
            self.numbers = self.numbers[~np.isin(self.numbers, list(faults))]
            first, of = next(iter(faults.values())), f"of {len(self.rows)} rows"
            refuse_if(not len(self), self.source.path, f"no row is any good, as {first.mistake}")
            logger.warning("%d %s are left out, as %s", len(faults), of, first.mistake)
        self._weigh()
        if faults or self.weights is not None:
            self.seek(0, 0)  # in the order of those that are left

    def _weigh(self) -> None:
        """Reads the weights of the rows that take part; ConfigError names a row without one."""
        key, path = self.source.weight_key, self.source.path
        if key is None:
            return
        named, columns = f"data.sources.{self.index}.weight_key", columns_of(self.rows)
        refuse_if(not self.shuffle, named, "needs data.shuffle", value=key)
        problem, fix = f"no such column in {path}", f"its columns are {', '.join(columns)}"
        refuse_if(key not in columns, named, problem, fix, key)
        weights = []
        for number in map(int, self.numbers):
            weight: Any = self.rows[number].get(key)
            # A csv's cells are text.
            with suppress(ValueError):
                weight = float(weight) if isinstance(weight, str) else weight
            wrong = type(weight) not in (int, float) or not 0 <= weight < math.inf
            where = f"{path}, row {number}: {key}"
            refuse_if(wrong, where, "must be a number from 0 on", value=repr(weight))
            weights.append(float(weight))
        self.weights = np.array(weights)
        refuse_if(not self.weights.any(), path, f"every row has {key}=0")

    @cached_property
    def digest(self) -> str:
        """What the rows are, wherever they lie: a hash of some of them, the first and last too."""
        places = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).round().astype(int)
        sampled = [self.rows[int(number)] for number in self.numbers[places]]
        return _digest(sampled if self.weights is None else [sampled, self.weights.tolist()])

    def next(self) -> tuple[int, Row]:
        """(number of the row in its dataset, the row)."""
        if self.offset == len(self):
            self.seek(self.epoch + 1, 0)
        number = int(self._order[self.offset])
        self.offset += 1
        self.drawn = _digest([self.drawn, self.rows[number]])
        return number, self.rows[number]

    def seek(self, epoch: int, offset: int, drawn: str = "") -> None:
        """drawn: a digest of the epoch's rows before `offset`."""
        self.epoch, self.offset, self.drawn = epoch, offset, drawn
        self._order = self._permutation()

    def goes_on(self, entry: dict[str, Any]) -> bool:
        """Whether the rows drawn before a checkpoint are those of this walk; it wrote `entry`.

        Rows that had not been drawn may be others. A checkpoint may be older than its digests: then
        only the count is compared.
        """
        if entry["rows"] == len(self) and entry.get("digest", self.digest) == self.digest:
            return True
        if entry["epoch"] or entry["offset"] > len(self):
            return False
        self.seek(0, 0)
        for _ in range(entry["offset"]):
            self.next()
        return self.drawn == entry.get("drawn")

    def _permutation(self) -> np.ndarray:
        """The epoch's numbers of rows, in order."""
        if not self.shuffle:
            return self.numbers
        # RandomState's streams are frozen: a resumed run sees the same order under any NumPy.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, self.index, self.epoch]))
        generator = np.random.RandomState(bits)
        if self.weights is None:
            return self.numbers[generator.permutation(len(self))]
        # Systematic sampling: a row whose share of n draws is s comes floor(s) or ceil(s) times.
        upper = np.cumsum(self.weights) / self.weights.sum()
        points = (np.arange(len(self)) + generator.random_sample()) / len(self)
        chosen = np.searchsorted(upper, points, side="right")
        chosen = np.minimum(chosen, np.flatnonzero(self.weights)[-1])  # where the sum rounds
        return self.numbers[chosen[generator.permutation(len(self))]]


def _digest(value: Any) -> str:
    # A value that JSON has no word for may print its address: only its type counts.
    text = json.dumps(value, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


class Mixture:
    """Several walks, drawn in proportion to their weights; item n never changes its walk."""

    def __init__(self, sources: Sequence[SourceConfig], key: str, *, seed: int, shuffle: bool):
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
                "rows": len(walk),
                "digest": walk.digest,
                "drawn": walk.drawn,
                "epoch": walk.epoch,
                "offset": walk.offset,
            }
            for walk in self.walks
        ]
        return {"drawn": self.drawn, "sources": walks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError for other rows than those that had been drawn, wherever they lie."""
        saved = state["sources"]
        fix, now = "restore them, or start a new run", len(self.walks)
        problem = f"the checkpoint was written with {len(saved)} datasets, now there are {now}"
        refuse_if(len(saved) != now, self.key, problem, fix)
        for walk, entry in zip(self.walks, saved, strict=True):
            if not walk.goes_on(entry):
                was = f"the {entry['rows']} of the checkpoint's {entry['path']}"
                problem = f"its {len(walk)} rows are not {was}"
                may = "what may change are rows of the first epoch that were not drawn yet"
                may += ", but with data.shuffle not how many" if walk.shuffle else ""
                key = f"{self.key}.{walk.index}.path"
                raise ConfigError(key, problem, f"{fix} ({may})", walk.source.path)
        self.drawn = state["drawn"]
        for walk, entry in zip(self.walks, saved, strict=True):
            walk.seek(entry["epoch"], entry["offset"], entry.get("drawn", ""))
