"""Attention over the paged cache, inside any Hugging Face decoder.

transformers looks its attention function up by name (`AttentionInterface`), so the same module
class that trains also generates: only `config._attn_implementation` differs. A forward packs the
tokens of all sequences in one row, [1, N]; which token belongs to whom is in the `Step` that is
current while it runs. No mask function is registered under our name: transformers then builds no
mask (masking_utils, "custom attention without equivalent mask creation").
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gearshift.engine.attention.cache import KVCache, LayerCache, LayerShape
from gearshift.engine.attention.packed import accepts, implementation, unpackable
from gearshift.engine.attention.sequences import NONE, Sequences, attend, register
from gearshift.kernels import dispatch, ops
from gearshift.kernels.paged_attention import Gather, Rules, attend_gathered

NAME = "gearshift_paged"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward computes: rows [0, S) decode one token each, then chunks of prompts."""

    cache: KVCache
    slots: Tensor  # [N] int64: where each row's key and value go
    block_tables: Tensor  # [S, blocks] int32
    lengths: Tensor  # [S] int32: tokens in the cache, this one included
    gathers: list[Gather]  # the S rows again, where no kernel reads the tables
    prompts: Sequences  # the rows after them


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A forward that only shows what each attention layer keeps per token, and what of it the cache
    could not."""

    shapes: dict[nn.Module, LayerShape] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


_current: Step | Probe | None = None


def supports(module: nn.Module) -> str | None:
    """Why the module cannot generate with paged attention; None if nothing is known before it has
    run, see probe."""
    if why := unpackable(module):
        return why
    if not accepts(module, "logits_to_keep"):
        return f"{type(module).__name__}.forward has no logits_to_keep"
    return None


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
        prompts=NONE,
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
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, and every part back to the mode it was in."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def probe(module: nn.Module, device: torch.device | str) -> Probe:
    """What the module's attention layers keep: a forward of one token."""
    made, token = Probe(), torch.zeros(1, 1, dtype=torch.long, device=device)
    with attending(module), running(made):
        module(input_ids=token, position_ids=torch.zeros_like(token), use_cache=False)
    return made


@contextmanager
def attending(module: nn.Module) -> Iterator[None]:
    """The module attends through the paged cache, in eval mode; leaves it as it was found."""
    with evaluating(module), implementation(module, NAME):
        yield


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, others: dict
) -> Tensor:
    step = _current
    assert step is not None, "paged attention outside the rollout engine"
    if isinstance(step, Probe):
        return _observe(step, module, query, key, value, others)
    layer = step.cache.layers[module]
    layer.write(step.slots, key, value)
    decoding = len(step.lengths)
    if decoding == len(query):
        return decode_attention(query, layer, step, rules)
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    if decoding:
        out[:decoding] = decode_attention(query[:decoding], layer, step, rules)
    query, key, value = (x[decoding:] for x in (query, key, value))
    out[decoding:] = attend(query, key, value, step.prompts, rules, layer)
    return out


def _observe(
    probe: Probe, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, others: dict
) -> Tensor:
    unknown = [
        name
        for name, argument in others.items()
        if isinstance(argument, Tensor) and name not in ("position_ids", "cache_position")
    ]
    name = type(module).__name__
    if unknown:
        said = f"passes {', '.join(unknown)} to attention, which the paged engine would ignore"
        probe.faults.append(f"{name} {said}")
    if module in probe.shapes:
        said = "attends twice in a layer, which the paged engine cannot"
        probe.faults.append(f"{name} {said}")
    shape = LayerShape(key=tuple(key.shape[1:]), value=tuple(value.shape[1:]), dtype=key.dtype)
    probe.shapes[module] = shape
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


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


register(NAME, _attend)
