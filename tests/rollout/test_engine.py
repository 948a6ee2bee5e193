"""The rollout engine: invariances, endings, limits, and what it must leave alone."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.padded import PaddedEngine
from gearshift.engine.rollout.sampling import Ending
from gearshift.kernels import ops
from tests.tiny.on_ranks import free_port
from tests.tiny.rollout import build, forced_logits, make_prompts

LENGTHS = [9, 21, 4, 1, 30, 13, 16, 17, 2, 8, 25, 12]
PROMPTS = make_prompts(LENGTHS)
SEEDS = [7 * i for i in range(len(PROMPTS))]
SAMPLING = SamplingConfig(max_new_tokens=24)
EOS = [2, 11, 12, 13, 14]  # several, so that random responses end at ragged lengths


@pytest.fixture(scope="module")
def model():
    return build("Llama", num_hidden_layers=2)


def make_engine(model, eos=EOS, tokenizer=None, **options):
    config = RolloutConfig(**{"block_size": 16, "max_sequences": 12} | options)
    return RolloutEngine(model, config, eos_token_ids=eos, pad_token_id=0, tokenizer=tokenizer)


def padded_engine(model, **options):
    return PaddedEngine(model, RolloutConfig(**options), eos_token_ids=EOS, pad_token_id=0)


@pytest.fixture(scope="module")
def expected(model):
    completions = make_engine(model).generate(PROMPTS, SAMPLING, SEEDS)
    lengths = {len(c.token_ids) for c in completions}
    assert len(lengths) > 4 and {c.finished for c in completions} == {True, False}
    return completions


def assert_same(completions, expected):
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert [c.finished for c in completions] == [c.finished for c in expected]
    for ours, theirs in zip(completions, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("max_sequences", [12, 5, 3, 1])
@pytest.mark.parametrize("block_size", [4, 16])
def test_tokens_do_not_depend_on_slots_or_block_size(model, expected, max_sequences, block_size):
    engine = make_engine(model, max_sequences=max_sequences, block_size=block_size)
    assert_same(engine.generate(PROMPTS, SAMPLING, SEEDS), expected)


def test_tokens_do_not_depend_on_chunked_prefill(model, expected):
    engine = make_engine(model, max_batch_tokens=16)
    assert_same(engine.generate(PROMPTS, SAMPLING, SEEDS), expected)


def test_tokens_do_not_depend_on_preemption(model, expected):
    engine = make_engine(model, block_size=4, kv_cache_gb=bytes_of(model, 16 * 4) / 1e9)
    assert_same(engine.generate(PROMPTS, SAMPLING, SEEDS), expected)
    assert engine.preemptions > 3


def test_tokens_do_not_depend_on_the_order_or_company_of_prompts(model, expected):
    engine = make_engine(model)
    turned = engine.generate(PROMPTS[::-1], SAMPLING, SEEDS[::-1])
    assert_same(turned[::-1], expected)
    assert_same(engine.generate(PROMPTS[4:6], SAMPLING, SEEDS[4:6]), expected[4:6])


def bytes_of(model, tokens):
    config = model.config
    size = 2 * config.num_hidden_layers * config.num_key_value_heads
    return tokens * size * (config.hidden_size // config.num_attention_heads) * 4


@pytest.mark.parametrize("options", [{}, dict(max_sequences=3), dict(block_size=4, pool=24)])
def test_samples_that_share_a_prompt_equal_lone_ones(model, options):
    options = dict(options)
    if "pool" in options:
        options["kv_cache_gb"] = bytes_of(model, options.pop("pool") * 4) / 1e9
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[6]] * 3 + [PROMPTS[3]] * 2  # 9 (partial), 16 (full), 1
    seeds = list(range(9))
    together = make_engine(model, **options).generate(prompts, SAMPLING, seeds)
    alone = [
        make_engine(model).generate([prompt], SAMPLING, [seed])[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert_same(together, alone)
    assert len({tuple(c.token_ids) for c in together[:4]}) == 4


def test_the_fallback_gives_the_same_responses(model, expected):
    for max_sequences in (12, 5):
        engine = padded_engine(model, max_sequences=max_sequences)
        fallback = engine.generate(PROMPTS, SAMPLING, SEEDS)
        assert_same(fallback, expected)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logprobs_are_of_the_tempered_untruncated_distribution(model, temperature):
    sampling = SamplingConfig(max_new_tokens=6, temperature=temperature, top_k=5, top_p=0.9)
    completions = make_engine(model).generate(PROMPTS[:4], sampling, SEEDS[:4])
    for prompt, completion in zip(PROMPTS, completions, strict=False):
        logits = forced_logits(model, prompt, completion.token_ids)
        ids = torch.tensor(completion.token_ids)[:, None]
        logprobs = (logits / temperature).log_softmax(-1).gather(1, ids)[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, atol=1e-5, rtol=0)
        assert (logits >= logits.gather(1, ids)).sum(1).max() <= 5


def test_draws_are_the_samplers_own_at_index_t_of_the_response(model, expected):
    for prompt, seed, completion in zip(PROMPTS, SEEDS, expected, strict=True):
        count = len(completion.token_ids)
        token_ids, _ = ops.sample_tokens(
            forced_logits(model, prompt, completion.token_ids),
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            seeds=torch.full((count,), seed),
            positions=torch.arange(count),
        )
        assert token_ids.tolist() == completion.token_ids


def test_everything_may_end_at_once_or_after_one_token(model):
    every_token = list(range(131))
    for completion in make_engine(model, eos=every_token).generate(PROMPTS, SAMPLING, SEEDS):
        assert len(completion.token_ids) == len(completion.logprobs) == 1 and completion.finished
    single = SamplingConfig(max_new_tokens=1)
    for completion in make_engine(model, eos=[999]).generate(PROMPTS, single, SEEDS):
        assert len(completion.token_ids) == 1 and not completion.finished


def test_the_end_token_is_kept_and_nothing_follows_it(expected):
    for completion in expected:
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.finished == (completion.token_ids[-1] in EOS)
        assert not set(EOS) & set(completion.token_ids[:-1])
        assert completion.finished or len(completion.token_ids) == 24


def test_limits_of_single_responses(model):
    limits = list(range(1, 13))
    completions = make_engine(model, eos=[999]).generate(PROMPTS, SAMPLING, SEEDS, limits=limits)
    assert [len(c.token_ids) for c in completions] == limits


class Spelling:
    """A tokenizer of one letter per token, in which stop strings span tokens."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("a") + i % 26) for i in ids)


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(model):
    plain = make_engine(model, eos=[999]).generate(PROMPTS, SAMPLING, SEEDS)
    spell = lambda ids: Spelling().decode(ids, False)
    stop = spell(plain[0].token_ids)[5:8]
    sampling = SamplingConfig(max_new_tokens=24, stop=["never?", stop])
    stopped = make_engine(model, eos=[999], tokenizer=Spelling()).generate(PROMPTS, sampling, SEEDS)
    for before, after in zip(plain, stopped, strict=True):
        found = spell(before.token_ids).find(stop)
        assert after.finished == (found >= 0)
        end = found + len(stop) if found >= 0 else 24
        assert after.token_ids == before.token_ids[:end]
    assert stopped[0].finished
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        make_engine(model).generate(PROMPTS, sampling, SEEDS)


