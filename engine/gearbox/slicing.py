"""Reads a model's own tensor-parallel plan and turns it into one Spec per parameter and TP rank.

The plan is transformers' `model.tp_plan`, {"model.layers.*.mlp.up_proj": "colwise", ...}: the
column and row parallelism of Megatron (Shoeybi et al. 2019). Attention is cut by whole heads; a
key-value head that must serve several ranks is kept by each. What no entry names stays whole.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from gearshift.engine.attention.packed import by_layer
from gearshift.engine.gearbox.spec import Interval, Spec, balanced

# Style in the plan -> how its weight is cut: "column" is the output side, "row" the input side.
_CUT = {
    "colwise": "column",
    "colwise_gather_output": "column",
    "embedding_rowwise": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "rowwise_split_input": "row",
    "packed_rowwise": "row",
}
_PACKED = ("packed_colwise", "packed_rowwise")  # gate and up in one weight: each half is cut
_REDUCED = ("moe_tp_experts", "all_reduce")  # the module's output is a partial sum
_WHOLE = ("replicate", "replicated_with_grad_allreduce", "local_params", "mla_kv_a_proj")
_OLD_NAMES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "q_b_proj",
    "kv_b_proj",
)


@dataclass(frozen=True)
class HeadCut:
    """The query and key-value heads [start, stop) of one TP rank, out of `heads` and `kv_heads`."""

    heads: int
    kv_heads: int
    query: Interval
    kv: Interval

    def intervals(self, projection: str, rows: int) -> list[Interval]:
        """Rows of an attention projection that belong to this rank's heads."""
        if projection == "qkv_proj":  # rows of all query heads, then keys, then values
            unit = rows // (self.heads + 2 * self.kv_heads)
            bases = (0, self.heads, self.heads + self.kv_heads)
            ranges = zip(bases, (self.query, self.kv, self.kv), strict=True)
            return [((base + a) * unit, (base + b) * unit) for base, (a, b) in ranges]
        is_kv = projection in ("k_proj", "v_proj", "k_norm")
        unit = rows // (self.kv_heads if is_kv else self.heads)
        start, stop = self.kv if is_kv else self.query
        return [(start * unit, stop * unit)]


@dataclass(frozen=True)
class TPPlan:
    """How a model is cut: `specs` per parameter name and TP rank, `wraps` per module name.

    A wrap is one of "rowwise", "rowwise_split_input", "colwise_gather_output",
    "embedding_rowwise", "all_reduce"; `heads` holds the head counts of cut attention modules.
    """

    size: int
    specs: Mapping[str, tuple[Spec, ...]]
    wraps: Mapping[str, str]
    heads: Mapping[str, tuple[HeadCut, ...]]


def cut_heads(heads: int, kv_heads: int, size: int, rank: int) -> HeadCut:
    """Whole heads, key-value groups kept together; with fewer key-value heads than ranks, each is
    kept by several ranks that share out its queries."""
    group = heads // kv_heads
    if kv_heads >= size:
        start, stop = balanced(kv_heads, size, rank)
        return HeadCut(heads, kv_heads, (start * group, stop * group), (start, stop))
    owners = [balanced(size, kv_heads, kv) for kv in range(kv_heads)]
    kv = next(index for index, (first, last) in enumerate(owners) if first <= rank < last)
    first, last = owners[kv]
    start, stop = balanced(group, last - first, rank - first)
    return HeadCut(heads, kv_heads, (kv * group + start, kv * group + stop), (kv, kv + 1))


