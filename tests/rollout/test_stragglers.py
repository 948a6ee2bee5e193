"""Responses that go on in the next step: the same tokens, every prompt once, fewer forwards."""

import json

import pytest
import torch

from gearshift.engine.batch import PromptBatch
from gearshift.engine.cluster import distributed
from gearshift.engine.config import load as config_load
from gearshift.engine.config.check import check
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout import responses
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.responses import Share, generate_responses
from gearshift.engine.rollout.sampling import Completion
from gearshift.engine.rollout.stragglers import Backlog, check_row, next_prompts
from gearshift.launch import train
from tests.tiny import job as tiny_job
from tests.tiny.rollout import build, make_prompts

SAMPLING, EOS = SamplingConfig(max_new_tokens=40, limit_key="most"), [2, 11]
ROWS, STEPS = 6, 7


@pytest.fixture(scope="module")
def model():
    return build("Llama", num_hidden_layers=2)


def engine(model, *, graphs=False, **options):
    made = RolloutEngine(model, RolloutConfig(**options), eos_token_ids=EOS, pad_token_id=0)
    made._use_graphs = graphs
    return made


def batch(step: int) -> PromptBatch:
    """Row ids count on; a few rows may be long, the others are short."""
    row_ids = torch.arange(ROWS) + ROWS * step
    rows = make_prompts([1 + (3 * i) % 11 for i in row_ids.tolist()])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).bool()
    most = [40 if i % 5 == 0 else 1 + i % 4 for i in row_ids.tolist()]
    columns = {"most": most, "name": [f"row {i}" for i in row_ids.tolist()]}
    return PromptBatch(prompt_ids=ids, prompt_mask=mask, row_ids=row_ids, columns=columns)


def forwards(made) -> list[int]:
    """Counts the engine's forwards."""
    count, real = [0], made._forward

    def counted(inputs):
        count[0] += 1
        return real(inputs)

    made._forward = counted
    return count


def names(rollout) -> list[str]:
    return rollout.columns["name"]


def response(rollout, i: int) -> tuple[list[int], list[int], list[float], bool]:
    live = rollout.response_mask[i]
    return (
        rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist(),
        rollout.response_ids[i][live].tolist(),
        rollout.rollout_logprobs[i][live].tolist(),
        bool(rollout.finished[i]),
    )


@pytest.mark.parametrize("options", [{}, {"max_sequences": 3, "block_size": 4}, {"graphs": True}])
def test_every_prompt_gets_the_response_that_it_gets_alone(model, options):
    """Of one policy; tokens, log-probs and ends, whatever the steps in which they were drawn."""
    plain = engine(model)
    expected = {}
    for step in range(STEPS + 1):
        rollout = generate_responses(plain, batch(step), SAMPLING, 0, None)
        expected |= {rollout.columns["name"][i]: response(rollout, i) for i in range(ROWS)}
    backlog, deferring, seen, stale = Backlog(ROWS, 0.5), engine(model, **options), [], 0
    backlog.fill(batch(0))
    for step in range(STEPS):
        prompts = batch(step + 1)
        rollout = generate_responses(deferring, prompts, SAMPLING, 0, None, None, backlog)
        assert torch.equal(rollout.row_ids, prompts.row_ids), "the places of the step"
        assert len(rollout) == ROWS and len(backlog.waiting) == ROWS
        stale += backlog.stale_tokens
        for i, name in enumerate(names(rollout)):
            prompt, tokens, logprobs, finished = response(rollout, i)
            assert (prompt, tokens, finished) == (*expected[name][:2], expected[name][3])
            assert logprobs == pytest.approx(expected[name][2], abs=1e-5)
            seen.append(name)
    assert len(set(seen)) == len(seen) == STEPS * ROWS
    assert stale > 0, "nothing was ever deferred"


def test_a_step_does_not_wait_for_its_longest(model):
    plain, deferring, backlog = engine(model), engine(model), Backlog(ROWS, 0.5)
    counts = [forwards(made) for made in (plain, deferring)]
    backlog.fill(batch(0))
    for step in range(STEPS):
        generate_responses(plain, batch(step), SAMPLING, 0, None)
        generate_responses(deferring, batch(step + 1), SAMPLING, 0, None, None, backlog)
    assert counts[1][0] < 0.6 * counts[0][0]


def test_what_has_ended_too_many_is_not_generated_again(model):
    """Rows of one token end all at once; the step takes the oldest of them."""
    backlog, made = Backlog(ROWS, 0.5), engine(model)
    prompts = [batch(step) for step in range(3)]
    for some in prompts:
        some.columns["most"] = [1] * ROWS
    backlog.fill(prompts[0])
    first = generate_responses(made, prompts[1], SAMPLING, 0, None, None, backlog)
    assert first.columns["name"] == prompts[0].columns["name"]
    assert sum(w.ended for w in backlog.waiting) == 3 and backlog.stale_tokens == 0
    flying, wanted = backlog.launch(prompts[2])
    assert wanted == 3 and not any(w.ended for w in flying)
    second = generate_responses(made, prompts[2], SAMPLING, 0, None, None, backlog)
    assert second.columns["name"] == prompts[1].columns["name"] and backlog.stale_tokens == 3


def test_every_rank_of_a_group_gets_what_it_wants():
    shares = [Share([[1]] * 3, [0] * 3, [], [None] * 3, wanted) for wanted in (1, 2)]
    enough = responses._enough(shares)
    assert [enough(place) for place in (0, 1, 3, 5)] == [False, False, False, True]


