"""Attention over sequences that lie end to end in one row: no padding, so no mask.

Training and scoring read whole sequences, generation chunks of prompts. On GPUs in half precision
flash-attn's variable-length kernel takes all of them at once, or PyTorch's own where flash-attn is
not installed. Elsewhere, and for what those cannot do (attention sinks, keys and values of unlike
sizes), sequence by sequence. All ways have gradients.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from gearshift.engine.attention.cache import LayerCache
from gearshift.kernels.paged_attention import Rules, attend_masked

CPU = torch.device("cpu")
UNSAID = -1  # the window of a layer that does not say any: its model's mask alone would apply it
WIDEST_HEAD = 256  # of the variable-length kernels


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive tokens of one sequence: all of them, or a chunk of a prompt."""

    start: int
    stop: int
    context: Tensor | None = None  # [past + chunk] int64 cache slots; None: nothing precedes it


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The same spans for a variable-length kernel: cumulative lengths [spans + 1] int32."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    context: Tensor | None = None  # [all keys] int64 cache slots; None where no span has a past


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Whole sequences by their lengths: `tokens` [sequences, length] int64, the places of each
    one's tokens in the row; `places` [N] int64, where each token is in all of `tokens`, flattened.
    """

    tokens: list[Tensor]
    places: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Alike":
        starts: dict[int, list[int]] = {}
        for length, start in zip(lengths, accumulate(lengths, initial=0), strict=False):
            starts.setdefault(length, []).append(start)
        tokens = [
            torch.tensor(places)[:, None] + torch.arange(length)
            for length, places in starts.items()
        ]
        order = torch.cat([index.flatten() for index in tokens])
        return cls(tokens=[index.to(device) for index in tokens], places=order.argsort().to(device))


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What one forward computes."""

    spans: list[Span]
    packed: Packed | None  # where a variable-length kernel may run
    lengths: tuple[int, ...] = ()  # of whole sequences; empty where spans are chunks
    read: Tensor | None = None  # [n] int64: tokens whose last hidden state is used; None: all
    device: torch.device = CPU

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Sequences":
        """Whole sequences of these lengths."""
        bounds = [0, *accumulate(lengths)]
        packed = None
        if packs(device):
            ends = torch.tensor(bounds, dtype=torch.int32, device=device)
            most = max(lengths)
            packed = Packed(queries=ends, keys=ends, longest_query=most, longest_key=most)
        spans = [Span(start=start, stop=stop) for start, stop in pairwise(bounds)]
        return cls(spans=spans, packed=packed, lengths=tuple(lengths), device=device)

    @cached_property
    def alike(self) -> Alike | None:
        """Where whole sequences share a length; read where no kernel takes all of them."""
        several = len(set(self.lengths)) < len(self.lengths)
        return Alike.of(self.lengths, self.device) if several else None


NONE = Sequences(spans=[], packed=None)


def register(name: str, attend_row: Callable[..., Tensor]) -> None:
    """Makes an attention function of transformers, by `name`, for rows [1, heads, N, size].

    attend_row(module, query [N, HQ, D], key [N, HK, D], value [N, HK, DV], rules, others) returns
    [N, HQ, DV]; others: what a model passes besides. No mask function goes with it, so that
    transformers builds no mask, and a mask that a model makes by itself is not applied: whoever
    packs it finds out (models/heads.py).
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = UNSAID,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        # Not [0], whose backward writes zeros first and then copies into them.
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        rules = Rules(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=_window_of(module, sliding_window),
            softcap=softcap,
            sinks=s_aux,
        )
        return attend_row(module, query, key, value, rules, others).unsqueeze(0), None

    AttentionInterface.register(name, attention)


def _window_of(module: nn.Module, said: int | None) -> int | None:
    """A layer's window; said: what its model passes, UNSAID where it passes none."""
    config: Any = getattr(module, "config", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if said in (None, UNSAID) and types is not None and index is not None:
        return config.sliding_window if types[index] == "sliding_attention" else None
    return getattr(config, "sliding_window", None) if said == UNSAID else said


def packs(device: torch.device) -> bool:
    """Whether `Packed` is worth making on this device."""
    return device.type == "cuda"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    rules: Rules,
    layer: LayerCache | None = None,
) -> Tensor:
    """All spans' tokens: query [n, HQ, D], key [n, HK, D], value [n, HK, DV] -> [n, HQ, DV].

    layer: where spans have a context, the cache, which holds it and the spans' own tokens.
    """
    packed = sequences.packed
    kernel = _kernel(query, value, packed, rules) if packed else None
    if packed and kernel:
        if packed.context is not None:
            assert layer is not None
            key, value = layer.key_tokens[packed.context], layer.value_tokens[packed.context]
        return kernel(query, key, value, packed, rules)
    if sequences.alike is not None:
        return _attend_alike(query, key, value, sequences.alike, rules)
    outs = []
    for span in sequences.spans:
        rows = slice(span.start, span.stop)
        keys, values = key[rows], value[rows]
        if span.context is not None:
            assert layer is not None
            keys, values = layer.key_tokens[span.context], layer.value_tokens[span.context]
        outs.append(_attend(query[None, rows], keys[None], values[None], rules)[0])
    return torch.cat(outs)


