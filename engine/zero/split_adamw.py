"""AdamW whose float32 master is the model's bfloat16 weights and 16 low bits, under ZeRO 1 to 3.

DeepSpeed (seen in 0.19.8) calls bfloat16 partitions its master weights and steps the optimizer on
them. `SplitAdamW` keeps their low bits in its state, as `low`, beside the moments; `share_weights`
then makes DeepSpeed's second bfloat16 copy the model's own partitions. See docs/memory.md.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.kernels import ops
from gearshift.kernels.adamw import check_betas, join_master

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on the exact float32 master of bfloat16 parameters; see kernels/adamw.py.

    moments: dtype of exp_avg and exp_avg_sq, float32 or bfloat16. State of a parameter: `step`
    (int), `low` (int16), `exp_avg`, `exp_avg_sq`, all of its shape. Raises ValueError where
    bfloat16 moments cannot follow a beta, and in `step` for parameters that are not bfloat16.
    """

    def __init__(
        self,
        groups: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.float32,
    ):
        check_betas(*betas, moments)
        self.moments = moments
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "low" not in state:
            state["step"] = 0
            state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        tensors = (parameter, state["low"], parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        ops.adamw_split_step(
            *(tensor.view(-1) for tensor in tensors),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch casts them to the parameter's.

        Raises ValueError for the state of another optimizer, or with other moments.
        """
        saved = state_dict["state"]
        for state in saved.values():
            self._check_saved(state)
        super().load_state_dict({**state_dict, "state": {}})
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(ids, parameters, strict=True):
            if index not in saved:
                continue
            self.state[parameter] = {
                key: value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
                for key, value in saved[index].items()
            }

    def _check_saved(self, state: dict[str, Any]) -> None:
        if "low" not in state:
            raise ValueError(
                "optimizer.name=split_adamw: the saved state has no low bits, another optimizer "
                "wrote it; resume with optimizer.name=adamw"
            )
        if state["exp_avg"].dtype != self.moments:
            raise ValueError(
                f"optimizer.moments: the saved ones are {state['exp_avg'].dtype}, this run has "
                f"{self.moments}; resume with the same"
            )


def share_weights(zero: Any) -> None:
    """Makes each master partition of a ZeRO optimizer the model's own weights, without a copy.

    zero: `engine.optimizer` at stage 1, 2 or 3, with bfloat16 master weights. DeepSpeed would keep
    both and copy one onto the other after each step. Its stage 3 means to share them, but compares
    a torch.device to a string, which is never equal.
    """
    for master, weight in _partitions(zero):
        assert master.dtype == weight.dtype and master.shape == weight.shape
        assert master.device == weight.device
        master.data = weight.data
    if _has_whole_weights(zero):
        zero._link_all_hp_params()  # its views of the old partitions would keep them alive


@torch.no_grad()
def master_weights(module: nn.Module, zero: Any) -> dict[str, Tensor]:
    """The exact float32 weights, by name, in host memory of rank 0; empty on other ranks.

    module: `engine.module`; zero: `engine.optimizer`, whose own optimizer is SplitAdamW. A
    collective; beside the result it needs one parameter's float32 on the device.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    gather = _reduced if _has_whole_weights(zero) else _gathered
    found = {}
    for parameter, whole in gather(zero):
        if dist.get_rank() == 0:
            found[names[parameter]] = whole.cpu()
    return found


def _has_whole_weights(zero: Any) -> bool:
    """Stage 1 or 2: every rank has every bfloat16 weight."""
    return hasattr(zero, "single_partition_of_fp32_groups")


def _partitions(zero: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(what DeepSpeed steps the optimizer on, the model's flat weights) of this rank."""
    if not _has_whole_weights(zero):
        masters, weights = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
        yield from zip(masters, weights, strict=True)
        return
    for index, master in enumerate(zero.single_partition_of_fp32_groups):
        rank = dist.get_rank(zero.real_dp_process_group[index])
        yield master, zero.parallel_partitioned_bit16_groups[index][rank]


def _joined(zero: Any, master: Tensor, start: int, count: int) -> Tensor:
    """Elements `start` to `start + count` of a flat master, as float32."""
    weight = master.data.narrow(0, start, count)
    low = zero.optimizer.state.get(master, {}).get("low")
    if low is None:
        return weight.float()
    # A sleeping role's low bits are on the host.
    return join_master(weight, low.narrow(0, start, count).to(weight.device))


def _gathered(zero: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Stage 3: every parameter lies in equal pieces over the ranks, the last one padded."""
    for (master, _), parameters in zip(_partitions(zero), zero.fp16_groups, strict=True):
        start = 0
        for parameter in parameters:
            count = parameter.partition_numel()
            piece = _joined(zero, master, start, count)
            start += count
            group = parameter.ds_process_group
            whole = piece.new_empty(count * dist.get_world_size(group))
            dist.all_gather(list(whole.split(count)), piece, group=group)
            yield parameter, whole[: parameter.ds_numel].view(parameter.ds_shape)


def _reduced(zero: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Stages 1 and 2: a flat group is cut in equal parts, which parameters may straddle."""
    for index, (master, _) in enumerate(_partitions(zero)):
        for parameter in zero.bit16_groups[index]:
            # Bits, not numbers: a sum with the other ranks' zeros would turn -0.0 into 0.0.
            bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
            mapping = parameter._hp_mapping
            if mapping is not None:
                ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
                piece = _joined(zero, master, theirs.start, theirs.numel)
                bits.narrow(0, ours.start, ours.numel).copy_(piece.view(torch.int32))
            dist.all_reduce(bits, group=zero.real_dp_process_group[index])
            yield parameter, bits.view(torch.float32).view(parameter.shape)
