"""Builds the module that generates: the same Hugging Face class, holding one TP rank's shards."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.engine.gearbox.adapters import Adapter, adapters, plain_parameters
from gearshift.engine.gearbox.quantised import Linear4bit, packed_layers
from gearshift.engine.gearbox.slicing import HeadCut, TPPlan
from gearshift.engine.gearbox.spec import Spec
from gearshift.engine.zero.layout import whole_shape

# Both take (output, input, group=None), flat; the old name warns where the new one exists.
all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Rank:
    """This rank's place in its TP group; `group` is None for a group of one."""

    index: int
    size: int
    group: dist.ProcessGroup | None


@dataclass(frozen=True)
class Shard:
    """A parameter of the inference module and the training parameter it is filled from."""

    source: nn.Parameter
    specs: tuple[Spec, ...]  # of every TP rank
    spec: Spec  # of this rank
    parameter: nn.Parameter  # empty until a shift fills it
    packed: Linear4bit | None = None  # whose weight, dequantised, is what fills it

    def unpack(self) -> None:
        """Fills it from a weight in 4 bit, which is whole on every rank."""
        assert self.packed
        self.spec.extract(self.packed.whole().view(-1), 0, self.parameter.data.view(-1))


@dataclass(frozen=True)
class Merge:
    """An adapter of the training module and what it is added to; parts: this rank's of its own.

    group: of the ranks that have the other columns of the weight.
    """

    adapter: Adapter
    weight: Shard
    parts: list[Shard]
    group: dist.ProcessGroup | None

    def run(self) -> None:
        """Once all are filled. A collective of the group for DoRA, whose rows have one length."""
        parts = [shard.parameter.data for shard in self.parts]
        self.adapter.add_to(self.weight.parameter.data, parts, self.group)


def merges(shards: list[Shard], source: nn.Module, rank: Rank, device: torch.device) -> list[Merge]:
    """For each adapter of source the shard of its weight, and new ones of its own, cut as that."""
    of_weight = {id(shard.source): shard for shard in shards}

    def part(parameter: nn.Parameter, specs: tuple[Spec, ...]) -> Shard:
        empty = torch.empty(0, dtype=parameter.dtype, device=device)
        return Shard(parameter, specs, specs[rank.index], nn.Parameter(empty, requires_grad=False))

    found = []
    for adapter in adapters(source):
        weight = of_weight[id(adapter.weight)]
        specs = adapter.specs(weight.specs)
        group = rank.group if len(set(specs[0])) > 1 else None  # different columns of A
        found.append(Merge(adapter, weight, list(map(part, adapter.parts, specs)), group))
    return found


