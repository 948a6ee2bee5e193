"""AdamW and its schedule, for DeepSpeed."""

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gearshift.engine.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig, ds_config: dict) -> Optimizer:
    """AdamW over the trainable parameters; weight decay spares vectors (norms and biases).

    On host memory, where the DeepSpeed JSON offloads the optimizer, it is DeepSpeedCPUAdam.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(_shape(p)) > 1]
    vectors = [p for p in trainable if len(_shape(p)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam([g for g in groups if g["params"]], **settings, adamw_mode=True)
    return torch.optim.AdamW([g for g in groups if g["params"]], **settings, fused=True)


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


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
