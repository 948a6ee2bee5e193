"""Log-probs and values against the model's own logits, for families whose heads differ."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from gearshift.engine.attention import packed
from gearshift.engine.batch import Rollout
from gearshift.engine.models.heads import HeadOptions, Policy, ValueModel, verify_head
from gearshift.engine.models.reading import lay_out, lay_out_rollout
from gearshift.kernels import ops
from tests.tiny import models as tiny

# Logits large enough for caps and scales to matter.
SHAPE = tiny.SHAPE | {"initializer_range": 0.5}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "phi": {"num_key_value_heads": 4},  # its head has a bias
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},  # absolute positions
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8},  # its trunk projects before the head
}


def build(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def ragged_rows():
    """Left-padded prompts and right-padded responses of 4: input_ids, attention_mask, mask."""
    torch.manual_seed(1)
    ids = torch.randint(3, 32, (3, 7))
    prompt = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]).bool()
    response = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    mask = torch.cat([prompt, response], 1)
    return torch.where(mask, ids, 0), mask, response


def engine_of(lm):
    """What verify_head reads of an engine without ZeRO-3."""
    return SimpleNamespace(module=Policy(lm), device=torch.device("cpu"))


def read(model, ids, mask, response):
    """A reading, and the places [N] before the live response tokens."""
    reading, places = lay_out(ids, mask, packs=packed.packs(model))
    return reading, places[:, -4:][response] - 1


WAYS = pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])


@WAYS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_model_itself(family, temperature, packs):
    """Each row alone, without padding, through the family's own forward."""
    lm = build(family)
    if packs and (why := packed.unpackable(lm)):
        pytest.skip(why)
    if packs:
        packed.adopt(lm)
    ids, mask, response = ragged_rows()
    policy = Policy(lm)
    options = vars(policy.options)
    targets = ids[:, -4:][response]

    def head(hidden, weight, bias):
        return ops.linear_logprob(
            hidden, weight, targets, temperature=temperature, bias=bias, **options
        )[0]

    with torch.no_grad():
        found = policy(*read(lm, ids, mask, response), head)
    with torch.no_grad(), packed.padded(lm):
        expected = []
        for row in range(3):
            live = ids[row][mask[row]][None]
            count = int(response[row].sum())
            table = (lm(input_ids=live).logits / temperature).log_softmax(-1)
            scored = table[:, :-1].gather(2, live[:, 1:, None])[0, -count:, 0]
            expected.append(scored)
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)


@WAYS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes_every_family_that_is_right(family, packs):
    lm = build(family)
    if packs and packed.unpackable(lm) is None:
        packed.adopt(lm)
    before = packed.packs(lm)
    verify_head(engine_of(lm))
    assert packed.packs(lm) is before


def test_the_check_passes_rounded_logits():
    verify_head(engine_of(build("gemma2").bfloat16()))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", HeadOptions()),
        ("cohere", HeadOptions()),
        ("granite", HeadOptions(logit_scale=8.0)),
        ("llama", HeadOptions(logit_softcap=2.0)),
    ],
)
def test_the_check_refuses_a_head_that_we_get_wrong(family, options):
    engine = engine_of(build(family))
    engine.module.options = options
    with pytest.raises(ValueError, match="ForCausalLM.*differ from ours by .* nats"):
        verify_head(engine)


def test_the_check_refuses_a_layer_between_trunk_and_head():
    """BERT transforms its hidden states once more before the output embedding."""
    torch.manual_seed(0)
    shape = SHAPE | {"is_decoder": True}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **shape)).eval()
    with pytest.raises(ValueError, match="BertLMHeadModel"):
        verify_head(engine_of(lm))


