"""Log-probs and entropies straight from hidden states and the head's weight: scoring passes."""

import torch

from gearshift.kernels import arguments
from gearshift.kernels.head.projection import Head
from gearshift.kernels.head.scores import LogitMap, Scores


@torch.no_grad()
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `token_ids` [N] and entropy, f32 [N] in nats, without gradient.

    hidden [N,H] and weight [V,H], both fp32, bf16 or fp16; head options, fp32 logits, chunks and
    errors as in linear_ppo_loss (ppo.py). Every row is computed, so every id must be valid.
    """
    logit_map = LogitMap.of(temperature, logit_softcap, logit_scale)
    head = Head.build(hidden, weight, bias, logit_map, max_logits_bytes, backend)
    arguments.check_token_ids(token_ids, len(hidden), hidden.device, vocab=len(weight))
    scores = scores_of(hidden, token_ids, head)
    return scores.logprobs, scores.entropy


@torch.no_grad()
def scores_of(hidden: torch.Tensor, token_ids: torch.Tensor, head: Head) -> Scores:
    """Scores of all rows, a chunk of logits at a time; arguments are checked by the caller."""
    rows = len(hidden)
    scores = Scores(*torch.empty(4, rows, dtype=torch.float32, device=hidden.device))
    chunks = head.chunks(rows)
    logits = head.buffer(chunks[0].stop if chunks else 0, torch.float32)
    for chunk in chunks:
        x = head.operand(hidden[chunk])
        z = logits[: len(x)]
        head.logits_into(x, z)
        part = head.score_(z, token_ids[chunk])
        for whole, piece in zip(scores, part, strict=True):
            whole[chunk] = piece
    return scores
