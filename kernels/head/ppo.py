"""The clipped PPO loss straight from hidden states and the head's weight; never [N,V] logits."""

import torch

from gearshift.kernels import arguments
from gearshift.kernels.head.loss import PolicyLoss, linear_loss
from gearshift.kernels.head.policy import Objective, PolicyRows, policy_loss_reference
from gearshift.kernels.head.projection import Head
from gearshift.kernels.head.scores import LogitMap, logprob_entropy_reference


def linear_ppo_reference(hidden, head: Head, token_ids, rows: PolicyRows) -> torch.Tensor:
    """The same loss in plain PyTorch, differentiable, with every logit in memory."""
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logprobs, entropy = logprob_entropy_reference(logits, token_ids, head.logit_map)
    return policy_loss_reference(logprobs, entropy, rows).sum()


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
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """sum_i weights_i * loss_i, with loss_i as written in policy.py.

    hidden [N,H] and weight [V,H], both fp32 or bf16 (fp16 without gradients); token_ids [N] int;
    old_logprobs, advantages, weights, ref_logprobs [N] float; bias [V]. Logits are
    cap(logit_scale * (hidden weight^T + bias)) / temperature with cap(z) = softcap * tanh(z /
    softcap), in fp32. `weights` carries mask, normaliser and any importance weight; rows of weight
    0 are dropped before the first GEMM: nothing in them is read (NaN is fine), their gradient is
    exactly 0 and their outputs read 0.

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
    )
    if kl_loss_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs=None with kl_loss_coef={kl_loss_coef}: pass them")
    named = {"weights": weights, "old_logprobs": old_logprobs, "advantages": advantages}
    if ref_logprobs is not None:
        named["ref_logprobs"] = ref_logprobs
    for name, tensor in named.items():
        arguments.check_vector(name, tensor, len(hidden), hidden.device)
    arguments.check_token_ids(token_ids, len(hidden), hidden.device)
    rows = PolicyRows(objective, *(tensor.detach().float() for tensor in named.values()))
    return linear_loss(hidden, token_ids, head, rows)
