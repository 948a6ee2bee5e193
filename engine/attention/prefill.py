"""Attention over chunks of prompts of different lengths: one kernel call without padding, or SDPA.

On GPUs in half precision flash-attn's variable-length kernel takes all chunks of a batch at once,
or PyTorch's own where flash-attn is not installed. Elsewhere, and for what those cannot do
(attention sinks, keys and values of different sizes), chunk by chunk.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gearshift.engine.attention.cache import LayerCache
from gearshift.kernels.paged_attention import Rules, attend_masked

WIDEST_HEAD = 256  # of the variable-length kernels


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive rows of the prompts that are a chunk of one of them."""

    start: int
    stop: int
    context: Tensor | None  # [past + chunk] int64 cache slots; None where nothing precedes it


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The same spans for a variable-length kernel: cumulative lengths [spans + 1] int32."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    context: Tensor | None  # [all keys] int64 cache slots; None where no span has a past


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The chunks of prompts that one forward computes."""

    spans: list[Span]
    packed: Packed | None  # where a variable-length kernel may run


NONE = Prompts(spans=[], packed=None)


def packs(device: torch.device) -> bool:
    """Whether `Packed` is worth making on this device."""
    return device.type == "cuda"


def attend(
    query: Tensor, key: Tensor, value: Tensor, layer: LayerCache, prompts: Prompts, rules: Rules
) -> Tensor:
    """Rows of all chunks: query [n, HQ, D], key [n, HK, D], value [n, HK, DV] -> [n, HQ, DV].

    layer: the cache, which holds the chunks already and what precedes them.
    """
    packed = prompts.packed
    kernel = _kernel(query, value, packed, rules) if packed else None
    if packed and kernel:
        if packed.context is not None:
            key, value = layer.key_tokens[packed.context], layer.value_tokens[packed.context]
        return kernel(query, key, value, packed, rules)
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    for span in prompts.spans:
        rows = slice(span.start, span.stop)
        past = span.context is not None
        keys = layer.key_tokens[span.context] if past else key[rows]
        values = layer.value_tokens[span.context] if past else value[rows]
        out[rows] = prefill_attention(query[rows], keys, values, rules)
    return out


def _kernel(query: Tensor, value: Tensor, packed: Packed, rules: Rules) -> Callable | None:
    """The variable-length kernel that can do this; None if none can."""
    like = query.shape[-1] == value.shape[-1] <= WIDEST_HEAD
    if rules.sinks is not None or not like or not _half_on_gpu(query):
        return None
    if flash_attn() is not None:
        return _by_flash_attn
    # PyTorch's has no cap on scores and does not say where its diagonal begins after a past.
    if rules.softcap is None and packed.context is None and torch_varlen() is not None:
        return _by_torch
    return None


def _half_on_gpu(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


@cache
def flash_attn() -> Any:
    """flash_attn_varlen_func of flash-attn 2, if installed; flash-attn 4 alone has none there."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return getattr(importlib.import_module("flash_attn"), "flash_attn_varlen_func", None)


@cache
def torch_varlen() -> Any:
    """PyTorch's variable-length attention, if this version's takes what is needed here."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    takes = {"scale", "window_size"} <= set(inspect.signature(function).parameters)
    return function if takes else None


@cache
def _takes_groups(function: Callable) -> bool:
    """Whether it has fewer heads of keys than of queries on request; torch 2.11's does not ask."""
    return "enable_gqa" in inspect.signature(function).parameters


def _lengths(packed: Packed) -> tuple:
    return packed.queries, packed.keys, packed.longest_query, packed.longest_key


def _window(rules: Rules) -> tuple[int, int]:
    """(keys before a query's own, keys after it); -1 is without limit."""
    return (-1 if rules.window is None else rules.window - 1, 0)


def _by_flash_attn(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rules: Rules):
    return flash_attn()(
        *(query, key, value, *_lengths(packed)),
        softmax_scale=rules.scale,
        causal=True,
        window_size=_window(rules),
        softcap=rules.softcap or 0.0,
    )


def _by_torch(query: Tensor, key: Tensor, value: Tensor, packed: Packed, rules: Rules):
    kernel, options = torch_varlen(), {}
    group = query.shape[1] // key.shape[1]
    if _takes_groups(kernel):
        options["enable_gqa"] = group > 1
    elif group > 1:
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return kernel(
        *(query, key, value, *_lengths(packed)),
        scale=rules.scale,
        window_size=_window(rules),
        **options,
    )


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """The last n of t tokens of one sequence: query [n, HQ, D], key [t, HK, D] -> [n, HQ, DV]."""
    (n, heads, _), (t, groups, _) = query.shape, key.shape
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    plain = rules.softcap is None and rules.sinks is None
    if plain and n == t and (rules.window is None or rules.window >= t):
        out = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            is_causal=True,
            scale=rules.scale,
            enable_gqa=heads != groups,
        )
        return out[0].transpose(0, 1)
    distance = torch.arange(t - n, t, device=query.device)[:, None] - torch.arange(
        t, device=query.device
    )
    visible = distance >= 0
    if rules.window is not None:
        visible &= distance < rules.window
    grouped = query.unflatten(0, (groups, -1))  # [HK, group, n, D]
    sinks = None if rules.sinks is None else rules.sinks.view(groups, -1, 1)
    out = attend_masked(grouped, key[:, None], value[:, None], visible, rules, sinks)
    return out.flatten(0, 1).transpose(0, 1)