def test_progress_counts_finished_responses(model):
    seen = []
    make_engine(model).generate(PROMPTS, SAMPLING, SEEDS, progress=lambda *p: seen.append(p))
    assert seen == [(n, 12) for n in range(1, 13)]


def test_no_prompts_no_work(model):
    assert make_engine(model).generate([], SAMPLING, []) == []
    assert padded_engine(model).generate([], SAMPLING, []) == []


def test_memory_is_given_back_and_taken_again(model, expected):
    engine = make_engine(model)
    assert engine.kv_bytes == 0
    assert_same(engine.generate(PROMPTS, SAMPLING, SEEDS), expected)
    assert engine.kv_bytes > 0
    engine.release()
    assert engine.kv_bytes == 0
    assert_same(engine.generate(PROMPTS, SAMPLING, SEEDS), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seeds=[1]), "seeds has 1 entries for 12 prompts"),
        (dict(limits=[1, 2]), "limits has 2 entries"),
        (dict(prompts=[[]] * 12), r"prompts\[0\] is empty"),
        (dict(sampling=SamplingConfig(max_new_tokens=140)), "sampling.max_new_tokens=140.*lower"),
    ],
)
def test_impossible_requests_are_refused(model, change, message):
    request = dict(prompts=PROMPTS, sampling=SAMPLING, seeds=SEEDS) | change
    with pytest.raises(ValueError, match=message):
        make_engine(model).generate(**request)


def test_a_pool_below_one_sequence_is_refused_and_the_named_size_suffices(model, expected):
    engine = make_engine(model, kv_cache_gb=bytes_of(model, 16) / 1e9)
    with pytest.raises(ValueError, match="rollout.kv_cache_gb=.*one sequence of 64 tokens") as e:
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert model.config._attn_implementation == "sdpa"
    need = float(str(e.value).split("needs ")[1].split(";")[0])
    engine = make_engine(model, kv_cache_gb=need * 1.01)
    assert_same(engine.generate(PROMPTS, SAMPLING, SEEDS), expected)