def plan_tensor_parallel(model: nn.Module, size: int) -> TPPlan:
    """Cuts `model`, a transformers causal LM with whole shapes (meta is enough), for `size` ranks.

    Raises ValueError if the model has no plan, fewer heads than ranks, or a style unknown here.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    if size == 1:
        return TPPlan(1, {name: (Spec.whole(p.shape),) for name, p in named}, {}, {})
    _check_heads(model, size)
    styles = _styles(model, size)
    heads = {}
    for name, module in model.named_modules():
        cuts = _attention(name, module, styles, size)
        if cuts:
            heads[name] = cuts
    _upgrade_packed_mlp(model, styles)
    specs = {
        name: tuple(_spec(name, parameter, styles, heads, size, rank) for rank in range(size))
        for name, parameter in named
    }
    wraps = {}
    for name, _ in model.named_modules():
        style = styles.get(name)
        if style in _REDUCED:
            wraps[name] = "all_reduce"
        elif style in _CUT and style != "colwise" and style not in _PACKED:
            wraps[name] = style
    return TPPlan(size, specs, wraps, heads)


def _check_heads(model: nn.Module, size: int) -> None:
    family, layers = model.config.model_type, by_layer(model.config.get_text_config())
    heads = min(getattr(layer, "num_attention_heads", None) or size for layer in layers)
    if size > heads:
        raise ValueError(f"rollout.tp={size}: must not exceed {family}'s {heads} attention heads")


def _styles(model: nn.Module, size: int) -> dict[str, str]:
    """Module or parameter name -> style, layer wildcards resolved; embedding and head included."""
    plan = dict(getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {})
    vocabulary = {"embed_tokens", "embed_in", "lm_head", "embed_out", "wte"}
    if all(key.rpartition(".")[2] in vocabulary for key in plan):
        raise ValueError(
            f"rollout.tp={size}: {model.config.model_type} has no tensor-parallel plan for its "
            "layers in this version of transformers; set rollout.tp=1"
        )
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    styles: dict[str, str] = {}
    for name in names:
        style = plan.get(name, plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)))
        if style is not None:
            styles[name] = _OLD_NAMES.get(style) or style
    _cut_vocabulary(model, styles)
    for name, module in model.named_modules():
        if getattr(module, "activation_sparsity", 0):  # by the mean of all its gates (Gemma 3n)
            styles = {key: s for key, s in styles.items() if not key.startswith(f"{name}.")}
    for name, style in styles.items():
        if style not in _CUT and style not in _REDUCED and style not in _WHOLE:
            raise ValueError(
                f"rollout.tp={size}: {model.config.model_type} cuts {name} by {style!r}, which "
                "is not supported; set rollout.tp=1"
            )
    _settle_experts(model, styles, size)
    return styles


def _settle_experts(model: nn.Module, styles: dict[str, str], size: int) -> None:
    """Cuts gate and up alike where they are stored one after the other, whatever the plan says.

    Refuses what a sum over ranks would get wrong: interleaved gates, norms of partial sums, and
    whole parameters such as biases, which would count once per rank.
    """
    for name in [name for name, style in styles.items() if style == "moe_tp_experts"]:
        experts, packed = model.get_submodule(name), f"{name}.gate_up_proj"
        concatenated = getattr(experts, "is_concatenated", True)
        if concatenated and styles.get(packed) == "colwise":
            styles[packed] = "packed_colwise"
        parameters = [leaf for leaf, _ in experts.named_parameters(recurse=False)]
        whole = [leaf for leaf in parameters if styles.get(f"{name}.{leaf}") not in _CUT]
        reason = "whole " + ", ".join(whole) if whole else ""
        reason = reason or ("" if concatenated else "interleaved gates")
        if getattr(experts, "has_post_expert_norm", False):
            reason = "a norm after each expert"
        if reason:
            raise ValueError(
                f"rollout.tp={size}: {model.config.model_type}'s experts {name} have {reason}, "
                "which is not supported; set rollout.tp=1"
            )


def _cut_vocabulary(model: nn.Module, styles: dict[str, str]) -> None:
    """Older plans leave the embedding out; cut like the head, tied weights share one shard."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding):
        styles.setdefault(names[id(embedding)], "embedding_rowwise")
    if isinstance(head, nn.Linear):
        styles.setdefault(names[id(head)], "colwise_gather_output")


def _attention(
    name: str, module: nn.Module, styles: dict[str, str], size: int
) -> tuple[HeadCut, ...] | None:
    """Head cuts of an attention module; None for other modules and those that stay whole.

    Where heads cannot be told apart, its styles are dropped: it then stays whole on every rank.
    """
    children = {
        child: layer
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear) and styles.get(f"{name}.{child}") in _CUT
    }
    if not any(child in _PROJECTIONS for child in children):
        return None
    gathered = {c for c in children if styles[f"{name}.{c}"] == "colwise_gather_output"}
    if gathered and gathered != {"qkv_proj"}:
        return None  # the plan computes these heads on every rank
    counts = _head_counts(module, children)
    if counts is not None and not _reads_all_heads(name, module, counts, styles):
        if gathered:
            _localize_packed_attention(name, children, styles)
        return tuple(cut_heads(*counts, size, rank) for rank in range(size))
    if not gathered:
        for key in [key for key in styles if key.startswith(f"{name}.")]:
            del styles[key]
    return None


