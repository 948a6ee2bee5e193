"""Attention over the paged cache, inside any Hugging Face decoder.

transformers looks its attention function up by name (`AttentionInterface`), so the same module
class that trains also generates: only `config._attn_implementation` differs. A forward packs the
tokens of all sequences in one row, [1, N]; which token belongs to whom is in the `Step` that is
current while it runs. No mask function is registered under our name: transformers then builds no
mask (masking_utils, "custom attention without equivalent mask creation").
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gearshift.engine.attention import prefill
from gearshift.engine.attention.cache import KVCache, LayerCache, LayerShape
from gearshift.kernels import dispatch, ops
from gearshift.kernels.paged_attention import Gather, Rules, attend_gathered

NAME = "gearshift_paged"
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward computes: rows [0, S) decode one token each, then chunks of prompts."""

    cache: KVCache
    slots: Tensor  # [N] int64: where each row's key and value go
    block_tables: Tensor  # [S, blocks] int32
    lengths: Tensor  # [S] int32: tokens in the cache, this one included
    gathers: list[Gather]  # the S rows again, where no kernel reads the tables
    prompts: prefill.Prompts  # the rows after them


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A forward that only shows what each attention layer keeps per token."""

    shapes: dict[nn.Module, LayerShape] = field(default_factory=dict)


_current: Step | Probe | None = None


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward names this argument."""
    return argument in inspect.signature(type(module).forward).parameters


def supports(module: nn.Module) -> str | None:
    """Why the module cannot generate with paged attention; None if it can."""
    name = type(module).__name__
    if not isinstance(module, PreTrainedModel):
        return f"{name} is not a transformers model"
    config = module.config.get_text_config()
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if getattr(config, "use_bidirectional_attention", False):
        return f"{name} attends in both directions"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if unknown or getattr(module, "_is_stateful", False):
        kinds = ", ".join(unknown) or "a state"
        return f"{name} has layers other than full or windowed attention ({kinds})"
    if not getattr(module, "_supports_attention_backend", False):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    if not accepts(module, "logits_to_keep"):
        return f"{name}.forward has no logits_to_keep"
    moving = sorted(_rope_types(config) & {"dynamic", "longrope"})
    if moving:
        return f"the rotary frequencies of {name} depend on a batch's longest row ({moving[0]})"
    return None


def _rope_types(config) -> set[str]:
    """The rope types of all layers; the parameters are one dict, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return {entry.get("rope_type", "default") for entry in [parameters, *nested]}


def uses_kernel(device: torch.device) -> bool:
    """Whether decoding reads the block tables in place; the alternative copies keys and values.

    That alternative is the faster one on CPUs: PyTorch's fused attention over groups of rows of
    like length, with one mask per step.
    """
    return dispatch.resolve("auto", device) == "triton"


def decode_step(cache: KVCache, slots: Tensor, block_tables: Tensor, lengths: Tensor) -> Step:
    """A step of decoding rows alone, made of tensors [S] int64 without reading them on the host."""
    gathers = []
    if not uses_kernel(cache.device):
        blocks = block_tables.flatten().long()
        gathers = [Gather(rows=slice(None), blocks=blocks, lengths=lengths[:, None])]
    return Step(
        cache=cache,
        slots=slots,
        block_tables=block_tables,
        lengths=lengths.to(torch.int32),
        gathers=gathers,
        prompts=prefill.NONE,
    )


@contextmanager
def running(step: Step | Probe) -> Iterator[None]:
    """Makes `step` the one that attention layers read."""
    global _current
    assert _current is None, "a forward inside a forward"
    _current = step
    try:
        yield
    finally:
        _current = None


@contextmanager
def attending(module: nn.Module) -> Iterator[None]:
    """The module attends through the paged cache, in eval mode; leaves it as it was found."""
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation_internal) for config in configs]
    training = [part for part in module.modules() if part.training]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        for part in training:
            part.training = False
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        for part in training:
            part.training = True


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """The AttentionInterface function: [1, heads, N, size] -> [1, N, heads, size of values]."""
    step = _current
    assert step is not None, "paged attention outside the rollout engine"
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(step, Probe):
        return _observe(step, module, query, key, value, others)
    rules = Rules(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=_window(module, sliding_window),
        softcap=softcap,
        sinks=s_aux,
    )
    layer = step.cache.layers[module]
    layer.write(step.slots, key, value)
    decoding = len(step.lengths)
    if decoding == len(query):
        return decode_attention(query, layer, step, rules)[None], None
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    if decoding:
        out[:decoding] = decode_attention(query[:decoding], layer, step, rules)
    query, key, value = (x[decoding:] for x in (query, key, value))
    out[decoding:] = prefill.attend(query, key, value, layer, step.prompts, rules)
    return out[None], None


def _observe(
    probe: Probe, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, others: dict
) -> tuple[Tensor, None]:
    unknown = [
        name
        for name, argument in others.items()
        if isinstance(argument, Tensor) and name not in ("position_ids", "cache_position")
    ]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which the paged "
            "engine would ignore; set rollout.engine: hf"
        )
    shape = LayerShape(key=tuple(key.shape[1:]), value=tuple(value.shape[1:]), dtype=key.dtype)
    probe.shapes[module] = shape
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1)[None], None


def _window(module: nn.Module, given: int | None) -> int | None:
    """The layer's window; from the config where the model applies it through the mask alone."""
    if given is not None:
        return given
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if types is None or index is None or types[index] != "sliding_attention":
        return None
    return config.sliding_window


def decode_attention(query: Tensor, layer: LayerCache, step: Step, rules: Rules) -> Tensor:
    """One new token per sequence: query [S, HQ, D] -> [S, HQ, DV]."""
    if not step.gathers:
        return ops.paged_attention(
            query,
            layer.key,
            layer.value,
            step.block_tables,
            step.lengths,
            scale=rules.scale,
            softcap=rules.softcap,
            window=rules.window,
            sinks=rules.sinks,
        )
    outs = [
        attend_gathered(query[gather.rows], layer.key, layer.value, gather, rules)
        for gather in step.gathers
    ]
    return torch.cat(outs) if len(outs) > 1 else outs[0]


AttentionInterface.register(NAME, attention)