def test_a_module_it_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="rollout.engine=paged: Linear.*engine: hf"):
        make_engine(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("failing", [False, True])
def test_the_module_and_the_global_generator_are_left_as_found(failing):
    model = build("Gemma2").train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    attention = model.config._attn_implementation
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    config, attributes = copy.deepcopy(model.config), [dict(vars(p)) for p in model.modules()]
    engine = make_engine(model)
    if failing:
        hook = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(PROMPTS, SAMPLING, SEEDS)
        hook.remove()
    else:
        engine.generate(PROMPTS, SAMPLING, SEEDS)
        padded_engine(model).generate(PROMPTS[:2], SAMPLING, SEEDS[:2])
    assert [part.training for part in model.modules()] == modes
    assert [set(vars(p)) for p in model.modules()] == [set(a) for a in attributes]
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == attention
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    loss = model(input_ids=torch.tensor([PROMPTS[0]])).logits.sum()
    loss.backward()  # trains on: no inference tensors were left behind
    assert all(p.grad is not None for p in model.parameters())


def _rank(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    # Rank 1's weights differ: only the broadcast of rank 0's draws can keep the two together.
    model = build("Llama", seed=rank, num_hidden_layers=2)
    # Its cache would hold fewer blocks, too: both must agree on the smaller number.
    room = bytes_of(model, (24 - 3 * rank) * 4) / 1e9
    config = RolloutConfig(block_size=4, max_sequences=5, kv_cache_gb=room)
    engine = RolloutEngine(model, config, eos_token_ids=EOS, pad_token_id=0, group=dist.group.WORLD)
    paged = engine.generate(PROMPTS, SAMPLING, SEEDS)
    fallback = PaddedEngine(
        model, RolloutConfig(), eos_token_ids=EOS, pad_token_id=0, group=dist.group.WORLD
    )
    plain = fallback.generate(PROMPTS, SAMPLING, SEEDS)
    torch.save([[(c.token_ids, c.logprobs) for c in x] for x in (paged, plain)], folder / f"{rank}")
    dist.destroy_process_group()


def test_ranks_of_a_group_keep_to_rank_0s_draws(tmp_path, expected):
    mp.spawn(_rank, (free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert first == second
    for completions in first:
        assert [ids for ids, _ in completions] == [c.token_ids for c in expected]


@pytest.mark.slow
def test_a_real_model_speaks_as_its_own_forward_does():
    import transformers

    from gearshift.engine.config import assets

    try:
        path = assets.asset_path("smollm2")
    except ValueError as absent:
        pytest.skip(str(absent))
    options = dict(gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    questions = ["What is the capital of France?", "Name three colours.", "Say hello."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in questions
    ]
    engine = make_engine(model.eval(), eos=[tokenizer.eos_token_id], tokenizer=tokenizer)
    greedy = SamplingConfig(max_new_tokens=16, temperature=0, stop=["Paris"])
    completions = engine.generate(prompts, greedy, [0] * 3)
    assert tokenizer.decode(completions[0].token_ids).endswith("Paris")
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = forced_logits(model, prompt, completion.token_ids)
        ids = torch.tensor(completion.token_ids)
        assert logits.argmax(-1).tolist() == completion.token_ids
        logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, atol=1e-4, rtol=0)


# What may not be drawn


@pytest.mark.parametrize("engine_of", [make_engine, padded_engine])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_suppressed_tokens_are_never_drawn(model, engine_of, temperature):
    """Log-probs stay those of all tokens, which the training path computes."""
    sampling = SamplingConfig(max_new_tokens=16, temperature=temperature)
    free = engine_of(model).generate(PROMPTS, sampling, SEEDS)
    drawn = sorted({token for c in free for token in c.token_ids} - set(EOS))[::2]
    assert len(drawn) > 3
    settings = {**vars(sampling), "suppress_tokens": drawn}
    completions = engine_of(model).generate(PROMPTS, SamplingConfig(**settings), SEEDS)
    assert not {token for c in completions for token in c.token_ids} & set(drawn)
    for prompt, made in zip(PROMPTS[:4], completions, strict=False):
        logits = forced_logits(model, prompt, made.token_ids) / (temperature or 1.0)
        truth = logits.log_softmax(-1).gather(1, torch.tensor(made.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(made.logprobs), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine_of", [make_engine, padded_engine])
def test_nothing_ends_before_its_least_length(model, engine_of):
    free = engine_of(model).generate(PROMPTS, SAMPLING, SEEDS)
    assert min(len(c.token_ids) for c in free) < 9
    least = SamplingConfig(max_new_tokens=24, min_new_tokens=9)
    completions = engine_of(model).generate(PROMPTS, least, SEEDS)
    assert all(len(c.token_ids) >= 10 for c in completions)
    assert any(c.finished for c in completions), "later, it may"


def test_graphs_hold_bans(model):
    """The steps of captured graphs, run eagerly: the same tokens."""
    sampling = SamplingConfig(max_new_tokens=20, min_new_tokens=6, suppress_tokens=[3, 50, 77])
    expected = make_engine(model).generate(PROMPTS, sampling, SEEDS)
    engine = make_engine(model)
    engine._use_graphs = True
    assert_same(engine.generate(PROMPTS, sampling, SEEDS), expected)


def test_a_stop_string_counts_only_after_the_least_length():
    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(97 + i) for i in ids)

    ending = Ending(SamplingConfig(stop=["ab"], min_new_tokens=3), [25], Letters())
    row = [0, 1, 5, 5, 0, 1]  # "abffab"
    assert [ending.reached(row[:n], n) for n in range(1, 7)] == [False] * 5 + [True]
    assert ending.reached([4, 25], 2), "an end token that was drawn ends it"
