"""Specs against plain indexing; head cuts; plans of real model classes on meta."""

import pytest
import torch
import transformers
from torch import nn

from gearshift.engine.gearbox.module import LocalHeads, Rank, localize, meta_twin
from gearshift.engine.gearbox.slicing import cut_heads, plan_tensor_parallel
from gearshift.engine.gearbox.spec import Spec, balanced
from gearshift.engine.models.shapes import kv_shape

TINY = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)

SPECS = [
    Spec.whole((5, 4)),
    Spec.whole((7,)),
    Spec.whole(()),
    Spec.cut((11, 3), 0, [(2, 6)]),
    Spec.cut((4, 10), 1, [(3, 7)]),
    Spec.cut((4, 10), 1, [(0, 2), (5, 6), (8, 10)]),
    Spec.cut((3, 8, 5), 1, [(1, 3), (5, 7)]),
    Spec.cut((2, 3, 6), 2, [(4, 6)]),
    Spec.cut((6, 4), 0, [(0, 3), (3, 3), (3, 6)]),
]


def meta(kind: str, **changes):
    config = getattr(transformers, kind + "Config")(**{**TINY, **changes})
    with torch.device("meta"):
        return getattr(transformers, kind + "ForCausalLM")(config)


def indexed(spec: Spec, whole: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([torch.arange(start, stop) for start, stop in spec.intervals])
    return whole.index_select(spec.dim, rows) if spec.shape else whole


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_flat_range_lands_where_indexing_puts_it(spec):
    flat = torch.arange(spec.numel)
    expected = indexed(spec, flat.view(spec.shape)).reshape(-1)
    assert spec.local_shape == tuple(indexed(spec, flat.view(spec.shape)).shape)
    for start in range(spec.numel + 1):
        below = int((expected < start).sum())
        assert spec.count_below(start) == below
        for stop in range(start, spec.numel + 1):
            out = torch.full((spec.count(start, stop),), -1)
            spec.extract(flat[start:stop], start, out)
            assert torch.equal(out, expected[below : below + out.numel()])


def test_equal_shards_compare_equal():
    assert Spec.cut((6, 4), 0, [(0, 3), (3, 3), (3, 6)]) == Spec.whole((6, 4))


@pytest.mark.parametrize("count,parts,grain", [(10, 3, 1), (2, 4, 1), (64, 4, 8), (40, 3, 8)])
def test_balanced_parts_tile_the_whole(count, parts, grain):
    ranges = [balanced(count, parts, index, grain=grain) for index in range(parts)]
    assert [index for start, stop in ranges for index in range(start, stop)] == [*range(count)]
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= grain and all(size % grain == 0 for size in sizes)


HEADS = [(4, 2, 2), (9, 3, 2), (8, 1, 4), (12, 3, 4), (8, 8, 3), (6, 2, 6), (14, 2, 4), (15, 5, 4)]


@pytest.mark.parametrize("heads,kv_heads,size", HEADS)
def test_each_query_head_meets_its_own_key_value_head(heads, kv_heads, size):
    group, seen = heads // kv_heads, []
    for rank in range(size):
        cut = cut_heads(heads, kv_heads, size, rank)
        queries, kvs = range(*cut.query), range(*cut.kv)
        assert len(queries) % len(kvs) == 0
        local_group = len(queries) // len(kvs)
        for position, query in enumerate(queries):
            assert kvs[position // local_group] == query // group
        seen += queries
    assert seen == [*range(heads)]


def test_uneven_heads_are_cut_by_groups():
    cuts = [cut_heads(9, 3, 2, rank) for rank in range(2)]
    assert [(cut.query, cut.kv) for cut in cuts] == [((0, 6), (0, 2)), ((6, 9), (2, 3))]


FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "Mixtral", "Glm4", "Olmo2"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_shards_hold_every_element_and_split_the_big_ones(kind):
    model = meta(kind)
    plan = plan_tensor_parallel(model, 2)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders = torch.zeros(parameter.shape, dtype=torch.int)
        for spec in plan.specs[name]:
            for start, stop in spec.intervals:
                holders.narrow(spec.dim, start, stop - start).add_(1)
        split = parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")  # a router stays
        counts = set(holders.flatten().tolist())
        assert counts in ([{1}] if split else [{1}, {2}]), name


def test_packed_attention_is_cut_by_heads():
    plan = plan_tensor_parallel(meta("Phi3", num_key_value_heads=1), 2)
    name = "model.layers.0.self_attn"
    # 4 query heads, 1 key and 1 value head of 8 rows: each rank has two queries and the keys.
    weights = [spec.intervals for spec in plan.specs[f"{name}.qkv_proj.weight"]]
    assert weights == [((0, 16), (32, 48)), ((16, 48),)]
    assert plan.wraps[f"{name}.o_proj"] == "rowwise" and f"{name}.qkv_proj" not in plan.wraps
    mlp = "model.layers.0.mlp"
    halves = [spec.intervals for spec in plan.specs[f"{mlp}.gate_up_proj.weight"]]
    assert halves == [((0, 24), (40, 64)), ((24, 40), (64, 80))]


def test_attention_without_whole_heads_stays_whole():
    model = meta("Llama")
    model.model.layers[0].self_attn.head_dim = 5  # no longer what the projections are made of
    plan = plan_tensor_parallel(model, 2)
    assert "model.layers.0.self_attn.o_proj" not in plan.wraps
    assert plan.specs["model.layers.0.self_attn.q_proj.weight"][0] == Spec.whole((32, 32))
    assert plan.specs["model.layers.1.self_attn.q_proj.weight"][0] != Spec.whole((32, 32))


def test_tied_weights_share_one_shard():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, tie_word_embeddings=True)
    )
    state = torch.get_rng_state()
    twin = meta_twin(model)
    assert torch.equal(state, torch.get_rng_state())
    plan = plan_tensor_parallel(twin, 2)
    shards = localize(twin, model, plan, Rank(1, 2, None), torch.device("cpu"))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert len(shards) == len(list(model.parameters()))
    assert not any(buffer.is_meta for buffer in twin.buffers())
    attention = twin.model.layers[0].self_attn
    assert isinstance(attention.config, LocalHeads)
    assert (attention.config.num_attention_heads, attention.config.num_key_value_heads) == (2, 1)
    twin.config._attn_implementation = "eager"
    assert attention.config._attn_implementation == "eager"
    assert model.config._attn_implementation != "eager"


