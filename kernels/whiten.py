"""Whitening of masked values over every rank of a process group.

    y = (x - mean) / sqrt(var + eps)   (+ mean when the mean is not shifted),   var unbiased

Each rank contributes (n, mean, M2 = sum (x - mean)^2); they merge exactly (Chan et al. 1983):

    n = sum n_i      mean = sum n_i mean_i / n      M2 = sum M2_i + sum n_i (mean_i - mean)^2
"""

import torch
import torch.distributed as dist

from gearshift.kernels import arguments


def _statistics(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # float64 sums: a constant x has exactly its own mean and M2 = 0, so rounding noise is not
    # blown up to unit variance. Three scalars, so the cost is none.
    n = mask.sum(dtype=torch.float64)
    mean = torch.where(mask, x, 0).sum(dtype=torch.float64) / n.clamp(min=1)
    deviation = torch.where(mask, x.double() - mean, 0)
    return torch.stack([n, mean, deviation.square().sum()])


def _merge(parts: torch.Tensor) -> torch.Tensor:
    n, mean, m2 = parts.unbind(1)
    total = n.sum()
    merged = (n * mean).sum() / total.clamp(min=1)
    return torch.stack([total, merged, m2.sum() + (n * (mean - merged).square()).sum()])


@torch.no_grad()
def whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    *,
    shift_mean: bool = True,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-8,
) -> torch.Tensor:
    """Scales the masked-in elements to unit variance, and to mean 0 unless `shift_mean` is false.

    Args:
        x: [B, R] float. mask: [B, R] bool; shapes may differ between ranks, B = 0 included.
        group: ranks whose elements are whitened together (`dist.group.WORLD` for all). None means
            this process alone, even when torch.distributed is initialised.

    Returns [B, R] float32, exactly 0 where `mask` is false whatever `x` holds there. One live
    element has variance 0: it maps to 0 (to itself when the mean is kept); none gives zeros.
    Ranks are merged in rank order: every rank gets the same statistics, on every run.
    """
    arguments.check_tensor("x", x, mask.shape, x.device)
    arguments.check_tensor("mask", mask, x.shape, x.device, (torch.bool,))
    statistics = _statistics(x.float(), mask)
    if group is not None:
        parts = [torch.empty_like(statistics) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, statistics, group=group)
        statistics = _merge(torch.stack(parts))
    n, mean, m2 = statistics.unbind()
    scale = (m2 / (n - 1).clamp(min=1) + eps).rsqrt()
    whitened = (x.double() - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened.float(), 0)
