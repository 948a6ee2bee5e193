"""Which tokens of which sequences the next forward computes.

Continuous batching: a finished sequence's place is taken by a waiting one, at once or, where
decoding has graphs, as soon as a few are free. Prompts are computed in chunks of at most
`max_batch_tokens`, in the same forward as the decoding rows. Samples of one prompt wait until it
has been computed once and then share its blocks. When the pool is exhausted the youngest running
sequence gives its blocks back and is recomputed later. The schedule depends on lengths only, so
that every rank of a tensor-parallel group makes the same one.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from gearshift.engine.attention.cache import BlockPool

BREAK_SHARE = 16  # a burst of decode steps ends where a sixteenth of what runs can be added


@dataclass(eq=False, kw_only=True)
class Prefix:
    """A prompt and the samples that still wait for it."""

    tokens: list[int]
    waiting: int = 0
    leader: "Sequence | None" = None  # is computing the prompt now
    blocks: list[int] = field(default_factory=list)  # of the computed prompt, held for `waiting`


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One response being generated."""

    index: int  # its place in the caller's list
    prefix: Prefix
    seed: int
    limit: int  # longest response
    tokens: list[int]  # prompt and response so far
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache
    row: int = -1  # of the block table, while running

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached

    @property
    def response(self) -> list[int]:
        return self.tokens[len(self.prefix.tokens) :]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward computes: `decode` one token each, then `prefill` (sequence, tokens)."""

    decode: list[Sequence]
    prefill: list[tuple[Sequence, int]]
    copies: list[tuple[int, int]]  # blocks (source, destination) to copy first

    @property
    def drawing(self) -> list[Sequence]:
        """The sequences whose last token this batch computes: they get a new one, in this order.

        To be read before `computed` is called.
        """
        return self.decode + [s for s, count in self.prefill if s.pending == count]


class Scheduler:
    """Waiting and running sequences over one pool of blocks.

    table: [max_sequences, most blocks of a sequence] int32, the blocks of the running sequences.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        pool: BlockPool,
        *,
        block_size: int,
        max_sequences: int,
        max_batch_tokens: int,
        patient: bool = False,
    ):
        """patient: decoding rows have graphs, which a prompt beside them costs: see may_admit."""
        self.patient = patient
        self.pool, self.block_size, self.max_batch_tokens = pool, block_size, max_batch_tokens
        self.waiting = deque(sequences)
        self.running: list[Sequence] = []
        for sequence in sequences:
            sequence.prefix.waiting += 1
        longest = max((len(s.prefix.tokens) + s.limit for s in sequences), default=0)
        rows = min(max_sequences, len(sequences))
        self.table = np.zeros((rows, self._blocks_of(longest)), dtype=np.int32)
        self._rows = list(range(rows - 1, -1, -1))
        self._copies: list[tuple[int, int]] = []
        self.preemptions = 0
        self.stopped = False  # by who reads the responses: what runs is left as it is

    @property
    def may_admit(self) -> bool:
        """Whether so many waiting sequences could start now that a forward for them pays: a prompt
        costs a burst of decode steps its graph."""
        count = min(len(self.waiting), max(1, -(-len(self.running) // BREAK_SHARE)))
        if not count or len(self._rows) < count:
            return False
        first, need = set[Prefix](), 0
        for sequence in islice(self.waiting, count):
            need += self._need(sequence)
            if sequence.prefix in first and not sequence.prefix.blocks:
                need -= self._blocks_of(len(sequence.prefix.tokens))  # the first one's serve
            first.add(sequence.prefix)
        return need + len(self.running) <= self.pool.free

    @property
    def done(self) -> bool:
        return self.stopped or not self.waiting and not self.running

    def next(self) -> Batch:
        """Plans one forward; reserves the blocks it writes."""
        decode: list[Sequence] = []
        prefill: list[tuple[Sequence, int]] = []
        self._copies = []
        budget = self.max_batch_tokens
        for sequence in list(self.running):
            if sequence.row < 0:  # preempted by an older one
                continue
            if (sequence.pending == 1 or budget) and self._reserve(sequence):
                budget -= self._plan(sequence, budget, decode, prefill)
        if not (self.patient and decode and not prefill) or self.may_admit:
            self._admit(budget, decode, prefill)
        return Batch(decode=decode, prefill=prefill, copies=self._copies)

    def extend(self, sequence: Sequence) -> bool:
        """One more block for the tokens to come; False where none is free."""
        if not self.pool.free:
            return False
        self._extend(sequence, [self.pool.take()])
        return True

    def computed(self, sequence: Sequence, count: int) -> None:
        """Notes that `count` further tokens of the sequence are in the cache."""
        sequence.cached += count
        prefix = sequence.prefix
        if prefix.leader is sequence and sequence.cached >= len(prefix.tokens):
            prefix.leader = None
            if prefix.waiting:
                prefix.blocks = sequence.blocks[: self._blocks_of(len(prefix.tokens))]
                self.pool.hold(prefix.blocks)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out; its place and its blocks are free."""
        self.running.remove(sequence)
        self._vacate(sequence)

    def _plan(self, sequence: Sequence, budget: int, decode: list, prefill: list) -> int:
        """Adds a sequence to the batch; returns the prefill tokens used up."""
        if sequence.pending == 1:
            decode.append(sequence)
            return 0
        count = min(sequence.pending, budget)
        prefill.append((sequence, count))
        return count

    def _admit(self, budget: int, decode: list, prefill: list) -> None:
        held_back = []
        while self.waiting and self._rows and budget > 0:
            sequence = self.waiting.popleft()
            prefix = sequence.prefix
            if prefix.leader is not None:  # its prompt is being computed for another sample
                held_back.append(sequence)
                continue
            if not self._room_for(sequence):
                self.waiting.appendleft(sequence)
                break
            self._enter(sequence)
            reserved = self._reserve(sequence)
            assert reserved, "admitted without room"
            budget -= self._plan(sequence, budget, decode, prefill)
        self.waiting.extendleft(reversed(held_back))

    def _need(self, sequence: Sequence) -> int:
        """Blocks that a waiting sequence takes when it starts, and one to go on with."""
        return self._blocks_of(len(sequence.tokens)) - len(sequence.prefix.blocks) + 1

    def _room_for(self, sequence: Sequence) -> bool:
        # One block in reserve per running sequence, or the newcomer would soon push one out.
        if self._need(sequence) + len(self.running) <= self.pool.free:
            return True
        if self.running:
            return False
        self._drop_prefixes()
        return True

    def _enter(self, sequence: Sequence) -> None:
        prefix = sequence.prefix
        sequence.row = self._rows.pop()
        prefix.waiting -= 1
        if prefix.blocks:
            # The last prompt token is computed again: its logits are the sample's first.
            sequence.cached = len(prefix.tokens) - 1
            self._extend(sequence, prefix.blocks)
            self.pool.hold(prefix.blocks)
            if not prefix.waiting:
                self._release_prefix(prefix)
        else:
            prefix.leader = sequence
        self.running.append(sequence)

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for all pending tokens; False if the sequence itself had to be preempted."""
        first = sequence.cached // self.block_size
        blocks = self._blocks_of(len(sequence.tokens))
        copy = first < len(sequence.blocks) and self.pool.shared(sequence.blocks[first])
        while self.pool.free < blocks - len(sequence.blocks) + copy:
            if not self._make_room(sequence):
                return False
            copy = first < len(sequence.blocks) and self.pool.shared(sequence.blocks[first])
        if copy:
            self._own(sequence, first)
        self._extend(sequence, [self.pool.take() for _ in range(blocks - len(sequence.blocks))])
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Frees blocks for `sequence`; False if the victim was the sequence itself."""
        if self._drop_prefixes():
            return True
        victim = self.running[-1]
        assert victim is not sequence or len(self.running) > 1, "pool below one sequence's need"
        self._preempt(victim)
        return victim is not sequence

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.cached = 0
        sequence.prefix.waiting += 1
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        if sequence.prefix.leader is sequence:
            sequence.prefix.leader = None
        self.pool.drop(sequence.blocks)
        sequence.blocks = []
        self._rows.append(sequence.row)
        sequence.row = -1

    def _drop_prefixes(self) -> bool:
        """Gives up prompts held for waiting samples; they are computed again when needed."""
        free = self.pool.free
        for sequence in self.waiting:
            self._release_prefix(sequence.prefix)
        return self.pool.free > free

    def _release_prefix(self, prefix: Prefix) -> None:
        self.pool.drop(prefix.blocks)
        prefix.blocks = []

    def _own(self, sequence: Sequence, position: int) -> None:
        """Replaces a shared block by a copy of the sequence's own."""
        shared, own = sequence.blocks[position], self.pool.take()
        if sequence.cached % self.block_size:
            self._copies.append((shared, own))
        self.pool.drop([shared])
        sequence.blocks[position] = own
        self.table[sequence.row, position] = own

    def _extend(self, sequence: Sequence, blocks: list[int]) -> None:
        start = len(sequence.blocks)
        sequence.blocks += blocks
        self.table[sequence.row, start : len(sequence.blocks)] = blocks

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