@pytest.mark.parametrize(
    "model,size,message",
    [
        (lambda: meta("Llama"), 5, "rollout.tp=5: must not exceed llama's 4 attention heads"),
        (
            lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1)),
            2,
            "gpt2 has no tensor-parallel plan",
        ),
    ],
)
def test_refusals_name_the_reason(model, size, message):
    with pytest.raises(ValueError, match=message) as error:
        plan_tensor_parallel(model(), size)
    assert "\n" not in str(error.value)


def test_unknown_style_is_refused_by_name():
    model = meta("Llama")
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.up_proj": "diagonal"}
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj by 'diagonal'"):
        plan_tensor_parallel(model, 2)


def test_resized_model_with_a_stale_config_is_refused():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    model.lm_head.weight = nn.Parameter(torch.zeros(103, 32))
    twin = meta_twin(model)
    plan = plan_tensor_parallel(twin, 1)
    with pytest.raises(ValueError, match=r"lm_head.weight: the model has shape \(103, 32\)"):
        localize(twin, model, plan, Rank(0, 1, None), torch.device("cpu"))


def test_experts_are_cut_by_how_they_are_stored():
    model = meta("Mixtral")
    name = "model.layers.0.mlp.experts"
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.experts.gate_up_proj": "colwise"}
    specs = plan_tensor_parallel(model, 2).specs[f"{name}.gate_up_proj"]
    assert [spec.intervals for spec in specs] == [((0, 24), (40, 64)), ((24, 40), (64, 80))]


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda experts: setattr(experts, "has_post_expert_norm", True), "a norm after each"),
        (lambda experts: setattr(experts, "is_concatenated", False), "interleaved gates"),
        (lambda experts: experts.register_parameter("bias", nn.Parameter(torch.zeros(3))), "bias"),
    ],
)
def test_experts_that_cannot_be_summed_are_refused(change, reason):
    model = meta("Mixtral")
    change(model.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.experts have.*{reason}"):
        plan_tensor_parallel(model, 2)


def test_norms_of_heads_are_cut_with_them():
    plan = plan_tensor_parallel(meta("Cohere", use_qk_norm=True), 2)
    for name, shape in (("q_norm", (2, 8)), ("k_norm", (1, 8))):
        specs = plan.specs[f"model.layers.1.self_attn.{name}.weight"]
        assert [spec.local_shape for spec in specs] == [shape] * 2
        assert specs[0].intervals != specs[1].intervals


def test_a_norm_over_all_heads_stays_whole():
    """Olmo 2 norms queries before they are split into heads; its plan gathers them."""
    plan = plan_tensor_parallel(meta("Olmo2"), 2)
    assert plan.specs["model.layers.0.self_attn.q_norm.weight"][0].local_shape == (32,)


def test_attention_with_a_number_for_each_head_stays_whole():
    """Doge makes its mask of them, for all heads; its plan cuts the heads alone."""
    plan = plan_tensor_parallel(meta("Doge"), 2)
    assert not plan.heads
    for name in ("q_proj", "dt_proj", "o_proj"):
        specs = plan.specs[f"model.layers.0.self_attn.{name}.weight"]
        assert specs[0].local_shape == specs[0].shape
    assert plan.specs["model.layers.0.mlp.up_proj.weight"][0].local_shape[0] == 24


def test_heads_are_counted_by_layer():
    """Gemma 4's layers of full attention have wider and fewer heads of keys."""
    changes = dict(
        layer_types=["sliding_attention", "full_attention"], head_dim=8, global_head_dim=16,
        num_global_key_value_heads=1, num_kv_shared_layers=0, attention_k_eq_v=True,
        vocab_size_per_layer_input=101, hidden_size_per_layer_input=8,
    )  # fmt: skip
    config = transformers.Gemma4TextConfig(**TINY | changes)
    with torch.device("meta"):
        model = transformers.Gemma4ForCausalLM(config)
    heads = plan_tensor_parallel(model, 2).heads
    kv = [heads[f"model.layers.{i}.self_attn"][1].kv for i in (0, 1)]
    assert kv == [(1, 2), (0, 1)]
    assert kv_shape(config) == (2, 8)


def test_gates_that_are_judged_by_their_mean_stay_whole():
    changes = dict(
        num_kv_shared_layers=0, head_dim=8, activation_sparsity_pattern=[0.95, 0.0],
        vocab_size_per_layer_input=101, hidden_size_per_layer_input=8, intermediate_size=[40, 40],
        layer_types=["full_attention"] * 2, laurel_rank=4,
    )  # fmt: skip
    config = transformers.Gemma3nTextConfig(**TINY | changes)
    with torch.device("meta"):
        model = transformers.Gemma3nForCausalLM(config)
    specs = plan_tensor_parallel(model, 2).specs
    rows = [specs[f"model.layers.{i}.mlp.up_proj.weight"][0].local_shape[0] for i in (0, 1)]
    assert rows == [40, 24]  # in multiples of 8