class LocalHeads:
    """A model config whose head counts are one rank's; everything else is read from the config.

    Attention modules that read counts from their config (Phi-3) see their own part. A later change
    of the model's config, such as the attention implementation, is seen through it.
    """

    def __init__(self, config: Any, cut: HeadCut):
        self._config = config
        self.num_attention_heads = cut.query[1] - cut.query[0]
        self.num_key_value_heads = cut.kv[1] - cut.kv[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


def meta_twin(module: nn.Module) -> nn.Module:
    """The same class and config with whole-shaped parameters on meta; consumes no random numbers.

    Built from the class: `from_config` would partition it under ZeRO-3.
    """
    with torch.device("meta"):
        twin = type(module)(copy.deepcopy(module.config))
    if getattr(module, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(module.generation_config)
    return twin.requires_grad_(False).eval()


def localize(
    twin: nn.Module, source: nn.Module, plan: TPPlan, rank: Rank, device: torch.device
) -> list[Shard]:
    """Turns a `meta_twin` of source into one TP rank's inference module, in place.

    Parameters become empty, one for each different part of a training parameter: tied weights that
    are cut alike share theirs. Buffers are copied. Returns what a shift has to fill.
    """
    shards = _bind_parameters(twin, source, plan, rank, device)
    _copy_plain_tensors(twin, source, device)
    copy_buffers(twin, source, device)
    for name, cuts in plan.heads.items():
        _set_local_heads(twin.get_submodule(name), cuts[rank.index])
    for name, wrap in plan.wraps.items():
        module = twin.get_submodule(name)
        module.forward = _WRAPS[wrap](module, plan.specs.get(f"{name}.weight"), rank)
    return shards


def copy_buffers(twin: nn.Module, source: nn.Module, device: torch.device) -> None:
    """Gives twin the source's buffers, in place where it has them: addresses stay."""
    for name, buffer in source.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        own = twin.get_submodule(owner)._buffers
        if own[leaf].is_meta or own[leaf].shape != buffer.shape:
            own[leaf] = buffer.detach().to(device, copy=True)
        else:
            own[leaf].copy_(buffer)


def _bind_parameters(twin, source, plan: TPPlan, rank: Rank, device) -> list[Shard]:
    sources = plain_parameters(source, tied=True)
    sources |= dict(source.named_parameters(remove_duplicate=False))  # of a twin with adapters
    layers = {id(layer.weight): layer for _, layer in packed_layers(source)}
    shards: dict[tuple, Shard] = {}
    for name, own in list(twin.named_parameters(remove_duplicate=False)):
        original, specs = sources[name], plan.specs[name]
        shape, dtype, packed = tuple(whole_shape(original)), original.dtype, None
        if id(original) in layers and own.dtype != original.dtype:  # the twin's is no such layer
            packed = layers[id(original)]
            shape, dtype = tuple(packed.state.shape), packed.state.dtype
        if shape != specs[0].shape:
            raise ValueError(
                f"{name}: the model has shape {shape}, its config says {specs[0].shape}; "
                "update the config"
            )
        key = (id(original), specs)
        if key not in shards:
            empty = torch.empty(0, dtype=dtype, device=device)
            parameter = nn.Parameter(empty, requires_grad=False)
            shards[key] = Shard(original, specs, specs[rank.index], parameter, packed)
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._parameters[leaf] = shards[key].parameter
    return list(shards.values())


def _copy_plain_tensors(twin: nn.Module, source: nn.Module, device: torch.device) -> None:
    """Tensors kept as plain attributes were made on meta as well."""
    for name, module in twin.named_modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                original = getattr(source.get_submodule(name), key)
                setattr(module, key, original.detach().to(device, copy=True))


def _set_local_heads(attention: nn.Module, cut: HeadCut) -> None:
    heads, kv_heads = cut.query[1] - cut.query[0], cut.kv[1] - cut.kv[0]
    local = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
    }
    for name, value in local.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    attention.config = LocalHeads(attention.config, cut)


def _rowwise(linear: nn.Linear, specs: tuple[Spec, ...], rank: Rank) -> Callable:
    """Each rank has part of the input: sums the products, then adds the bias once."""

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, linear.weight)
        dist.all_reduce(y, group=rank.group)
        return y if linear.bias is None else y + linear.bias

    return forward


def _rowwise_split_input(linear: nn.Linear, specs: tuple[Spec, ...], rank: Rank) -> Callable:
    """As rowwise, for an input that is whole on every rank."""
    ((start, stop),) = specs[rank.index].intervals
    product = _rowwise(linear, specs, rank)
    return lambda x: product(x[..., start:stop])


def _gather_output(linear: nn.Linear, specs: tuple[Spec, ...], rank: Rank) -> Callable:
    """Each rank has part of the output: joins the parts, which may differ in width."""
    widths = [spec.width for spec in specs]
    widest = max(widths)

    def forward(x: Tensor) -> Tensor:
        part = F.linear(x, linear.weight, linear.bias)
        part = F.pad(part, (0, widest - part.shape[-1])).contiguous()
        # Flat: gloo gathers along the first dimension only.
        parts = part.new_empty(rank.size * part.numel())
        all_gather_flat(parts, part.view(-1), group=rank.group)
        parts = parts.view(rank.size, *part.shape)
        return torch.cat([p[..., :width] for p, width in zip(parts, widths, strict=True)], dim=-1)

    return forward


def _rowwise_embedding(embedding: nn.Embedding, specs: tuple[Spec, ...], rank: Rank) -> Callable:
    """Each rank has part of the vocabulary: looks up its own ids, others' rows are 0; sums.

    Wraps the module's own forward, so that a subclass's scaling (Gemma) is kept.
    """
    ((start, stop),) = specs[rank.index].intervals
    embedding.num_embeddings = stop - start
    embedding.padding_idx = None  # concerns gradients only, and may be outside this part
    lookup = embedding.forward

    def forward(ids: Tensor) -> Tensor:
        outside = (ids < start) | (ids >= stop)
        rows = lookup((ids - start).masked_fill(outside, 0))
        rows = rows.masked_fill(outside.unsqueeze(-1), 0)
        dist.all_reduce(rows, group=rank.group)
        return rows

    return forward


def _all_reduce(module: nn.Module, specs: None, rank: Rank) -> Callable:
    """The module's output is a partial sum (experts whose weights are cut inside)."""
    partial = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        output = partial(*args, **kwargs)
        dist.all_reduce(output, group=rank.group)
        return output

    return forward


_WRAPS: dict[str, Callable] = {
    "rowwise": _rowwise,
    "rowwise_split_input": _rowwise_split_input,
    "colwise_gather_output": _gather_output,
    "embedding_rowwise": _rowwise_embedding,
    "all_reduce": _all_reduce,
}
