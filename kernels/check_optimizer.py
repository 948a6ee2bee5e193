"""What the optimizer's update must give; see check_case.py."""

import functools

import torch

from gearshift.kernels import ops
from gearshift.kernels.adamw import join_master, split_master
from gearshift.kernels.check_case import Case, Size, Tensors

# A step far above half a unit of a bfloat16 weight, so that a wrong one shows.
SETTINGS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "step": 3,
}


def _draw(size: Size, dtype: torch.dtype, generator: torch.Generator, *, moments: torch.dtype):
    count = size.rows * size.vocab
    master, grad, first, second = (
        torch.randn(count, generator=generator, device=generator.device) for _ in range(4)
    )
    weight, low = split_master(master)
    return {
        "weight": weight,
        "low": low,
        "grad": grad.to(dtype),
        "exp_avg": first.to(moments),
        "exp_avg_sq": second.square().to(moments),
    }


def _run(inputs: Tensors, size: Size, backend: str) -> Tensors:
    weight, low, grad, exp_avg, exp_avg_sq = (tensor.clone() for tensor in inputs.values())
    ops.adamw_split_step(weight, low, grad, exp_avg, exp_avg_sq, **SETTINGS, backend=backend)
    return {
        "master": join_master(weight, low)[:, None],
        "weight": weight[:, None],
        "exp_avg": exp_avg[:, None],
        "exp_avg_sq": exp_avg_sq[:, None],
    }


def _truth(inputs: Tensors, outputs: Tensors) -> Tensors:
    lr, beta1, beta2, eps, decay, step = SETTINGS.values()
    master = join_master(inputs["weight"], inputs["low"]).double()
    grad = inputs["grad"].double()
    first = beta1 * inputs["exp_avg"].double() + (1 - beta1) * grad
    second = beta2 * inputs["exp_avg_sq"].double() + (1 - beta2) * grad.square()
    root = (second / (1 - beta2**step)).sqrt() + eps
    master = (1 - lr * decay) * master - lr * first / (1 - beta1**step) / root
    truth = {"master": master, "weight": master, "exp_avg": first, "exp_avg_sq": second}
    return {name: value[:, None] for name, value in truth.items()}


CASES = tuple(
    Case(f"adamw_split_step.{name}", functools.partial(_draw, moments=dtype), _run, _truth)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
)
