"""Rows end to end against the same rows padded, by the models' own attention."""

import logging
import threading
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from gearshift.engine.attention import packed
from gearshift.engine.attention.sequences import Sequences
from gearshift.engine.models.heads import (
    Policy,
    ScoreModel,
    ValueModel,
    verify_head,
    verify_packing,
)
from gearshift.engine.models.reading import hidden_states, lay_out
from gearshift.engine.streaming.lockstep import Lockstep
from tests.tiny import rollout as tiny_rollout

LAYERS = 3
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.2,  # attention decides; with the usual 0.02 it hardly does
    pad_token_id=0,
)
WINDOW = 8
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(  # keys are wider than values
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    num_key_value_heads=4,
    head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": dict(sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=3.0),
    "gemma3_text": dict(sliding_window=WINDOW, query_pre_attn_scalar=16),
    "mistral": dict(sliding_window=WINDOW),
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "gpt_neox": {},
    "smollm3": {},
    "qwen3_moe": EXPERTS,
    "gpt_oss": dict(sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": LATENT,
}
LENGTHS = [5, 31, 12, 20]
U = 2.0**-24  # a float32 operation's relative error

# Both ways take the same sums in other orders: a sum of n terms is then off by about sqrt(n) U of
# its size. A layer is four products one after another of at most 96 terms, and its softmax makes of
# an error in the scores one that is larger by their size, a few units with these weights: 4 here. A
# backward takes twice as many products. Measured: a fifth of the bounds at most (granite, whose
# scores are not divided by the root of a head's size). A token of another row moves hidden states
# by more than half of their size.
HIDDEN = 4 * LAYERS * 96**0.5 * U * 4
GRADIENT = 2 * HIDDEN


def from_config(family: str, auto=AutoModelForCausalLM, **changes) -> nn.Module:
    config = AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | changes)
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def ragged_rows(vocabulary: int = 64):
    """Ids and mask [B, T]: some padding on the left of each shorter row, and some on the right."""
    torch.manual_seed(1)
    longest = max(LENGTHS)
    place, lengths = torch.arange(longest), torch.tensor(LENGTHS)[:, None]
    left = (longest - lengths) // 2
    mask = (place >= left) & (place < left + lengths)
    return torch.randint(1, vocabulary, mask.shape), mask


def live_states(model, ids, mask):
    """[live tokens, H] in the order of the rows, padded or packed as the model is."""
    reading, places = lay_out(ids, mask, packs=packed.packs(model))
    return hidden_states(model, reading, places[mask])


def backward(hidden) -> None:
    """Of a random projection; in a thread of its own, as GPUs have one."""
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    errors = []

    def run() -> None:
        try:
            (hidden * weights).sum().backward()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def measured(model, ids, mask):
    """Hidden states of live tokens, and the gradients of all parameters that have one."""
    model.zero_grad(set_to_none=True)
    hidden = live_states(model, ids, mask)
    backward(hidden)
    parameters = model.named_parameters()
    found = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    return hidden.detach(), found


