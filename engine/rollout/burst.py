"""Decode steps of the same rows, one after the other, while their plan holds.

The device works on the next step while the host reads one, so a sequence that ended is noticed a
step late, and what it drew then is dropped. Counters are arrays over the rows: Python that touched
each of 512 rows took longer than a step of a small model. Sequences get their tokens when they end,
or when the burst does.
"""

from collections.abc import Iterator

import numpy as np

from gearshift.engine.cluster.progress import beat
from gearshift.engine.rollout.graphs import DecodeGraphs, Drawn
from gearshift.engine.rollout.sampling import Ending
from gearshift.engine.rollout.scheduler import Scheduler, Sequence

Ended = tuple[Sequence, bool]  # whether an end token or stop string ended it, else its limit


class Burst:
    """Of the sequences `rows`, in the order in which `graphs` has loaded them."""

    def __init__(
        self, rows: list[Sequence], scheduler: Scheduler, graphs: DecodeGraphs, ending: Ending
    ):
        self.rows, self.scheduler, self.graphs, self.ending = rows, scheduler, graphs, ending
        self._places = np.array([s.row for s in rows])  # in the scheduler's table
        self._length = np.array([len(s.tokens) for s in rows])
        self._room = np.array([len(s.blocks) for s in rows]) * scheduler.block_size
        self._left = np.array([s.limit - len(s.logprobs) for s in rows])
        self._runs = np.ones(len(rows), dtype=bool)  # has not ended
        self._live = self._runs  # in the step that is read next
        # What is not handed over yet [rows, steps]; each sequence gets its part once, or all do.
        self._tokens = np.empty((len(rows), 64), dtype=np.int64)
        self._logprobs = np.empty((len(rows), 64), dtype=np.float32)
        self._steps = 0

    def run(self) -> Iterator[Ended]:
        """The sequences that end, as they do."""
        flying: Drawn | None = self.graphs.launch()
        while flying:
            following = self._live & self._runs & (self._left > 1)
            launched = self.graphs.launch() if self._extend(following) else None
            yield from self.take(*flying.read())
            flying, self._live = launched, following
            beat()
        self._hand_over(np.flatnonzero(self._runs))

    @property
    def drawing(self) -> int:
        """Rows whose draws in the step that is read next count."""
        return int((self._live & self._runs).sum())

    def take(self, token_ids: np.ndarray, logprobs: np.ndarray) -> Iterator[Ended]:
        """A step's draws [rows]; gives the sequences that they end."""
        kept = self._live & self._runs
        self._keep(token_ids, logprobs)
        self._length += kept
        self._left -= kept
        over = kept & self._reached(kept, token_ids)
        done = np.flatnonzero(over | kept & (self._left == 0))
        self._hand_over(done)
        for row in done:
            self._runs[row] = False
            self.scheduler.finish(self.rows[row])
            yield self.rows[row], bool(over[row])

    def _reached(self, kept: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Whether an end token or a stop string ends each row [rows]."""
        ends = np.isin(token_ids, self.ending.eos)
        if not self.ending.stops:
            return ends
        self._hand_over(np.flatnonzero(self._runs))  # stop strings are searched in the tokens
        self._steps = 0
        for row in np.flatnonzero(kept):
            sequence = self.rows[row]
            ends[row] = self.ending.reached(sequence.tokens, len(sequence.logprobs))
        return ends

    def _extend(self, following: np.ndarray) -> bool:
        """Has places for a further token of these rows; False where another plan is due."""
        scheduler, count = self.scheduler, int(following.sum())
        if not count or scheduler.stopped or scheduler.may_admit or not self.graphs.holds(count):
            return False
        short = np.flatnonzero(following & (self._length >= self._room))
        for row in short:
            if not scheduler.extend(self.rows[row]):
                return False
            self._room[row] += scheduler.block_size
        if len(short) or (following != self._live).any():
            tables = scheduler.table[self._places]
            tables[~following] = self.graphs.cache.dummy_block
            self.graphs.move(tables)
        return True

    def _keep(self, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        if self._steps == self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)], axis=1)
            self._logprobs = np.concatenate([self._logprobs, np.empty_like(self._logprobs)], axis=1)
        self._tokens[:, self._steps] = token_ids
        self._logprobs[:, self._steps] = logprobs
        self._steps += 1

    def _hand_over(self, rows: np.ndarray) -> None:
        """Gives these sequences what they have drawn."""
        for row in rows if self._steps else ():
            sequence = self.rows[row]
            count = int(self._length[row]) - len(sequence.tokens)
            sequence.tokens += self._tokens[row, :count].tolist()
            sequence.logprobs += self._logprobs[row, :count].tolist()
            self.scheduler.computed(sequence, count)
