"""Weighted cross-entropy straight from hidden states and the head's weight: PPO-ptx and SFT.

loss = sum_i w_i * -logp_i,    dloss/dlogp_i = -w_i
"""

import dataclasses

import torch

from gearshift.kernels import arguments
from gearshift.kernels.head.loss import linear_loss
from gearshift.kernels.head.projection import Head
from gearshift.kernels.head.scores import LogitMap


@dataclasses.dataclass(frozen=True)
class CrossEntropyRows:
    """The row loss as epilogue.py wants it; weights f32 [N]."""

    weights: torch.Tensor
    entropy_coef: float = 0.0

    def take(self, index: slice | torch.Tensor) -> "CrossEntropyRows":
        return CrossEntropyRows(self.weights[index])

    def terms(self, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per row: loss, dloss/dlogp, and nothing is ever clipped."""
        nothing = torch.zeros_like(logprobs, dtype=torch.bool)
        return -self.weights * logprobs, -self.weights, nothing


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """f32 scalar, with gradient to hidden, weight and bias.

    Arguments, memory, rows of weight 0 and errors as in linear_ppo_loss (ppo.py):
    token_ids in rows of weight 0 may be anything, -100 included.
    """
    logit_map = LogitMap.of(temperature, logit_softcap, logit_scale)
    head = Head.build(hidden, weight, bias, logit_map, max_logits_bytes, backend)
    arguments.check_tensor("weights", weights, hidden.shape[:1], hidden.device)
    arguments.check_token_ids(token_ids, len(hidden), hidden.device)
    rows = CrossEntropyRows(weights.detach().float())
    return linear_loss(hidden, token_ids, head, rows).loss