def test_the_check_refuses_what_depends_on_the_length_of_a_row():
    """As attention over compressed parts of a row may; rows of a few tokens do not tell."""
    lm = build("llama")

    def longer(trunk, inputs, output):
        output.last_hidden_state *= 1 + max(0, output.last_hidden_state.shape[1] - 8) / 100

    lm.model.register_forward_hook(longer)
    with pytest.raises(ValueError, match="LlamaForCausalLM reads tokens otherwise where"):
        verify_head(engine_of(lm))


def test_weights_that_are_no_numbers_are_told_as_such():
    lm = build("llama")
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="path=.*: its logits are NaN; compare its files"):
        verify_head(engine_of(lm))


def test_the_check_refuses_what_looks_ahead():
    lm = build("llama")
    lm.set_attn_implementation("eager")
    for layer in lm.model.layers:
        layer.register_forward_pre_hook(
            lambda _, inputs, kwargs: (inputs, kwargs | {"attention_mask": None}), with_kwargs=True
        )
    with pytest.raises(ValueError, match="or they depend on later tokens"):
        verify_head(engine_of(lm))


def test_a_model_whose_own_code_fails_is_named():
    lm = build("llama")
    lm.model.register_forward_pre_hook(lambda *_: {}["x"])
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM fails on a few tokens \(KeyError: 'x'\)"
    ):
        verify_head(engine_of(lm))


def test_a_padded_reading_has_its_padding_last():
    ids = torch.arange(15).view(3, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    reading, places = lay_out(ids, mask, packs=False)
    assert reading.input_ids[:, 0].tolist() == [2, 5, 13] and reading.sequences is None
    assert reading.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert reading.position_ids.tolist() == [[0, 1, 2]] * 3
    assert torch.equal(reading.input_ids.flatten()[places[mask]], ids[mask])


def test_a_packed_reading_is_the_live_tokens_end_to_end():
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    reading, places = lay_out(ids, mask, packs=True)
    assert reading.input_ids.tolist() == [[2, 3, 4, 5, 6, 7]] and reading.attention_mask is None
    assert reading.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert [(span.start, span.stop) for span in reading.sequences.spans] == [(0, 3), (3, 6)]
    assert torch.equal(reading.input_ids[0][places[mask]], ids[mask])


@pytest.mark.parametrize("packs", [False, True])
def test_places_of_a_rollout(packs):
    """Of the token before each response token, and of each row's last."""
    ids, mask, response = ragged_rows()
    rollout = Rollout(
        prompt_ids=ids[:, :3],
        prompt_mask=mask[:, :3],
        row_ids=torch.arange(3),
        columns={},
        response_ids=ids[:, 3:],
        response_mask=response,
        rollout_logprobs=torch.zeros(3, 4),
        finished=torch.ones(3, dtype=torch.bool),
    )
    reading, before, last = lay_out_rollout(rollout, packs=packs)
    read = reading.input_ids.flatten()
    assert torch.equal(read[before + 1], ids[:, 3:][response])
    earlier = torch.cat([ids[0, 2:6], ids[1, 2:3], ids[2, 2:4]])
    assert torch.equal(read[before], earlier)
    assert read[last].tolist() == [ids[0, 6], ids[1, 3], ids[2, 4]]


@WAYS
def test_values_are_read_before_the_token_they_judge(packs):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(tiny.llama_config(num_labels=1)).eval()
    ids, mask, response = ragged_rows()
    with torch.no_grad():
        own = [model(input_ids=ids[row][mask[row]][None]).logits[0, :, 0] for row in range(3)]
    counts = response.sum(1).tolist()
    expected = torch.cat([v[-n - 1 : -1] for v, n in zip(own, counts, strict=True)])
    if packs:
        packed.adopt(model)
    with torch.no_grad():
        values = ValueModel(model)(*read(model, ids, mask, response))
    assert values.shape == (7,) and values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
    # Changing token t changes no value up to and including that before t, nor another row's.
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 32
    with torch.no_grad():
        changed = ValueModel(model)(*read(model, other, mask, response)) != values
    assert changed.tolist() == [False, False, False, True, False, False, False]
