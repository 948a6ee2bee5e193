"""From completions to a Rollout, the end tokens, and the seeds of sequences."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gearshift.engine.batch import PromptBatch
from gearshift.engine.config.schema import ModelConfig, RolloutConfig, SamplingConfig
from gearshift.engine.models.load import load_model
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.padded import PaddedEngine
from gearshift.engine.rollout.responses import (
    as_rollout,
    choose_engine,
    end_token_ids,
    generate_responses,
    limit_in,
    sequence_seed,
)
from gearshift.engine.rollout.sampling import Completion
from tests.tiny import models as tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] "
    "+ ' <|im_end|> ' }}{% endfor %}"
)


def model(eos=2, generation_eos=None):
    """What end_token_ids reads of a causal LM."""
    return SimpleNamespace(
        config=SimpleNamespace(eos_token_id=eos),
        generation_config=SimpleNamespace(eos_token_id=generation_eos),
    )


def prompts(rows: list[list[int]], row_ids=None) -> PromptBatch:
    width = max(map(len, rows))
    return PromptBatch(
        prompt_ids=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        prompt_mask=torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        ).bool(),
        row_ids=torch.tensor(row_ids or list(range(len(rows)))),
        columns={},
    )


def test_every_source_names_end_tokens():
    tokenizer = tiny.tokenizer()
    assert end_token_ids(tokenizer, model()) == [2]
    assert end_token_ids(tokenizer, model(eos=[2, 7], generation_eos=9)) == [2, 7, 9]
    assert end_token_ids(tokenizer, model(eos=None)) == [2]


def test_the_chat_template_knows_another_end_than_the_tokenizer():
    """As in converted checkpoints whose EOS is that of pretraining."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    assert end_token_ids(tokenizer, model()) == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    # A template that goes straight on to ordinary text adds nothing.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' w5 ' }}{% endfor %}"
    assert end_token_ids(tokenizer, model()) == [2]


def test_no_end_token_at_all_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        end_token_ids(tokenizer, model(eos=None))


def test_completions_are_right_padded_under_their_mask():
    completions = [
        Completion(token_ids=[5, 0, 2], logprobs=[-1.0, -2.0, -3.0], finished=True),
        Completion(token_ids=[7], logprobs=[-0.5], finished=False),
    ]
    rollout = as_rollout(prompts([[4], [5]]), completions)
    assert rollout.response_ids.tolist() == [[5, 0, 2], [7, 0, 0]]
    # A sampled pad id is a token like any other.
    assert rollout.response_mask.tolist() == [[True] * 3, [True, False, False]]
    assert rollout.rollout_logprobs.tolist() == [[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]]
    assert rollout.finished.tolist() == [True, False]
    assert rollout.rollout_logprobs.dtype == torch.float32
    assert rollout.response_ids.dtype == torch.int64


def test_sequence_seeds_differ_by_run_and_row_and_fit_63_bits():
    seeds = {sequence_seed(run, row) for run in range(20) for row in range(500)}
    assert len(seeds) == 20 * 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    ones = sum(bin(seed).count("1") for seed in seeds) / len(seeds)
    assert ones == pytest.approx(31.5, abs=0.3)  # neighbours are not alike
    assert sequence_seed(3, 4) == sequence_seed(3, 4)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tiny.save_policy(tmp_path_factory.mktemp("policy"), vocab_size=12)
    return load_model(ModelConfig(path=str(path)), "policy", {"zero_optimization": {"stage": 0}})


def sample(lm, batch, seed=0):
    engine = RolloutEngine(
        lm, RolloutConfig(), eos_token_ids=[2], pad_token_id=0, tokenizer=tiny.tokenizer(12)
    )
    return generate_responses(engine, batch, SamplingConfig(max_new_tokens=6), seed, None)


