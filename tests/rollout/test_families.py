"""The rollout engine against each family's own forward, and against transformers' generate."""

import re

import pytest
import torch
import transformers

from gearshift.engine.attention import paged
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout import padded
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.padded import PaddedEngine
from gearshift.engine.rollout.responses import choose_engine
from gearshift.kernels import dispatch
from tests.tiny.rollout import FAMILIES, MOVING, SMALL, build, forced_logits, make_prompts

NEVER = [130_000]  # an end token outside the vocabulary
LENGTHS = [11, 1, 26, 5]


def engine_for(model, **options):
    config = RolloutConfig(block_size=4, cuda_graphs=False, **options)
    return RolloutEngine(model, config, eos_token_ids=NEVER, pad_token_id=0)


def padded_engine(model):
    config = RolloutConfig(max_sequences=3)
    return PaddedEngine(model, config, eos_token_ids=NEVER, pad_token_id=0)


def check_against_forward(model, prompts, completions, greedy: bool):
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = forced_logits(model, prompt, completion.token_ids)
        ids = torch.tensor(completion.token_ids)
        expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
        if greedy:
            assert ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [8192, 16], ids=["whole", "chunked"])
def test_greedy_tokens_and_logprobs_are_the_models_own(family, chunk):
    model, prompts = build(family), make_prompts(LENGTHS)
    sampling = SamplingConfig(max_new_tokens=14, temperature=0)
    engine = engine_for(model, max_batch_tokens=chunk)
    completions = engine.generate(prompts, sampling, [0] * 4)
    assert [len(c.token_ids) for c in completions] == [14] * 4
    check_against_forward(model, prompts, completions, greedy=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_the_models_own_and_the_fallback_agrees(family):
    model, prompts = build(family), make_prompts(LENGTHS)
    sampling, seeds = SamplingConfig(max_new_tokens=10), [3, 1, 4, 1]
    completions = engine_for(model).generate(prompts, sampling, seeds)
    check_against_forward(model, prompts, completions, greedy=False)
    fallback = padded_engine(model).generate(prompts, sampling, seeds)
    assert [c.token_ids for c in fallback] == [c.token_ids for c in completions]
    ours, theirs = (torch.tensor([c.logprobs for c in x]) for x in (completions, fallback))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


OWN_POSITIONS = {  # a state, columns, slopes, a state of another name
    "mamba": dict(state_size=8, num_hidden_layers=2),
    "bart": dict(decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32, d_model=16),
    "bloom": dict(n_layer=2, n_head=4, hidden_size=16),
    "rwkv": dict(num_hidden_layers=2, attention_hidden_size=16, intermediate_size=32),
}


@pytest.mark.parametrize("family", OWN_POSITIONS)
def test_models_that_number_tokens_by_themselves_are_not_padded(family):
    shape = dict(vocab_size=131, hidden_size=16, is_encoder_decoder=False) | OWN_POSITIONS[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 and parameter.std() < 0.1 else 1
    prompts, sampling = make_prompts([7, 1, 7, 12]), SamplingConfig(max_new_tokens=6)
    completions = padded_engine(model).generate(prompts, sampling, [0, 1, 2, 3])
    check_against_forward(model, prompts, completions, greedy=False)


def judged(model, caplog):
    """The manner that is chosen for a model, and what was warned of."""
    engine = padded_engine(model)
    prompts, sampling = make_prompts([7, 1, 7, 12]), SamplingConfig(max_new_tokens=6)
    completions = engine.generate(prompts, sampling, [0, 1, 2, 3])
    check_against_forward(model, prompts, completions, greedy=False)
    return engine.manner, [record.getMessage() for record in caplog.records]


def test_a_model_that_is_right_is_padded_and_keeps_a_cache(caplog):
    assert judged(build("Llama"), caplog) == (padded.Manner(True, "past_key_values"), [])


def test_a_model_that_padding_misleads_is_given_rows_of_one_length(caplog):
    """GIT takes a mask beside its cache for one that lacks an image."""
    shape = dict(vocab_size=131, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    sight = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    sight |= dict(intermediate_size=16, patch_size=14)
    config = transformers.GitConfig(vision_config=sight, intermediate_size=32, **shape)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim > 1 else 1
    found, (warning,) = judged(model, caplog)
    assert found == padded.Manner(False, "past_key_values")
    assert warning.startswith("GitForCausalLM reads rows begun with padding otherwise than alone")


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_a_cache_that_is_wrong_is_not_used(fault, caplog):
    model = build("Llama")

    def after(module, inputs, kwargs, output):
        if kwargs.get("past_key_values") is not None:
            assert fault != "fails"
            output.logits[..., 5] += 1.0

    def fail(module, inputs, kwargs):
        if fault == "fails" and kwargs.get("past_key_values") is not None:
            raise IndexError("list index out of range")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    found, warnings = judged(model, caplog)
    assert found == padded.Manner(False, "") and len(warnings) == 2
    said = "list index out of range" if fault == "fails" else "logits differ by 0."
    assert (
        f"LlamaForCausalLM reads rows through its cache otherwise than alone: {said}"
        in (warnings[1])
    )


def test_a_model_that_fails_once_it_is_cut_is_one_line(monkeypatch):
    model = build("Llama")
    model.register_forward_pre_hook(lambda *_: torch.ones(2) + torch.ones(3))
    monkeypatch.setattr(padded.dist, "get_world_size", lambda group: 2)
    line = r"rollout.tp=2: LlamaForCausalLM fails when it is cut: The size of .*; set 1"
    with pytest.raises(ConfigError, match=line):
        padded.choose_manner(model, 0, group=object())


def test_a_layer_that_attends_twice_is_generated_with_a_padded_batch(caplog):
    config = transformers.DiffLlamaConfig(**SMALL)
    model = transformers.DiffLlamaForCausalLM(config).eval()
    assert choose_engine(model, "auto") is padded.PaddedEngine
    assert "DiffLlamaAttention attends twice in a layer" in caplog.text
    with pytest.raises(ValueError, match="rollout.engine=paged: DiffLlamaAttention attends twice"):
        choose_engine(model, "paged")


def test_a_layer_that_attends_twice_is_refused():
    config = transformers.DiffLlamaConfig(**SMALL)
    model = transformers.DiffLlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="DiffLlamaAttention attends twice.*rollout.engine: hf"):
        engine_for(model).generate([[5, 6]], SamplingConfig(max_new_tokens=2), [0])


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen3Moe"])
def test_greedy_equals_transformers_generate(family):
    model, prompts = build(family), make_prompts(LENGTHS)
    completions = engine_for(model).generate(
        prompts, SamplingConfig(max_new_tokens=12, temperature=0), [0] * 4
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        assert theirs[0, len(prompt) :].tolist() == completion.token_ids


@pytest.mark.parametrize("kind", MOVING)
def test_frequencies_that_would_change_with_longer_rows(kind):
    """Up to the last token before they do; each row as `generate` makes it alone."""
    model, prompts = build(**MOVING[kind]), make_prompts([5, 40, 1, 52])
    sampling = SamplingConfig(max_new_tokens=12, temperature=0)
    completions = engine_for(model, max_batch_tokens=16).generate(prompts, sampling, [0] * 4)
    check_against_forward(model, prompts, completions, greedy=True)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert theirs[0, len(prompt) :].tolist() == completion.token_ids
    with pytest.raises(ValueError, match="64"):
        engine_for(model).generate(make_prompts([53]), sampling, [0])


def test_a_shorter_window_changes_the_output():
    prompts, sampling = make_prompts([40]), SamplingConfig(max_new_tokens=8, temperature=0)
    outputs = [
        engine_for(build("Mistral", sliding_window=window)).generate(prompts, sampling, [0])
        for window in (7, 20, None)
    ]
    assert len({tuple(o[0].logprobs) for o in outputs}) == 3


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_decoding_in_place_by_the_kernel(family, monkeypatch):
    model, prompts = build(family, num_hidden_layers=2), make_prompts([9, 4])
    monkeypatch.setenv("GEARSHIFT_KERNELS", "triton")
    completions = engine_for(model).generate(prompts, SamplingConfig(max_new_tokens=4), [1, 2])
    check_against_forward(model, prompts, completions, greedy=False)


def test_bfloat16_logprobs_stay_near_the_forward():
    model, prompts = build("Llama", initializer_range=0.1).bfloat16(), make_prompts(LENGTHS)
    sampling = SamplingConfig(max_new_tokens=10)
    for prompt, completion in zip(
        prompts, engine_for(model).generate(prompts, sampling, [0, 1, 2, 3]), strict=True
    ):
        logits = forced_logits(model, prompt, completion.token_ids)
        ids = torch.tensor(completion.token_ids)[:, None]
        expected = logits.log_softmax(-1).gather(1, ids)[:, 0]
        assert (torch.tensor(completion.logprobs) - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    "family, reason",
    [
        ("Qwen3Next", "linear_attention"),
        ("T5", "encoder-decoder|AttentionInterface"),
        ("Llama4Text", "chunked_attention"),
        ("Bloom", "AttentionInterface"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(family, reason):
    config = getattr(transformers, f"{family}Config")()
    name = {"T5": "T5ForConditionalGeneration", "Llama4Text": "Llama4ForCausalLM"}.get(
        family, f"{family}ForCausalLM"
    )
    kind = getattr(transformers, name)
    module = kind.__new__(kind)  # support is decided by class and config: no weights needed
    torch.nn.Module.__init__(module)
    module.config = config
    assert re.search(reason, paged.supports(module))