def test_its_state_is_json_and_goes_on(model):
    backlog, made = Backlog(ROWS, 0.5), engine(model)
    backlog.fill(batch(0))
    for step in range(2):
        generate_responses(made, batch(step + 1), SAMPLING, 0, None, None, backlog)
    again = Backlog(ROWS, 0.5)
    again.load_state_dict(json.loads(json.dumps(backlog.state_dict())))
    assert backlog.begun > 0
    one, two = (
        generate_responses(made, batch(3), SAMPLING, 0, None, None, b) for b in (backlog, again)
    )
    assert one.columns == two.columns
    assert torch.equal(one.response_ids, two.response_ids)
    assert torch.equal(one.rollout_logprobs, two.rollout_logprobs)


def test_it_is_dealt_anew_on_other_ranks(model, monkeypatch):
    backlog = Backlog(ROWS, 0.5)
    backlog.fill(batch(0))
    state, dealt = backlog.state_dict(), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        half = Backlog(ROWS // 2, 0.5)
        half.load_state_dict(state)
        dealt.append([w.row_id for w in half.waiting])
    assert dealt == [[0, 2, 4], [1, 3, 5]]


def test_a_column_that_no_checkpoint_holds_is_told():
    check_row({"prompt": "a", "gold": [1, None]})
    with pytest.raises(ConfigError, match="rollout.defer_stragglers: .*; drop the column"):
        check_row({"prompt": "a", "picture": b"..."})


def test_a_response_longer_than_a_new_limit_ends_with_its_next_token(model):
    prompt, made = make_prompts([3])[0], engine(model, block_size=4)
    whole = SamplingConfig(max_new_tokens=30, suppress_tokens=EOS)
    first = made.generate([prompt], whole, [5])[0]
    for drawn in (7, 8, 20):
        begun = Completion(
            token_ids=first.token_ids[:drawn], logprobs=first.logprobs[:drawn], finished=False
        )
        less = SamplingConfig(max_new_tokens=8, suppress_tokens=EOS)
        (found,) = made.generate([prompt], less, [5], begun=[begun])
        assert found.ended and found.token_ids == first.token_ids[: max(8, drawn + 1)]


def test_nothing_is_generated_where_enough_has_ended(model):
    backlog, made = Backlog(1, 0.5), engine(model)
    steps = [batch(step).rows(torch.tensor([1])) for step in range(4)]
    for some in steps:
        some.columns["most"] = [1]
    backlog.fill(steps[0])
    first = generate_responses(made, steps[1], SAMPLING, 0, None, None, backlog)
    assert backlog.waiting[0].ended
    count = forwards(made)
    second = generate_responses(made, steps[2], SAMPLING, 0, None, None, backlog)
    assert count == [0] and [names(first), names(second)] == [names(steps[0]), names(steps[1])]
    generate_responses(made, steps[3], SAMPLING, 0, None, None, backlog)
    assert count[0] > 0


def test_rows_that_wait_lack_a_column_that_the_dataset_got_since(model):
    backlog, more = Backlog(ROWS, 0.5), batch(1)
    backlog.fill(batch(0))
    more.columns["new"] = [1] * ROWS
    rollout = generate_responses(engine(model), more, SAMPLING, 0, None, None, backlog)
    assert rollout.columns["new"].count(None) >= 3


def test_the_first_step_draws_the_prompts_of_two():
    class Stream:
        step = 0

        def next_batch(self):
            self.step += 1
            return batch(self.step)

    stream, backlog = Stream(), Backlog(ROWS, 0.5)
    for seen in (2, 3):
        prompts = next_prompts(stream, backlog)
        assert torch.equal(prompts.row_ids, batch(seen).row_ids) and stream.step == seen
    assert next_prompts(stream, None).row_ids[0] == 4 * ROWS


@pytest.mark.parametrize(
    "change, told",
    [
        ({}, "tokens of earlier policies need importance weights; set ppo.rollout_is_cap"),
        ({"ppo.estimator": "rloo", "ppo.samples_per_prompt": 2}, "compares responses of one step"),
        ({"ppo.old_logprobs": "rollout"}, "use ppo.old_logprobs: train"),
        ({"ppo.dynamic_sampling": 1, "ppo.samples_per_prompt": 2}, "use one of the two"),
    ],
)
def test_what_it_does_not_go_with(tmp_path, change, told):
    words = [f"--{key}={value}" for key, value in change.items()]
    job = str(tiny_job.write(tmp_path, rollout={"defer_stragglers": 0.25}))
    with pytest.raises(ValueError, match=f"rollout.defer_stragglers=0.25: .*{told}"):
        check(config_load.load(job, words).config)


def run(job, *words: str) -> None:
    assert train.main(["--config", str(job), *words]) == 0


@pytest.mark.bits
def test_a_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    """Six steps at once = three, and three of another process's."""
    tiny_job.alone(monkeypatch)
    job = tiny_job.write(
        tmp_path,
        run={"steps": 6, "export": False, "save_every": 3, "keep_checkpoints": 9},
        rollout={"defer_stragglers": 0.5},
        sampling={"max_new_tokens": 24},
        ppo={"rollout_is_cap": 2.0},
    )
    run(job, "--run.dir", str(tmp_path / "whole"))
    whole = tiny_job.learned(tmp_path / "whole")
    assert sum(line["rollout/deferred"] for line in whole) > 0
    assert max(line["rollout/stale_fraction"] for line in whole) > 0
    run(job, "--run.dir", str(tmp_path / "cut"), "--run.resume", at_3(tmp_path / "whole"))
    assert tiny_job.learned(tmp_path / "cut") == whole[3:]


def at_3(folder) -> str:
    return str(folder / "checkpoints" / "step_000003")
