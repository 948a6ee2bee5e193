"""Forwards without gradients over the micro-batches of a rollout."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gearshift.engine import trace
from gearshift.engine.batch import Rollout
from gearshift.engine.cluster.progress import beat
from gearshift.engine.microbatch import Budget, pieces
from gearshift.engine.models.reading import lay_out_rollout
from gearshift.kernels import ops


def forwards(engine: Any, inputs: Iterable[tuple]) -> Iterator[Any]:
    """engine(*each) in order; an engine that streams its weights takes all of them together."""
    inputs = list(inputs)  # laying rows out waits for the device, so none is made between forwards
    together = getattr(engine, "together", None)
    if together:
        yield from together([partial(engine.module, *each) for each in inputs])
        return
    for each in trace.each("micro-batch", inputs):
        yield engine(*each)
        beat()


@torch.no_grad()
def policy_logprobs(engine: Any, rollout: Rollout, budget: Budget, temperature: float) -> Tensor:
    """[B, R] float32 log-probs of the responses; engine: of a heads.Policy."""
    engine.eval()
    options = vars(engine.module.options) | {"temperature": temperature}
    parts = pieces(rollout, budget)

    def inputs(micro: Rollout) -> tuple:
        reading, before, _ = lay_out_rollout(micro, packs=engine.module.packs)
        targets = micro.response_ids[micro.response_mask]

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return ops.linear_logprob(hidden, weight, targets, bias=bias, **options)[0]

        return reading, before, head

    made = torch.zeros_like(rollout.rollout_logprobs)
    scores = forwards(engine, (inputs(micro) for _, micro in parts))
    for (rows, micro), scored in zip(parts, scores, strict=True):
        put(made, rows, micro.response_mask, scored)
    return made


def put(into: Tensor, rows: Tensor, live: Tensor, values: Tensor) -> None:
    """Writes values [N] of the live tokens of a trimmed piece to where its rows are in [B, R]."""
    into[rows, : live.shape[1]] = torch.zeros_like(live, dtype=into.dtype).masked_scatter(
        live, values
    )