def test_a_row_is_the_same_whatever_its_neighbours_and_padding(lm):
    rows = [[4, 5, 6, 7], [8], [9, 10], [4, 5, 6, 7]]
    together = sample(lm, prompts(rows, [10, 11, 12, 13]))
    for i, row in enumerate(rows):
        alone = sample(lm, prompts([row], [10 + i]))
        live = together.response_ids[i][together.response_mask[i]]
        assert torch.equal(live, alone.response_ids[0])
    # Equal prompts, other rows: other draws. The same row in another run: other draws too.
    assert not torch.equal(together.response_ids[0], together.response_ids[3])
    again = sample(lm, prompts(rows, [10, 11, 12, 13]), seed=1)
    assert again.response_ids.tolist() != together.response_ids.tolist()


def test_responses_end_at_their_end_token_or_their_limit(lm):
    rollout = sample(lm, prompts([[4 + i % 8] for i in range(64)]))
    for ids, mask, finished in zip(
        rollout.response_ids, rollout.response_mask, rollout.finished, strict=True
    ):
        live = ids[mask].tolist()
        assert 2 not in live[:-1]
        assert (live[-1] == 2) == bool(finished)
        assert bool(finished) or len(live) == 6
    assert rollout.finished.any() and not rollout.finished.all()


def test_the_padded_engine_draws_the_same_responses(lm):
    setup = {"eos_token_ids": [2], "pad_token_id": 2}
    rollouts = [
        generate_responses(
            engine(lm, RolloutConfig(), **setup),
            prompts([[1, 5], [1, 6, 7]]),
            SamplingConfig(max_new_tokens=6),
            seed=3,
            group=None,
        )
        for engine in (choose_engine(lm, "auto"), choose_engine(lm, "hf"))
    ]
    assert [choose_engine(lm, name).__name__ for name in ("paged", "hf")] == [
        "RolloutEngine",
        "PaddedEngine",
    ]
    assert rollouts[0].response_ids.equal(rollouts[1].response_ids)
    torch.testing.assert_close(rollouts[0].rollout_logprobs, rollouts[1].rollout_logprobs)


def test_a_model_without_paged_attention_falls_back_and_says_so(caplog):
    shape = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 1, "rotary_dim": 4}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **shape))
    assert choose_engine(lm, "auto") is PaddedEngine
    assert "generating with a padded batch" in caplog.text
    with pytest.raises(ValueError, match="rollout.engine=paged: .*; use rollout.engine: hf"):
        choose_engine(lm, "paged")


@pytest.mark.parametrize("kind", [RolloutEngine, PaddedEngine])
def test_a_prompt_may_have_its_own_longest_response(lm, kind):
    engine = kind(lm, RolloutConfig(), eos_token_ids=[2], pad_token_id=0)
    batch = prompts([[4, 5], [8], [9, 10], [6]])
    batch.columns["most"] = [1, 3, 50, 6]
    free = SamplingConfig(max_new_tokens=6, min_new_tokens=6)
    own = SamplingConfig(max_new_tokens=6, min_new_tokens=6, limit_key="most")
    whole, cut = (generate_responses(engine, batch, s, 0, None) for s in (free, own))
    assert whole.lengths.tolist() == [6] * 4 and cut.lengths.tolist() == [1, 3, 6, 6]
    assert not cut.finished.any()
    for i, length in enumerate([1, 3, 6, 6]):
        assert torch.equal(cut.response_ids[i, :length], whole.response_ids[i, :length])


@pytest.mark.parametrize("value", [0, 2.5, "0", "some", None, True])
def test_a_longest_response_that_is_no_number_is_told(lm, value):
    batch = prompts([[4, 5]])
    batch.columns["most"] = [value]
    engine = PaddedEngine(lm, RolloutConfig(), eos_token_ids=[2], pad_token_id=0)
    with pytest.raises(
        ValueError, match="sampling.limit_key=most: a prompt has .* no whole number"
    ):
        generate_responses(engine, batch, SamplingConfig(limit_key="most"), 0, None)


def test_a_longest_response_may_be_a_cell_of_a_csv():
    assert limit_in("3", "most") == limit_in(3, "most") == 3
