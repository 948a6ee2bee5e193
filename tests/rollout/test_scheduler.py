"""The schedule alone, driven by a stand-in model that only counts what it has been shown."""

import random

import pytest

from gearshift.engine.attention.cache import BlockPool
from gearshift.engine.rollout.packing import pack
from gearshift.engine.rollout.scheduler import Prefix, Scheduler, Sequence

BLOCK = 4


def make_sequences(prompts, limits):
    prefixes = {}
    return [
        Sequence(
            index=i,
            prefix=prefixes.setdefault(tuple(prompt), Prefix(tokens=prompt)),
            seed=i,
            limit=limit,
            tokens=list(prompt),
        )
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


def make_scheduler(sequences, blocks=100, max_sequences=8, max_batch_tokens=64):
    return Scheduler(
        sequences,
        BlockPool(blocks),
        block_size=BLOCK,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
    )


class Ledger:
    """A cache of token ids in place of keys: checks that every context reads what was written."""

    def __init__(self, blocks):
        self.slots = [None] * (blocks * BLOCK)
        self.steps, self.computed = 0, 0

    def run(self, scheduler, sequences):
        """Generates to the end; token n of a response is 1000 + n."""
        while not scheduler.done:
            self.step(scheduler)
            assert self.steps < 10_000, "no progress"
        assert scheduler.pool.free == scheduler.pool.size, "blocks were lost"
        for s in sequences:
            assert s.response == [1000 + n for n in range(s.limit)]

    def step(self, scheduler):
        batch = scheduler.next()
        self.steps += 1
        for source, target in batch.copies:
            at = slice(target * BLOCK, (target + 1) * BLOCK)
            self.slots[at] = self.slots[source * BLOCK : (source + 1) * BLOCK]
        inputs = pack(batch, scheduler.table, BLOCK)
        assert len(set(inputs.slots.tolist())) == len(inputs.slots), "two tokens in one slot"
        for slot, token in zip(inputs.slots, inputs.token_ids, strict=True):
            self.slots[slot] = int(token)
        planned = [(s, 1) for s in batch.decode] + batch.prefill
        assert planned, "an empty step"
        for row, (sequence, count) in enumerate(planned):
            end = sequence.cached + count
            blocks = [int(b) for b in scheduler.table[sequence.row, : -(-end // BLOCK)]]
            read = [self.slots[b * BLOCK + i] for b in blocks for i in range(BLOCK)][:end]
            assert read == sequence.tokens[:end], "a context that was never written, or spoiled"
            if row < len(batch.decode):
                assert inputs.lengths[row] == end
        self.computed += sum(count for _, count in planned)
        for sequence, count in planned:
            scheduler.computed(sequence, count)
            if sequence.pending == 0:
                sequence.logprobs.append(0.0)
                sequence.tokens.append(999 + len(sequence.logprobs))
                if len(sequence.logprobs) == sequence.limit:
                    scheduler.finish(sequence)
        return batch


def test_every_context_is_intact_whatever_the_load():
    chooser = random.Random(0)
    preempted = 0
    for _ in range(150):
        kinds = [[100 * k + i for i in range(chooser.randint(1, 13))] for k in range(3)]
        prompts = [chooser.choice(kinds) for _ in range(chooser.randint(1, 9))]
        limits = [chooser.randint(1, 14) for _ in prompts]
        need = max(-(-(len(p) + n - 1) // BLOCK) for p, n in zip(prompts, limits, strict=True))
        blocks = need + chooser.choice([0, 1, 2, 5, 40])
        sequences = make_sequences(prompts, limits)
        scheduler = make_scheduler(
            sequences,
            blocks,
            max_sequences=chooser.choice([1, 2, 5]),
            max_batch_tokens=chooser.choice([2, 7, 64]),
        )
        Ledger(blocks).run(scheduler, sequences)
        preempted += scheduler.preemptions
    assert preempted > 20, "the loads were too light to test preemption"


def test_a_prompt_is_computed_once_for_all_its_samples():
    prompt = list(range(10))  # two full blocks and a half
    sequences = make_sequences([prompt] * 6, [5] * 6)
    scheduler, ledger = make_scheduler(sequences), Ledger(100)
    ledger.run(scheduler, sequences)
    # The other five compute its last token again, then each computes its 4 first response tokens.
    assert ledger.computed == 10 + 5 + 6 * 4


def test_full_blocks_are_shared_and_the_partial_one_is_copied():
    sequences = make_sequences([list(range(10))] * 2, [5] * 2)
    scheduler, ledger = make_scheduler(sequences), Ledger(100)
    ledger.step(scheduler)
    ledger.step(scheduler)
    first, second = (s.blocks for s in sequences)
    assert first[:2] == second[:2] and first[2] != second[2]


def test_samples_beyond_the_slots_still_share():
    prompt = list(range(9))
    sequences = make_sequences([prompt] * 5, [3] * 5)
    scheduler, ledger = make_scheduler(sequences, max_sequences=2), Ledger(100)
    ledger.run(scheduler, sequences)
    assert ledger.computed == 9 + 4 + 5 * 2


def test_prompts_are_cut_into_chunks_beside_decoding_rows():
    sequences = make_sequences([[1, 2], list(range(10, 50))], [20, 2])
    scheduler, ledger = make_scheduler(sequences, max_batch_tokens=16), Ledger(100)
    batches = [ledger.step(scheduler) for _ in range(4)]
    chunks = [[count for _, count in b.prefill] for b in batches]
    assert chunks == [[2, 14], [16], [10], []]
    assert [len(b.decode) for b in batches] == [0, 1, 1, 2]


def test_a_finished_sequence_makes_room_at_once():
    sequences = make_sequences([[i, i] for i in range(4)], [1, 5, 1, 1])
    scheduler, ledger = make_scheduler(sequences, max_sequences=2), Ledger(100)
    running = [len(b.decode) + len(b.prefill) for b in (ledger.step(scheduler) for _ in range(3))]
    assert running == [2, 2, 2]


def test_samples_of_a_prompt_pay_for_it_once():
    """32 sequences of a block each run, two samples of a prompt of 20 blocks wait."""
    scheduler = make_scheduler(
        make_sequences([[i, i] for i in range(32)], [2] * 32), blocks=120, max_sequences=40
    )
    Ledger(120).step(scheduler)
    scheduler._rows += [38, 39]  # idle places
    scheduler.waiting.extend(make_sequences([list(range(80))] * 2, [2, 2]))
    # The prompt, a block each to go on with, and one of each that runs.
    for _ in range(scheduler.pool.free - (20 + 1 + 1 + 32)):
        scheduler.pool.take()
    assert scheduler.may_admit
    scheduler.pool.take()
    assert not scheduler.may_admit


def test_a_burst_of_few_rows_takes_one_at_a_time():
    """Of 64 places memory fills five: a sixteenth of what runs is wanted, not of the places."""
    prompts = [[100 * i + n for n in range(40)] for i in range(64)]
    sequences = make_sequences(prompts, [20] * 64)
    scheduler = make_scheduler(sequences, blocks=56, max_sequences=64, max_batch_tokens=4000)
    Ledger(56).step(scheduler)
    assert len(scheduler.running) == 5 and not scheduler.may_admit
    scheduler.finish(scheduler.running[0])
    assert scheduler.may_admit


def test_a_burst_goes_on_until_a_sixteenth_of_its_places_is_idle_and_fits():
    sequences = make_sequences([[i, i] for i in range(40)], [2] * 40)
    scheduler, ledger = make_scheduler(sequences, max_sequences=32), Ledger(100)
    ledger.step(scheduler)
    assert len(scheduler.running) == 32 and not scheduler.may_admit
    scheduler.finish(sequences[0])
    assert not scheduler.may_admit  # of 32 places one is idle
    scheduler.finish(sequences[1])
    assert scheduler.may_admit
    taken = [scheduler.pool.take() for _ in range(scheduler.pool.free - 3)]
    assert not scheduler.may_admit  # no memory
    scheduler.pool.drop(taken)
    assert scheduler.may_admit
    scheduler.waiting.clear()
    assert not scheduler.may_admit


def test_the_youngest_is_preempted_first():
    sequences = make_sequences([[i] * 4 for i in range(3)], [20] * 3)
    scheduler, ledger = make_scheduler(sequences, blocks=9), Ledger(9)
    while not scheduler.preemptions:
        ledger.step(scheduler)
    assert scheduler.running == sequences[:2]
    assert list(scheduler.waiting) == sequences[2:]
    ledger.run(scheduler, sequences)


@pytest.mark.parametrize("blocks", [5, 6, 9])
def test_the_smallest_pools_finish(blocks):
    sequences = make_sequences([list(range(8))] * 3 + [list(range(50, 57))], [13, 13, 6, 2])
    scheduler = make_scheduler(sequences, blocks=blocks)
    Ledger(blocks).run(scheduler, sequences)
