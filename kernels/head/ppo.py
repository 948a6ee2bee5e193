"""The policy's loss straight from hidden states and the head's weight; never [N,V] logits.

GSPO's token factor is that of the whole sequence, which must be known before the gradient of its
first token is formed: its log-probs are taken first, by one more product of the head (2NVH
operations beside the 6NVH of a loss). The trunk runs once all the same.
"""

import dataclasses
from collections.abc import Sequence

import torch

from gearshift.kernels import arguments
from gearshift.kernels.head.logprob import scores_of
from gearshift.kernels.head.loss import PolicyLoss, linear_loss
from gearshift.kernels.head.policy import SAPO_TAU, Objective, PolicyRows, policy_loss_reference
from gearshift.kernels.head.projection import Head
from gearshift.kernels.head.scores import LogitMap, logprob_entropy_reference


def linear_ppo_reference(hidden, head: Head, token_ids, rows: PolicyRows) -> torch.Tensor:
    """The same loss in plain PyTorch, differentiable, with every logit in memory."""
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logprobs, entropy = logprob_entropy_reference(logits, token_ids, head.logit_map)
    return policy_loss_reference(logprobs, entropy, rows).sum()


def sequence_means(values: torch.Tensor, live: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[N]: each row gets the mean over the live rows of its sequence (0 where none is).

    values, live [N]; lengths [S] int64: rows of each sequence, end to end. The same whatever else
    is in the batch: each sequence is a row of a grid, summed in float64.
    """
    inside = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]
    grid = torch.zeros(inside.shape, dtype=torch.float64, device=values.device)

    def sums(of: torch.Tensor) -> torch.Tensor:
        return grid.masked_scatter(inside, of.double()).sum(1)

    means = sums(torch.where(live, values, 0)) / sums(live).clamp(min=1)
    return means.to(values.dtype).repeat_interleave(lengths)


def _with_sequences(rows: PolicyRows, hidden, token_ids, head, lengths) -> PolicyRows:
    """The rows with the mean log-ratio of their sequence: of its rows that have a weight."""
    if lengths is None:
        raise ValueError("sequence_lengths=None with policy_loss='gspo': pass the rows of each")
    lengths = torch.as_tensor(lengths, dtype=torch.int64, device=hidden.device)
    if lengths.dim() != 1 or int(lengths.sum()) != len(hidden):
        raise ValueError(
            f"sequence_lengths: expected [S], {len(hidden)} in all, got {list(lengths.shape)}, "
            f"{int(lengths.sum())} in all"
        )
    if not len(hidden):
        return dataclasses.replace(rows, sequence=torch.zeros_like(rows.weights))
    live = rows.weights != 0
    ids = token_ids[live]
    arguments.check_token_ids(ids, len(ids), hidden.device, vocab=len(head.weight))
    log_ratios = torch.zeros_like(rows.weights)
    log_ratios[live] = scores_of(hidden[live], ids, head).logprobs - rows.old_logprobs[live]
    return dataclasses.replace(rows, sequence=sequence_means(log_ratios, live, lengths))


def linear_ppo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    ref_logprobs: torch.Tensor | None = None,
    kl_loss_coef: float = 0.0,
    kl_estimator: str = "k3",
    policy_loss: str = "ppo",
    sequence_lengths: torch.Tensor | Sequence[int] | None = None,
    sapo_tau: tuple[float, float] = SAPO_TAU,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """sum_i weights_i * loss_i, with loss_i of `policy_loss` as written in policy.py.

    hidden [N,H] and weight [V,H], both fp32 or bf16 (fp16 without gradients); token_ids [N] int;
    old_logprobs, advantages, weights, ref_logprobs [N] float; bias [V]. Logits are
    cap(logit_scale * (hidden weight^T + bias)) / temperature with cap(z) = softcap * tanh(z /
    softcap), in fp32. `weights` carries mask, normaliser and any importance weight; rows of weight
    0 are dropped before the first GEMM: nothing in them is read (NaN is fine), their gradient is
    exactly 0 and their outputs read 0.

    For gspo, sequence_lengths [S] int says how many rows each sequence has, end to end; its ratio
    is over those of weight other than 0. sapo_tau: for A > 0, and otherwise.

    Only `loss` has a gradient, to hidden, weight and bias, formed here and only if autograd asks;
    one backward per call. `max_logits_bytes` bounds the chunk buffers (default 2 GiB on CUDA,
    64 MiB on the CPU). Raises ValueError naming the argument that is wrong.
    """
    logit_map = LogitMap.of(temperature, logit_softcap, logit_scale)
    head = Head.build(hidden, weight, bias, logit_map, max_logits_bytes, backend)
    objective = Objective(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        kl_loss_coef=kl_loss_coef,
        kl_estimator=kl_estimator,
        policy_loss=policy_loss,
        sapo_tau=sapo_tau,
    )
    if kl_loss_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs=None with kl_loss_coef={kl_loss_coef}: pass them")
    named = {"weights": weights, "old_logprobs": old_logprobs, "advantages": advantages}
    if ref_logprobs is not None:
        named["ref_logprobs"] = ref_logprobs
    for name, tensor in named.items():
        arguments.check_tensor(name, tensor, hidden.shape[:1], hidden.device)
    arguments.check_token_ids(token_ids, len(hidden), hidden.device)
    rows = PolicyRows(objective, *(tensor.detach().float() for tensor in named.values()))
    if policy_loss == "gspo":
        rows = _with_sequences(rows, hidden.detach(), token_ids, head, sequence_lengths)
    return linear_loss(hidden, token_ids, head, rows)