def check_same(model, vocabulary: int, layers: int = LAYERS) -> None:
    """Packed as padded by eager attention; `model` is padded when it comes."""
    ids, mask = ragged_rows(vocabulary)
    hidden, gradients = measured(model, ids, mask)
    packed.adopt(model)
    found, others = measured(model, ids, mask)
    assert len(found) == sum(LENGTHS)
    most = HIDDEN * layers / LAYERS
    assert (found - hidden).abs().max() <= most * hidden.abs().max()
    assert gradients.keys() == others.keys() and len(gradients) > 15
    for name, gradient in gradients.items():
        assert gradient.any(), name
        error = float((others[name] - gradient).norm() / gradient.norm())
        assert error <= 2 * most, (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_read_as_padded_ones(family):
    model = from_config(family)
    assert packed.unpackable(model) is None
    check_same(model, 64)


@pytest.mark.parametrize("again", [False, True], ids=["", "computed again"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_computes_what_is_read(family, again):
    """A third of the tokens: states and gradients are those of all computed."""
    model = from_config(family)
    packed.adopt(model)
    if again:
        settings = {"use_reentrant": False, "context_fn": packed.recompute_contexts}
        model.gradient_checkpointing_enable(settings)
        model.train()
    ids, mask = ragged_rows()
    reading, places = lay_out(ids, mask, packs=True)
    every, some = places[mask], places[mask][::3]
    found, rows = [], []
    mlp = getattr(packed.trunk(model).layers[-1], "mlp", None)
    if mlp is not None and not hasattr(mlp, "experts"):
        linear = next(part for part in mlp.modules() if isinstance(part, nn.Linear))
        linear.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[1]))
    for wanted in (every, some):
        model.zero_grad(set_to_none=True)
        if wanted is every:
            with packed.reading(reading.sequences):
                whole = packed.trunk(model)(
                    input_ids=reading.input_ids, position_ids=reading.position_ids, use_cache=False
                )
            hidden = whole.last_hidden_state[0][some]
        else:
            hidden = hidden_states(model, reading, some)
        backward(hidden)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((hidden.detach(), grads))
    (hidden, expected), (same, gradients) = found
    assert (same - hidden).abs().max() <= HIDDEN * hidden.abs().max()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= GRADIENT * gradient.norm(), name
    assert rows in ([], [len(every)] * (1 + again) + [len(some)] * (1 + again))
    assert bool(rows) == (family not in ("qwen3_moe", "gpt_oss", "deepseek_v3"))


@pytest.mark.parametrize("family", tiny_rollout.FAMILIES)
def test_families_of_the_rollout_engine(family):
    model = tiny_rollout.build(family)
    model.set_attn_implementation("eager")
    assert packed.unpackable(model) is None
    check_same(model, 131, model.config.num_hidden_layers)


@pytest.mark.parametrize("kind", tiny_rollout.MOVING)
def test_frequencies_that_would_change_with_longer_rows(kind):
    check_same(tiny_rollout.build(**tiny_rollout.MOVING[kind], num_hidden_layers=LAYERS), 131)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_layers_are_computed_again_over_the_same_sequences(family):
    """Twice as many attentions as without; and each backward has the sequences of its forward."""
    model = from_config(family)
    settings = {"use_reentrant": False, "context_fn": packed.recompute_contexts}
    model.gradient_checkpointing_enable(settings)
    model.train()  # else nothing is recomputed
    ids, mask = ragged_rows()
    _, expected = measured(model.eval(), ids, mask)
    packed.adopt(model.train())
    rows = [live_states(model, ids[part], mask[part]) for part in (slice(2), slice(2, 4))]
    model.zero_grad(set_to_none=True)
    with counted(model) as calls:
        backward(torch.cat(rows))
    assert len(calls) == 2 * LAYERS
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error <= GRADIENT, name


@contextmanager
def counted(model):
    """The attention modules that are called."""
    calls = []
    parts = [part for part in model.modules() if hasattr(part, "o_proj")]
    hooks = [part.register_forward_pre_hook(lambda part, _: calls.append(part)) for part in parts]
    yield calls
    for hook in hooks:
        hook.remove()


def test_recomputing_without_the_sequences_fails():
    model = from_config("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packed.adopt(model)
    with pytest.raises(AssertionError, match="was given padded rows"):
        backward(live_states(model, *ragged_rows()))


def test_a_packed_model_refuses_padded_rows():
    model = from_config("llama")
    packed.adopt(model)
    ids, mask = ragged_rows()
    with pytest.raises(AssertionError, match="was given padded rows"):
        model(input_ids=ids, attention_mask=mask)
    with packed.padded(model):
        model(input_ids=ids, attention_mask=mask)
        assert not packed.packs(model) and model.config._attn_implementation == "sdpa"
    assert packed.packs(model)
    with pytest.raises(ZeroDivisionError), packed.padded(model):
        1 / 0  # noqa: B018
    assert packed.packs(model)
    packed.release(model, "it must")
    assert not packed.packs(model)
    model(input_ids=ids, attention_mask=mask)


def test_scores_with_a_cap_are_padded_eagerly():
    model = from_config("gemma2")
    packed.adopt(model)
    with packed.padded(model):
        assert model.config._attn_implementation == "eager"


def test_the_order_of_rows_does_not_matter():
    model = from_config("mistral")
    packed.adopt(model)
    ids, mask = ragged_rows()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        plain = live_states(model, ids, mask).split(LENGTHS)
        other = live_states(model, ids[order], mask[order]).split([LENGTHS[i] for i in order])
    for place, row in enumerate(order):
        assert (other[place] - plain[row]).abs().max() <= HIDDEN * plain[row].abs().max()


UNPACKABLE = {
    "encoder-decoder": ("t5", AutoModelForSeq2SeqLM, dict(d_model=16, d_kv=4, d_ff=16)),
    "a state": ("rwkv", AutoModelForCausalLM, {}),
    "linear_attention": ("mamba", AutoModelForCausalLM, dict(state_size=4)),
    "(conv)": ("lfm2", AutoModelForCausalLM, dict(full_attn_idxs=[1])),
    "both directions": (
        *("gemma3_text", AutoModelForCausalLM),
        dict(use_bidirectional_attention=True, query_pre_attn_scalar=16),
    ),
    "AttentionInterface": ("gptj", AutoModelForCausalLM, dict(rotary_dim=4, n_layer=1)),
}


@pytest.mark.parametrize("why", UNPACKABLE)
def test_what_must_be_padded_says_why(why):
    family, auto, changes = UNPACKABLE[why]
    with torch.device("meta"):
        model = from_config(family, auto, **changes)
    told = packed.unpackable(model)
    assert why in told and type(model).__name__ in told


def test_a_model_that_numbers_tokens_by_itself_is_padded(monkeypatch):
    model = from_config("llama")
    monkeypatch.setattr(type(model.model), "forward", lambda self, input_ids, **others: None)
    assert packed.unpackable(model) == "LlamaForCausalLM numbers the tokens of a row by itself"


def test_only_models_of_transformers_are_packed():
    assert packed.unpackable(nn.Linear(2, 2)) == "Linear is not a transformers model"


def engine_of(head: nn.Module):
    """What the checks read of an engine without ZeRO-3."""
    return SimpleNamespace(module=head, device=torch.device("cpu"))


CHECKS = {
    "policy": (verify_head, Policy, AutoModelForCausalLM),
    "critic": (verify_packing, ValueModel, AutoModelForTokenClassification),
    "reward": (verify_packing, ScoreModel, AutoModelForSequenceClassification),
}


@pytest.fixture(params=CHECKS)
def checked(request):
    """A check, and an engine of a role that packs."""
    check, wrap, auto = CHECKS[request.param]
    head = wrap(from_config("llama", auto, num_labels=1))
    packed.adopt(getattr(head, "lm", None) or head.model)
    assert head.packs
    return check, engine_of(head)


def test_the_checks_leave_alone_what_is_right(checked, caplog):
    check, engine = checked
    check(engine)
    assert engine.module.packs and not caplog.records


def test_a_model_that_reads_its_neighbours_is_padded_with_a_warning(checked, monkeypatch, caplog):
    check, engine = checked
    attend = packed.attend

    def leaks(query, key, value, sequences, rules):
        return attend(query, key, value, Sequences.of([len(query)], query.device), rules)

    monkeypatch.setattr(packed, "attend", leaks)
    check(engine)
    assert not engine.module.packs
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "its rows are padded" in record.message and "Llama" in record.message
    ids, mask = ragged_rows()
    model = getattr(engine.module, "lm", None) or engine.module.model
    padded = live_states(model, ids, mask)
    model.set_attn_implementation("eager")
    eager = live_states(model, ids, mask)
    assert (padded - eager).abs().max() <= HIDDEN * eager.abs().max()


@pytest.mark.parametrize("wrap", [ValueModel, ScoreModel])
def test_a_mask_that_a_model_makes_by_itself_is_not_lost(wrap, caplog):
    """Doge's, of its values."""
    model = from_config("doge", AutoModelForSequenceClassification, num_labels=1)
    for layer in model.model.layers:
        layer.self_attn.A.data.normal_(std=0.1)
    packed.adopt(model)
    verify_packing(engine_of(wrap(model)))
    assert not packed.packs(model) and "its rows are padded" in caplog.text


def test_an_encoder_that_attends_in_both_directions_is_found(caplog):
    model = from_config("bert", AutoModelForTokenClassification, num_labels=1)
    if packed.unpackable(model) is None:
        packed.adopt(model)
        verify_packing(engine_of(ValueModel(model)))
        assert "its rows are padded" in caplog.text
    assert not packed.packs(model)


def test_forwards_that_take_turns_keep_their_own_sequences():
    """As streamed ones do, layer by layer."""
    model = from_config("llama")
    packed.adopt(model)
    ids, mask = ragged_rows()
    parts = [slice(0, 2), slice(2, 4), slice(1, 3)]
    with torch.no_grad():
        alone = [live_states(model, ids[part], mask[part]) for part in parts]
    order = []

    def wait(index, *_):
        order.append((index, threading.get_ident()))
        together.wait_for(index)

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(partial(wait, index))
    calls = [partial(live_states, model, ids[part], mask[part]) for part in parts]
    together = Lockstep(calls, torch.no_grad)
    found = together.run(lambda index: None)
    assert [index for index, _ in order] == [index for index in range(LAYERS) for _ in parts]
    assert len({thread for _, thread in order}) == len(parts)
    for own, expected in zip(found, alone, strict=True):
        assert (own - expected).abs().max() <= HIDDEN * expected.abs().max()


def test_sequences_are_those_of_the_innermost_reading():
    model = from_config("llama")
    packed.adopt(model)
    ids, mask = ragged_rows()
    outer, _ = lay_out(ids, mask, packs=True)
    with torch.no_grad():
        expected = live_states(model, ids[:1], mask[:1])
        with packed.reading(outer.sequences):
            assert torch.equal(live_states(model, ids[:1], mask[:1]), expected)
