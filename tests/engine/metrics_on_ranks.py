"""Run on ranks: each adds its own rows; every rank prints what it got as JSON lines, one per case.

torchrun --nproc-per-node W metrics_on_ranks.py
"""

import json
import time
from unittest import mock

import torch
import torch.distributed as dist

from gearshift.engine.metrics import StepMetrics


def measured(rank: int) -> StepMetrics:
    metrics = StepMetrics(torch.device("cpu"))
    rows = torch.tensor([[1.0, 2.0, torch.nan], [10.0, torch.nan, 4.0]])[rank]
    mask = ~rows.isnan()
    # In an order that is each rank's own.
    for name in ("first", "second")[:: 1 if rank == 0 else -1]:
        metrics.add_mean(name, rows + (name == "second"), mask)
    metrics.add_std("std", rows, mask)
    metrics.add_max("max", rows, mask)
    metrics.add_min("min", rows, mask)
    metrics.add_sum("sum", rows, mask)
    metrics.add_value("value", 3.0)
    with metrics.time("generate"):
        time.sleep(0.2 * rank)
    return metrics


def reduced(metrics: StepMetrics) -> dict:
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reductions:
        try:
            figures = metrics.reduce()
        except AssertionError as error:
            figures = {"refused": str(error)}
    return {"reductions": reductions.call_count} | figures


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    print(json.dumps(reduced(measured(rank))))
    different = measured(rank)
    if rank:
        different.add_mean("only here", torch.ones(1))
    print(json.dumps(reduced(different)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
