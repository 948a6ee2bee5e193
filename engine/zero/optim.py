"""AdamW and its schedule, for DeepSpeed."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gearshift.engine.config.deepspeed import offloaded
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import OptimizerConfig
from gearshift.engine.zero.layout import whole_shape
from gearshift.engine.zero.split_adamw import MOMENTS, SplitAdamW


def build_optimizer(module: nn.Module, config: OptimizerConfig, ds_config: dict) -> Optimizer:
    """AdamW over the trainable parameters; weight decay spares vectors (norms and biases).

    On host memory, where the DeepSpeed JSON offloads the optimizer, it is DeepSpeedCPUAdam. The two
    fit together: see check_optimizer.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(whole_shape(p)) > 1]
    vectors = [p for p in trainable if len(whole_shape(p)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    settings: dict[str, Any] = {"lr": config.lr, "betas": betas, "eps": config.eps}
    if config.name == "split_adamw":
        held = [group for group in groups if group["params"]]
        return SplitAdamW(held, **settings, moments=MOMENTS[config.moments])
    if offloaded(ds_config, "optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam([g for g in groups if g["params"]], **settings, adamw_mode=True)
    return torch.optim.AdamW([g for g in groups if g["params"]], **settings, fused=True)


def hold_still(module: nn.Module) -> None:
    """Freezes a model that is not to be trained, all but its smallest parameter: DeepSpeed's ZeRO
    stages 1 and 2 want an optimizer, and an optimizer wants a parameter."""
    module.requires_grad_(False)
    smallest = min(module.parameters(), key=lambda p: whole_shape(p).numel())
    smallest.requires_grad_(True)


def check_optimizer(config: OptimizerConfig, ds_config: dict) -> None:
    """Raises ConfigError where bf16 master weights would lose their low bits, or have none to keep.

    A bf16 master alone does not learn: at lr 1e-6 nearly every step rounds to no step at all.
    """
    bf16 = ds_config.get("bf16", {})
    narrow = bool(bf16.get("enabled") and bf16.get("bf16_master_weights_and_grads"))
    if config.name == "adamw" and narrow:
        raise ConfigError(
            "bf16.bf16_master_weights_and_grads",
            "plain AdamW would round its steps away",
            "set optimizer.name to split_adamw, or remove it",
            value="true",
        )
    if config.name == "adamw":
        return
    if not (narrow and bf16.get("bf16_optimizer_states")):
        raise ConfigError(
            "optimizer.name",
            "needs a DeepSpeed JSON with bf16.enabled, bf16.bf16_master_weights_and_grads and "
            "bf16.bf16_optimizer_states, as actor_zero3_bf16_split.json or "
            "critic_zero3_bf16_split.json",
            value="split_adamw",
        )
    for what in ("optimizer", "param"):
        if offloaded(ds_config, what):
            raise ConfigError(
                f"zero_optimization.offload_{what}",
                "optimizer.name=split_adamw updates the weights where they are used",
                "remove it, or use adamw",
            )


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """Warm-up to the peak, then decay to 0 over `steps` optimizer steps in all."""
    warmup = round(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if config.schedule == "linear":
            return 1 - progress
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0

    return LambdaLR(optimizer, factor)
