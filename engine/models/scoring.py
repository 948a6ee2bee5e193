"""Forwards without gradients over the micro-batches of a rollout."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.batch import Rollout
from gearshift.engine.cluster.progress import beat
from gearshift.kernels import ops


def pieces(rollout: Rollout, size: int) -> Iterator[tuple[int, Rollout]]:
    """(first row, trimmed piece) of micro-batches of `size` rows."""
    yield from zip(range(0, len(rollout), size), rollout.split(size), strict=True)


def forwards(engine: Any, inputs: Iterable[tuple]) -> Iterator[Any]:
    """engine(*each) in order; an engine that streams its weights takes all of them together."""
    together = getattr(engine, "together", None)
    if together:
        yield from together([partial(engine.module, *each) for each in inputs])
        return
    for each in inputs:
        yield engine(*each)
        beat()


@torch.no_grad()
def policy_logprobs(engine: Any, rollout: Rollout, batch_size: int, temperature: float) -> Tensor:
    """[B, R] float32 log-probs of the responses, in micro-batches of `batch_size` rows.

    engine: of a heads.Policy.
    """
    engine.eval()
    options = vars(engine.module.options) | {"temperature": temperature}

    def head(micro: Rollout) -> Callable:
        targets = micro.response_ids[micro.response_mask]
        return lambda hidden, weight, bias: ops.linear_logprob(
            hidden, weight, targets, bias=bias, **options
        )[0]

    parts = list(pieces(rollout, batch_size))
    inputs = [
        (micro.input_ids, micro.attention_mask, micro.response_mask, head(micro))
        for _, micro in parts
    ]
    result = torch.zeros_like(rollout.rollout_logprobs)
    for (start, micro), scored in zip(parts, forwards(engine, inputs), strict=True):
        live = micro.response_mask
        result[start : start + len(micro), : live.shape[1]].masked_scatter_(live, scored)
    return result
