"""What the optimizer's update must give; see case.py."""

import functools

import torch

from gearshift.kernels import ops
from gearshift.kernels.adamw import join_master, split_master
from gearshift.kernels.checks.case import Blocked, Case, Size, Tensors, Truths
from gearshift.kernels.checks.head import row_blocks

# A step far above half a unit of a bfloat16 weight, so that a wrong one shows.
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}


def _draw(size: Size, dtype: torch.dtype, generator: torch.Generator, *, moments: torch.dtype):
    count, device = size.rows * size.vocab, generator.device
    normal = functools.partial(torch.randn, count, generator=generator, device=device)
    weight = torch.empty(count, dtype=torch.bfloat16, device=device)
    low = torch.empty(count, dtype=torch.int16, device=device)
    master = normal()
    for part in row_blocks(count, 1):
        weight[part], low[part] = split_master(master[part])
    del master
    return {
        "weight": weight,
        "low": low,
        "grad": normal().to(dtype),
        "exp_avg": normal().to(moments),
        "exp_avg_sq": normal().square_().to(moments),
    }


def _run(inputs: Tensors, size: Size, backend: str) -> Tensors:
    weight, low, grad, exp_avg, exp_avg_sq = (tensor.clone() for tensor in inputs.values())
    ops.adamw_split_step(weight, low, grad, exp_avg, exp_avg_sq, **SETTINGS, backend=backend)
    master = torch.empty_like(weight, dtype=torch.float32)
    for part in row_blocks(len(weight), 1):
        master[part] = join_master(weight[part], low[part])
    return {
        "master": master[:, None],
        "weight": weight[:, None],
        "exp_avg": exp_avg[:, None],
        "exp_avg_sq": exp_avg_sq[:, None],
    }


def _truth(inputs: Tensors, outputs: Tensors) -> Truths:
    """In blocks: whole, the float64 numbers of 2^31 weights are 200 GB."""
    count = len(inputs["weight"])
    return {
        name: Blocked(count, functools.partial(_truth_block, inputs, name))
        for name in ("master", "weight", "exp_avg", "exp_avg_sq")
    }


def _truth_block(inputs: Tensors, name: str, part: slice) -> torch.Tensor:
    lr, beta1, beta2, eps, decay, step = SETTINGS.values()
    weight, low, grad, exp_avg, exp_avg_sq = (tensor[part] for tensor in inputs.values())
    grad = grad.double()
    first = beta1 * exp_avg.double() + (1 - beta1) * grad
    if name == "exp_avg":
        return first[:, None]
    second = beta2 * exp_avg_sq.double() + (1 - beta2) * grad.square()
    if name == "exp_avg_sq":
        return second[:, None]
    root = (second / (1 - beta2**step)).sqrt() + eps
    master = (1 - lr * decay) * join_master(weight, low).double()
    return (master - lr * first / (1 - beta1**step) / root)[:, None]


CASES = tuple(
    Case(f"adamw_split_step.{name}", functools.partial(_draw, moments=dtype), _run, _truth)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
)