def _attend_alike(query: Tensor, key: Tensor, value: Tensor, alike: Alike, rules: Rules) -> Tensor:
    """Whole sequences, those of one length in one call."""
    outs = []
    for index in alike.tokens:
        flat = index.flatten()
        q, k, v = (x[flat].unflatten(0, index.shape) for x in (query, key, value))
        outs.append(_attend(q, k, v, rules).flatten(0, 1))
    return torch.cat(outs)[alike.places]


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
    """flash_attn_varlen_func of flash-attn 3 or 2, if installed; flash-attn 4 has none there."""
    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            return getattr(importlib.import_module(name), "flash_attn_varlen_func", None)
    return None


@cache
def torch_varlen() -> Any:
    """PyTorch's variable-length attention, if this version's takes what is needed here."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    takes = {"scale", "window_size"} <= set(inspect.signature(function).parameters)
    return function if takes else None


@cache
def _asks_for_groups(function: Callable) -> bool:
    """Whether it has fewer heads of keys than of queries on request; torch 2.11's does not ask."""
    return "enable_gqa" in inspect.signature(function).parameters


@cache
def _groups_unasked(function: Callable, device: torch.device) -> bool:
    """Whether one that does not ask takes fewer heads of keys all the same: tried once, with
    gradients, against keys and values that are repeated."""
    made = torch.Generator().manual_seed(0)
    rows = [torch.randn(24, heads, 64, generator=made) for heads in (4, 2, 2, 4)]
    query, key, value, upstream = (x.to(device, torch.bfloat16) for x in rows)
    ends = torch.tensor([0, 17, 24], dtype=torch.int32, device=device)

    def run(repeats: int) -> list[Tensor]:
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in (query, key, value)]
            k, v = (x.repeat_interleave(repeats, 1) for x in own[1:])
            out = function(own[0], k, v, ends, ends, 17, 17, scale=0.125, window_size=(-1, 0))
            return [out.detach(), *torch.autograd.grad(out, own, upstream)]

    try:
        found = run(1)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    # Gradients of repeated heads are rounded before they are added.
    pairs = zip(found, run(2), strict=True)
    return all(torch.allclose(a.float(), b.float(), atol=5e-2, rtol=5e-2) for a, b in pairs)


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
    if _asks_for_groups(kernel):
        options["enable_gqa"] = group > 1
    elif group > 1 and not _groups_unasked(kernel, query.device):
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return kernel(
        *(query, key, value, *_lengths(packed)),
        scale=rules.scale,
        window_size=_window(rules),
        **options,
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """The last n of t tokens of B sequences: query [B, n, HQ, D], key [B, t, HK, D], value
    [B, t, HK, DV] -> [B, n, HQ, DV]."""
    (n, heads), (t, groups) = query.shape[1:3], key.shape[1:3]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    plain = rules.softcap is None and rules.sinks is None
    if plain and n == t and (rules.window is None or rules.window >= t):
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=rules.scale, enable_gqa=heads != groups
        )
        return out.transpose(1, 2)
    distance = torch.arange(t - n, t, device=query.device)[:, None] - torch.arange(
        t, device=query.device
    )
    visible = distance >= 0
    if rules.window is not None:
        visible &= distance < rules.window
    grouped = query.unflatten(1, (groups, -1)).flatten(0, 1)  # [B * HK, group, n, D]
    keys, values = (x.flatten(0, 1)[:, None] for x in (key, value))
    sinks = None
    if rules.sinks is not None:
        sinks = rules.sinks.view(groups, -1, 1).repeat(len(query), 1, 1)
    out = attend_masked(grouped, keys, values, visible, rules, sinks)
    return out.unflatten(0, (-1, groups)).flatten(1, 2).transpose(1, 2)
