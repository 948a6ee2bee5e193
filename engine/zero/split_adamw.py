"""AdamW whose float32 master is the model's bfloat16 weights and 16 low bits, under ZeRO 1 to 3.

DeepSpeed (seen in 0.19.8) calls bfloat16 partitions its master weights and steps the optimizer on
them. `SplitAdamW` keeps their low bits in its state, as `low`, beside the moments; `share_weights`
then makes DeepSpeed's second bfloat16 copy the model's own partitions. See docs/memory.md.
"""

from typing import Any

import torch
from torch import Tensor

from gearshift.engine.zero.layout import groups, relink
from gearshift.kernels import ops
from gearshift.kernels.adamw import check_betas

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


def share_weights(zero: Any) -> None:
    """Makes each master partition of a ZeRO optimizer the model's own weights, without a copy.

    zero: `engine.optimizer` at stage 1, 2 or 3, with bfloat16 master weights. DeepSpeed would keep
    both and copy one onto the other after each step. Its stage 3 means to share them, but compares
    a torch.device to a string, which is never equal.
    """
    for group in groups(zero):
        master, weights = group.master, group.weights
        assert master.dtype == weights.dtype and master.shape == weights.shape
        assert master.device == weights.device
        master.data = weights.data
    relink(zero)  # views of the old masters would keep them alive
