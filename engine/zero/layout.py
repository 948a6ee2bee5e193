"""Where DeepSpeed keeps a model's weights, masters and gradients: nobody else reads its fields.

ZeRO-3 keeps a parameter as a flat vector in equal parts, one per rank, the last ones padded. Stages
1 and 2 keep it whole; for the optimizer they lay a group's parameters end to end and cut that into
equal parts, which parameters may straddle. Stage 0 cuts nothing. Field names are of DeepSpeed
0.19.8.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# By ZeRO optimizer: what it steps on, the same elements of the model's own weights, the parameters.
_FIELDS = (
    ("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "fp16_groups"),  # stage 3
    # Stages 1 and 2, with the weights of every rank.
    ("single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups", "bit16_groups"),
    # Stage 1, bf16 weights and fp32 gradients; likewise.
    ("fp32_groups_flat_partition", "bf16_partitioned_groups", "bf16_groups"),
)


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer steps on as one tensor, of which each rank has a part.

    master: this rank's part, flat, and the optimizer's key for the moments of it. weights: the same
    elements in the model's own dtype; they are one tensor where the optimizer steps on the weights.
    """

    master: Tensor
    weights: Tensor
    parameters: Sequence[nn.Parameter]


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + count` of a flattened parameter: those that this rank updates.

    master: as in Group; the fragment begins at its element `offset`.
    """

    name: str
    start: int
    count: int
    master: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """[count]: this fragment of the master, or of a moment of the same shape, as a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def groups(zero: Any) -> list[Group]:
    """What this rank steps on. zero: `engine.optimizer`; at stage 0 a group is one parameter."""
    fields = next((names for names in _FIELDS if hasattr(zero, names[0])), None)
    if fields is None:
        return [Group(master, weight, [weight]) for weight, master in _whole(zero)]
    found = []
    for index, held in enumerate(zip(*(getattr(zero, name) for name in fields), strict=True)):
        master, weights, parameters = held
        if isinstance(weights, list):
            weights = weights[dist.get_rank(zero.real_dp_process_group[index])]
        found.append(Group(master, weights, parameters))
    return found


def fragments(engine: Any) -> list[Fragment]:
    """All that this rank updates, of the trained parameters of a DeepSpeed engine, in its order."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [
        Fragment(names[parameter], start, count, group.master, offset)
        for group in groups(engine.optimizer)
        for parameter, start, count, offset in _places(group)
    ]


def _places(group: Group) -> Iterator[tuple[nn.Parameter, int, int, int]]:
    """(parameter, start, count, offset) of a group's fragments, padding left out."""
    offset = 0
    for parameter in group.parameters:
        if is_partitioned(parameter):
            part = parameter.partition_numel()
            start = part * dist.get_rank(parameter.ds_process_group)
            count = max(0, min(part, parameter.ds_numel - start))
            if count:
                yield parameter, start, count, offset
            offset += part
        elif not hasattr(parameter, "_hp_mapping"):
            yield parameter, 0, parameter.numel(), 0
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield parameter, ours.start, ours.numel, theirs.start


def _whole(zero: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Stage 0: (weight, master) of every parameter; they differ for bf16 weights."""
    if not hasattr(zero, "fp32_groups"):
        yield from ((p, p) for group in zero.param_groups for p in group["params"])
        return
    for weights, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
        yield from zip(weights, masters, strict=True)


def inner_optimizer(zero: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps; at stage 0 with fp32 weights there is no wrapper."""
    return getattr(zero, "optimizer", zero)


def gradient_buffers(zero: Any) -> list[Tensor]:
    """Where this rank's gradients add up, of the stages that keep that memory between two steps."""
    flat = getattr(zero, "grad_partitions_flat_buffer", None)  # stage 3
    if flat is not None:
        return [flat]
    return list(getattr(zero, "fp32_groups_gradients_flat", []))  # stage 1, fp32 gradients


def reduce_buckets(zero: Any) -> list[Tensor]:
    """Stage 3's buffers for reducing gradients; other stages make theirs for each backward."""
    if not hasattr(zero, "grad_partitions_flat_buffer"):
        return []
    return [b.buffer for b in zero.ipg_buckets.values() if b.buffer is not None]


def hold_gradients(zero: Any) -> None:
    """A gradient's memory is not used again before it is reduced.

    Stages 1 and 2 reduce one that exceeds their bucket where it lies, on a stream of their own with
    overlap_comm, and let go of it at once: what backward computes meanwhile could be written into
    it. DeepSpeed (seen in 0.19.8) protects it for an offloaded optimizer only.
    """

    def hold(gradient: Tensor, stream: Any) -> None:
        if gradient.is_cuda:
            gradient.record_stream(stream)

    if hasattr(zero, "_record_gradient_stream"):
        zero._record_gradient_stream = hold


def relink(zero: Any) -> None:
    """Tells DeepSpeed that masters or moments have moved: stages 1 and 2 keep views of them."""
    if not hasattr(zero, "_hp_optimizer_states_linked"):
        return
    with torch.enable_grad():  # as its own: autograd refuses views made without, once it gathers
        zero._link_all_hp_params()
    if zero._hp_optimizer_states_linked:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def refresh_weights(engine: Any) -> None:
    """Makes the model's weights casts of the masters, as after a step. A collective."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()
        for index in range(len(groups(zero))):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        zero.checkpoint_event_epilogue()
    elif stage:
        zero.update_lp_params()
    else:
        for group in groups(zero):
            group.weights.data.copy_(group.master.data)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has cut the parameter; it may be whole at times nevertheless."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: Tensor) -> torch.Size:
    """Of all ranks' parts together, without padding."""
    return getattr(parameter, "ds_shape", parameter.shape)


def partition(parameter: Tensor) -> Tensor:
    """[n]: this rank's flat part of a parameter, padding included; all of it where it is whole."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter.data.reshape(-1)


def write_whole(parameter: Tensor, value: Tensor) -> None:
    """Gives a parameter `value`, of its whole shape: this rank's part of it where it is cut."""
    own = partition(parameter)
    start = (
        own.numel() * dist.get_rank(parameter.ds_process_group) if is_partitioned(parameter) else 0
    )
    part = value.reshape(-1)[start : start + own.numel()]
    own.data[: part.numel()].copy_(part)


def sharer(ds_config: dict, dtype: torch.dtype) -> Callable[[nn.Parameter], nn.Parameter]:
    """A function from a frozen parameter of one engine to that of another, in the same memory.

    Below ZeRO-3 it is the same parameter. Under ZeRO-3 each engine keeps account of what it has
    gathered on the parameter itself, so the other has a parameter of its own: only the partition,
    which nobody writes, is the same. ds_config: of the other engine.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        return lambda parameter: parameter
    from deepspeed import zero

    made = zero.Init(config_dict_or_path=ds_config, dtype=dtype)

    def share(parameter: nn.Parameter) -> nn.Parameter:
        nothing = torch.empty(1, dtype=dtype, device=made.local_device)
        shared = nn.Parameter(nothing.expand(parameter.ds_shape), requires_grad=False)
        made._convert_to_deepspeed_param(shared)
        shared.ds_tensor, shared.ds_numel_aligned = parameter.ds_tensor, parameter.ds_numel_aligned
        shared.partition()  # has its part, so it only lets go of what it seemed to have whole
        return shared

    return share


def is_on_disk(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps this rank's part on an NVMe disk."""
    return is_partitioned(parameter) and parameter.ds_tensor.final_location == "nvme"


def ranks_of(parameter: Tensor) -> int:
    """How many ranks a partitioned parameter is cut over."""
    return dist.get_world_size(parameter.ds_process_group)


@contextmanager
def gathered(*parameters: nn.Parameter | None) -> Iterator[None]:
    """Whole parameters meanwhile, under any ZeRO stage. A collective under ZeRO-3."""
    absent = [p for p in parameters if p is not None and _is_absent(p)]
    if all(_holds_all(p) for p in absent):
        with _in_place(absent):
            yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(absent):
        yield


def _is_absent(parameter: nn.Parameter) -> bool:
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def _holds_all(parameter: nn.Parameter) -> bool:
    """Whether this rank's part is the whole parameter, on the device it is used on."""
    part = partition(parameter)
    return part.numel() >= parameter.ds_numel and part.device == parameter.device


@contextmanager
def _in_place(parameters: list[nn.Parameter]) -> Iterator[None]:
    """At one rank: views of the parts, where DeepSpeed would gather into a copy."""
    for parameter in parameters:
        whole = partition(parameter).detach()[: parameter.ds_numel]
        parameter.data = whole.view(whole_shape(parameter))
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
