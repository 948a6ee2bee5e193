"""What other people would call instead, on the inputs of a check case.

A peer is a function of (inputs, size) that returns those outputs of the case it computes, under the
same names, so that its error is measured like ours. Libraries are imported when first called.
"""

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable

import torch
from torch.nn import functional

from gearshift.kernels.adamw import join_master, split_master
from gearshift.kernels.checks.case import Size, Tensors
from gearshift.kernels.checks.head import BONUS, CLIP
from gearshift.kernels.checks.optimizer import SETTINGS
from gearshift.kernels.checks.tokens import GAE, SAMPLERS, TEMPERATURE, VALUE_CLIP

Peer = Callable[[Tensors, Size], Tensors]

PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy", "cce_exact": "cut_cross_entropy"}


def missing(peer: str) -> str | None:
    """Why a peer cannot be tried here, or None."""
    package = PACKAGES.get(peer)
    if package and importlib.util.find_spec(package) is None:
        return "not installed"
    if peer == "torch_chunked" and not hasattr(functional, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    return None


def _graded(inputs: Tensors, outputs: Callable[[torch.Tensor, torch.Tensor], Tensors]) -> Tensors:
    """`outputs`(hidden, weight) has a "loss"; adds the gradients it gives to both."""
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
    found = outputs(*leaves)
    gradients = torch.autograd.grad(found["loss"], leaves)
    found = {name: tensor.detach() for name, tensor in found.items()}
    return found | dict(zip(("d_hidden", "d_weight"), gradients, strict=True))


def _scores(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the tokens and entropies, in float32 from logits of any dtype."""
    logp = logits.float().log_softmax(dim=-1)
    return logp.gather(1, token_ids[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


def _logprob_entropy(logits, token_ids):
    return _scores(logits / TEMPERATURE, token_ids)


def _linear_logprob(hidden, weight, token_ids):
    return _scores(hidden @ weight.t(), token_ids)


def _ppo(hidden, weight, token_ids, columns, objective):
    """Mean clipped loss of full logits; `columns`: weights, old, advantages, reference."""
    weights, old, advantages, refs = columns
    logprobs, entropy = _scores(hidden @ weight.t(), token_ids)
    ratio = (logprobs - old).exp()
    bounded = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    loss = -surrogate
    if objective:
        floor = torch.maximum(surrogate, objective["dual_clip"] * advantages)
        d = refs - logprobs
        loss = -torch.where(advantages < 0, floor, surrogate)
        loss = loss - objective["entropy_coef"] * entropy
        loss = loss + objective["kl_loss_coef"] * (d.exp() - 1 - d)
    return (weights * loss).sum(), logprobs, entropy


def _cross_entropy(hidden, weight, token_ids):
    return functional.cross_entropy((hidden @ weight.t()).float(), token_ids)


def _scored(function, inputs: Tensors, size: Size) -> Tensors:
    with torch.no_grad():
        return dict(zip(("logprobs", "entropy"), function(**inputs), strict=True))


def _head_scored(function, inputs: Tensors, size: Size) -> Tensors:
    names = ("hidden", "weight", "token_ids")
    return _scored(function, {name: inputs[name] for name in names}, size)


def _ppo_graded(objective, function, inputs: Tensors, size: Size) -> Tensors:
    names = ("weights", "old_logprobs", "advantages", "ref_logprobs")
    columns = tuple(inputs[name] for name in names)

    def outputs(hidden, weight):
        result = function(hidden, weight, inputs["token_ids"], columns, objective)
        return dict(zip(("loss", "logprobs", "entropy"), result, strict=True))

    return _graded(inputs, outputs)


def _loss_graded(function, inputs: Tensors, size: Size) -> Tensors:
    """`function`(hidden, weight, token_ids) is the mean cross-entropy."""
    return _graded(inputs, lambda h, w: {"loss": function(h, w, inputs["token_ids"])})


def _gae_loop(inputs: Tensors, size: Size) -> Tensors:
    """The loop over time that trainers write; every position live, as in plain inputs."""
    kl = inputs["logprobs"] - inputs["ref_logprobs"]
    rewards = -GAE["kl_coef"] * kl
    rewards[:, -1] += inputs["scores"]
    values, running = inputs["values"], torch.zeros_like(inputs["scores"])
    following, reversed_advantages = torch.zeros_like(running), []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAE["gamma"] * following - values[:, t]
        running = delta + GAE["gamma"] * GAE["lam"] * running
        reversed_advantages.append(running)
        following = values[:, t]
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    returns = advantages + values
    return {"rewards": rewards, "advantages": advantages, "returns": returns, "kl": kl}


def _whitened(x, mask):
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def _whiten(function, inputs: Tensors, size: Size) -> Tensors:
    return {"whitened": function(**inputs)}


def _clipped_values(values, old_values, returns, weights):
    bounded = values.clamp(old_values - VALUE_CLIP, old_values + VALUE_CLIP)
    plain, other = (values - returns).square(), (bounded - returns).square()
    return (0.5 * weights * torch.maximum(plain, other)).sum(), other > plain


def _value_loss(function, inputs: Tensors, size: Size) -> Tensors:
    values = inputs["values"].detach().requires_grad_()
    others = {name: tensor for name, tensor in inputs.items() if name != "values"}
    loss, clipped = function(values, **others)
    (slope,) = torch.autograd.grad(loss, [values])
    return {"loss": loss.detach(), "clipped": clipped, "d_values": slope}


def _multinomial(options: dict, inputs: Tensors, size: Size) -> Tensors:
    """Softmax and torch.multinomial, after the sort that top-p takes; draws other tokens than ours,
    so the log-probs of what it drew are what can be checked."""
    x = inputs["logits"].float() / (options["temperature"] or 1.0)
    logp = x.log_softmax(dim=-1)
    if options["temperature"] == 0:
        tokens = x.argmax(dim=-1, keepdim=True)
    else:
        tokens = torch.multinomial(_truncated(x, options).softmax(dim=-1), 1)
    return {"drawn": tokens[:, 0], "logprobs": logp.gather(1, tokens)[:, 0]}


def _truncated(x: torch.Tensor, options: dict) -> torch.Tensor:
    if options["top_k"]:
        x = x.masked_fill(x < x.topk(options["top_k"]).values[:, -1:], -math.inf)
    if options["top_p"] < 1:
        ordered, order = x.sort(dim=-1)
        cut = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - options["top_p"]
        cut[:, -1] = False
        x = x.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)
    return x


def _gathered_attention(inputs: Tensors, size: Size) -> Tensors:
    """Copies every sequence's blocks together and calls PyTorch's fused attention."""
    tables = inputs["block_tables"].long()
    keys, values = (
        inputs[name][tables].flatten(1, 2).transpose(1, 2) for name in ("key_cache", "value_cache")
    )
    position = torch.arange(keys.shape[2], device=keys.device)
    live = (position < inputs["lengths"][:, None])[:, None, None]
    out = functional.scaled_dot_product_attention(
        inputs["query"][:, :, None], keys, values, attn_mask=live, enable_gqa=True
    )
    return {"out": out[:, :, 0]}


def _torch_chunked(hidden, weight, token_ids):
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(hidden, weight, token_ids, options=options)


def _liger_cross_entropy(hidden, weight, token_ids):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, token_ids, accum_dtype=torch.float32)


def _liger_ppo(inputs: Tensors, size: Size) -> Tensors:
    """Liger's fused GRPO loss without a KL term is the clipped loss; it takes one advantage per
    sequence, which plain inputs have, and averages over tokens ("bnpo")."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    length = math.gcd(size.rows, 1024)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=CLIP["clip_low"],
        epsilon_high=CLIP["clip_high"],
        loss_type="bnpo",
    )
    ids = inputs["token_ids"].view(-1, length)
    old = inputs["old_logprobs"].view(-1, length)
    advantages = inputs["advantages"].view(-1, length)[:, 0].contiguous()

    def outputs(hidden, weight):
        grid = hidden.view(-1, length, size.hidden)
        mask = torch.ones_like(old)
        found, _ = loss(grid, weight, ids, mask, advantages, old_per_token_logps=old)
        return {"loss": found}

    return _graded(inputs, outputs)


def _cce(exact: bool, hidden, weight, token_ids):
    """Apple's cut cross-entropy; exact: no gradient is dropped, sums in float32 where it can."""
    from cut_cross_entropy import linear_cross_entropy

    options = {}
    if exact:
        known = inspect.signature(linear_cross_entropy).parameters
        options = {"filter_eps": None} | {
            name: True for name in ("accum_e_fp32", "accum_c_fp32") if name in known
        }
    return linear_cross_entropy(hidden, weight, token_ids, impl="cce", **options)


def _adamw(inputs: Tensors, size: Size) -> Tensors:
    """The step in plain PyTorch on a float32 master that is put together and split again."""
    lr, beta1, beta2, eps, decay, step = SETTINGS.values()
    grad = inputs["grad"].float()
    master = join_master(inputs["weight"], inputs["low"])
    first = beta1 * inputs["exp_avg"].float() + (1 - beta1) * grad
    second = beta2 * inputs["exp_avg_sq"].float() + (1 - beta2) * grad.square()
    root = (second / (1 - beta2**step)).sqrt() + eps
    master = (1 - lr * decay) * master - lr / (1 - beta1**step) * first / root
    found = {"master": join_master(*split_master(master)), "exp_avg": first, "exp_avg_sq": second}
    return {name: value[:, None] for name, value in found.items()}


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def compiled(function: Callable) -> Callable:
    """`function` by torch.compile, which takes seconds to import, once it is called."""
    return lambda *args, **kwargs: _compiled(function)(*args, **kwargs)


# By case: how a function is called on its inputs, and that function in plain PyTorch.
PLAIN = {
    "linear_logprob": (_head_scored, _linear_logprob),
    "linear_ppo_loss": (functools.partial(_ppo_graded, {}), _ppo),
    "linear_ppo_loss.bonus": (functools.partial(_ppo_graded, BONUS), _ppo),
    "linear_cross_entropy": (_loss_graded, _cross_entropy),
    "logprob_entropy": (_scored, _logprob_entropy),
    "whiten": (_whiten, _whitened),
    "value_loss": (_value_loss, _clipped_values),
}
# What torch.compile does not take, or gains nothing from.
EAGER: dict[str, Peer] = {
    "kl_reward_gae": _gae_loop,
    "paged_attention": _gathered_attention,
    "adamw_split_step.fp32": _adamw,
    "adamw_split_step.bf16": _adamw,
} | {name: functools.partial(_multinomial, options) for name, options in SAMPLERS.items()}
LIBRARIES: dict[str, dict[str, Peer]] = {
    "linear_ppo_loss": {"liger": _liger_ppo},
    "linear_cross_entropy": {
        "torch_chunked": functools.partial(_loss_graded, _torch_chunked),
        "liger": functools.partial(_loss_graded, _liger_cross_entropy),
        "cce": functools.partial(_loss_graded, functools.partial(_cce, False)),
        "cce_exact": functools.partial(_loss_graded, functools.partial(_cce, True)),
    },
}


def peers_of(case: str) -> dict[str, Peer]:
    """The peers of a case by name: eager first. None is called, and none is known to work here."""
    found: dict[str, Peer] = {"eager": EAGER[case]} if case in EAGER else {}
    if case in PLAIN:
        call, function = PLAIN[case]
        found = {
            name: functools.partial(call, f)
            for name, f in (("eager", function), ("compile", compiled(function)))
        }
    return found | LIBRARIES.get(case, {})


PEER_NAMES = ("eager", "compile", "torch_chunked", *PACKAGES)