def _head_counts(module: nn.Module, children: dict[str, nn.Linear]) -> tuple[int, int] | None:
    """(heads, kv heads) of an attention module if its projections are laid out by whole heads."""
    config = getattr(module, "config", None)
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[module.layer_idx]  # type: ignore[union-attr]
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return None
    groups = getattr(module, "num_key_value_groups", None)
    kv_heads = heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads
    width = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    expected = {  # rows by layout; None: any multiple of the heads
        "k_proj": width and kv_heads * width,
        "qkv_proj": width and (heads + 2 * kv_heads) * width,
        "query_key_value": width and 3 * heads * width,
    }
    if not kv_heads or heads % kv_heads or ("query_key_value" in children and kv_heads != heads):
        return None
    for child, layer in children.items():
        rows = layer.in_features if child in ("o_proj", "dense") else layer.out_features
        divisor = kv_heads if child in ("k_proj", "v_proj") else heads
        if child == "qkv_proj":
            divisor = heads + 2 * kv_heads
        if rows % divisor or (expected.get(child) or rows) != rows:
            return None
    return heads, kv_heads


def _reads_all_heads(name: str, module: nn.Module, counts, styles: dict[str, str]) -> bool:
    """Whether an attention module has a number for each head that the plan leaves whole, so that
    it makes something for all heads (Doge: the mask)."""
    return any(
        parameter.ndim == 1
        and len(parameter) in counts
        and styles.get(f"{name}.{leaf}") not in _CUT
        for leaf, parameter in module.named_parameters(recurse=False)
    )


def _localize_packed_attention(name: str, children, styles: dict[str, str]) -> None:
    """Packed q, k, v are cut by heads instead of gathered: the KV cache is then cut as well."""
    styles[f"{name}.qkv_proj"] = "colwise"
    for child in children:
        if styles[f"{name}.{child}"] == "rowwise_split_input":
            styles[f"{name}.{child}"] = "rowwise"


def _upgrade_packed_mlp(model: nn.Module, styles: dict[str, str]) -> None:
    """Packed gate and up, split by `chunk(2)`, are cut in halves instead of gathered."""
    for name, module in model.named_modules():
        packed, down = f"{name}.gate_up_proj", f"{name}.down_proj"
        if (styles.get(packed), styles.get(down)) != (
            "colwise_gather_output",
            "rowwise_split_input",
        ):
            continue
        if module.gate_up_proj.out_features == 2 * module.down_proj.in_features:
            styles[packed], styles[down] = "packed_colwise", "rowwise"


def _spec(name, parameter, styles, heads, size: int, rank: int) -> Spec:
    """The shard of one parameter on one TP rank."""
    owner, _, leaf = name.rpartition(".")
    style = styles.get(name, styles.get(owner))
    cut, shape = _CUT.get(style), parameter.shape
    outer, part = owner.rpartition(".")[::2]
    if outer in heads and part in ("q_norm", "k_norm") and len(shape) == 2:  # a row for each head
        return Spec.cut(shape, 0, heads[outer][rank].intervals(part, shape[0]))
    if cut is None or (cut == "row" and len(shape) < 2):
        return Spec.whole(shape)
    dim = len(shape) - 1 if cut == "row" else max(len(shape) - 2, 0)
    if style in _PACKED:
        half = shape[dim] // 2
        start, stop = balanced(half, size, rank, grain=_grain(half, size))
        return Spec.cut(shape, dim, [(start, stop), (half + start, half + stop)])
    # A projection's weight is attention.q_proj.weight, a bare parameter is attention.sinks.
    attention, projection = (owner, leaf) if owner in heads else owner.rpartition(".")[::2]
    if attention in heads:
        return Spec.cut(shape, dim, heads[attention][rank].intervals(projection, shape[dim]))
    rows = shape[dim]
    return Spec.cut(shape, dim, [balanced(rows, size, rank, grain=_grain(rows, size))])


def _grain(rows: int, size: int) -> int:
    """Cuts in multiples of 8 where they fit: 16 bytes of bf16, which grouped GEMMs insist on."""
    return 8 if rows % 8 == 0 and rows >= 8 * size else 1
