"""Cases of the ops that work on logits, tokens or the cache: no head among their arguments."""

import functools
import math
from typing import Any

import torch

from gearshift.kernels import ops
from gearshift.kernels.checks.case import Case, Size, Tensors
from gearshift.kernels.checks.head import row_blocks
from gearshift.kernels.head.scores import LogitMap, logprob_entropy_reference
from gearshift.kernels.kl_gae import SCAN_BLOCK
from gearshift.kernels.sample import FRACTION_BITS, philox_uniform

TEMPERATURE = 0.8
GAE = {"kl_coef": 0.05, "gamma": 0.99, "lam": 0.95}
DECOUPLED = GAE | {"lam_critic": 1.0, "lam_length_alpha": 0.05}
VALUE_CLIP = 0.2
SAMPLERS = {
    "sample_tokens": {"temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0},
    "sample_tokens.top_p": {"temperature": TEMPERATURE, "top_k": 50, "top_p": 0.9},
    "sample_tokens.greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
}


def _logits(rows: int, vocab: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[rows, vocab] of spread 3, drawn a block at a time."""
    logits = torch.empty(rows, vocab, dtype=dtype, device=generator.device)
    for block in row_blocks(rows, vocab):
        part = torch.randn(logits[block].shape, generator=generator, device=generator.device)
        logits[block] = part.mul_(3)
    return logits


def _draw_logprob(size: Size, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    device = generator.device
    ids = torch.randint(size.vocab, (size.rows,), generator=generator, device=device)
    return {"logits": _logits(size.rows, size.vocab, dtype, generator), "token_ids": ids}


def _run_logprob(inputs: Tensors, size: Size, backend: str) -> Tensors:
    names = ("logprobs", "entropy")
    result = ops.logprob_entropy(**inputs, temperature=TEMPERATURE, backend=backend)
    return dict(zip(names, result, strict=True))


def _truth_logprob(inputs: Tensors, outputs: Tensors) -> Tensors:
    logits, ids = inputs["logits"], inputs["token_ids"]
    logit_map = LogitMap.of(TEMPERATURE)
    blocks = row_blocks(*logits.shape)
    parts = [logprob_entropy_reference(logits[b].double(), ids[b], logit_map) for b in blocks]
    logprobs, entropy = zip(*parts, strict=True)
    return {"logprobs": torch.cat(logprobs), "entropy": torch.cat(entropy)}


def _draw_grid(size: Size, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """[B,R] log-probs, values and a mask, [B] scores; NaN where the mask is false."""
    shape, device = (size.batch, size.response), generator.device
    normal = functools.partial(torch.randn, generator=generator, device=device)
    inputs = {"logprobs": normal(shape).mul_(0.3).sub_(2), "values": normal(shape)}
    inputs["ref_logprobs"] = inputs["logprobs"] + 0.1 * normal(shape)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    if not size.plain:
        mask = torch.rand(shape, generator=generator, device=device) < 0.9
        ends = torch.randint(size.response + 1, shape[:1], generator=generator, device=device)
        mask &= torch.arange(size.response, device=device) < ends[:, None]
        if size.response > SCAN_BLOCK:
            # Tokens on both sides of where the kernel's first block ends, and a hole right there.
            mask[::2, -SCAN_BLOCK - 1 : 2 - SCAN_BLOCK] = True
            mask[::2, -SCAN_BLOCK] = False
    inputs = {name: torch.where(mask, x, float("nan")) for name, x in inputs.items()}
    return inputs | {"mask": mask, "scores": normal(size.batch)}


def _run_gae(inputs: Tensors, size: Size, backend: str, *, options: dict) -> Tensors:
    return ops.kl_reward_gae(**inputs, **options, backend=backend)._asdict()


def _truth_gae(inputs: Tensors, outputs: Tensors, *, options: dict) -> Tensors:
    """One step of the recurrence after the other, from the last token to the first."""
    mask = inputs["mask"]
    logprobs, refs, values = (
        torch.where(mask, inputs[name], 0).double()
        for name in ("logprobs", "ref_logprobs", "values")
    )
    kl = logprobs - refs
    rewards, advantages, critics = -GAE["kl_coef"] * kl, torch.zeros_like(kl), torch.zeros_like(kl)
    following, next_value, running, critic = (torch.zeros_like(kl[:, 0]) for _ in range(4))
    scores = inputs["scores"].double()
    lam = torch.full_like(scores, options["lam"])
    if "lam_length_alpha" in options:
        lam = (1 - 1 / (options["lam_length_alpha"] * mask.sum(1).double())).clamp(min=0)
    lam_critic = options.get("lam_critic", lam)
    for t in reversed(range(mask.shape[1])):
        live = mask[:, t]
        rewards[:, t] += torch.where(live & (following == 0), scores, 0)
        delta = rewards[:, t] + GAE["gamma"] * next_value - values[:, t]
        running = torch.where(live, delta + GAE["gamma"] * lam * running, running)
        critic = torch.where(live, delta + GAE["gamma"] * lam_critic * critic, critic)
        advantages[:, t] = torch.where(live, running, 0)
        critics[:, t] = torch.where(live, critic, 0)
        next_value = torch.where(live, values[:, t], next_value)
        following = torch.where(live, 1.0, following)
    returns = torch.where(mask, critics + values, 0)
    return {"rewards": rewards, "advantages": advantages, "returns": returns, "kl": kl}


def _gae_case(name: str, options: dict) -> Case:
    run = functools.partial(_run_gae, options=options)
    return Case(name, _draw_grid, run, functools.partial(_truth_gae, options=options))


def _draw_whiten(size: Size, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    grid = _draw_grid(size, dtype, generator)
    return {"x": grid["values"] * 3 + 5, "mask": grid["mask"]}


def _run_whiten(inputs: Tensors, size: Size, backend: str) -> Tensors:
    return {"whitened": ops.whiten(**inputs)}


def _truth_whiten(inputs: Tensors, outputs: Tensors) -> Tensors:
    live = inputs["x"][inputs["mask"]].double()
    x = torch.where(inputs["mask"], inputs["x"], 0).double()
    whitened = (x - live.mean()) / (live.var() + 1e-8).sqrt()
    return {"whitened": torch.where(inputs["mask"], whitened, 0)}


def _draw_values(size: Size, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """f32 [N]; values move from the old ones by chosen steps, so that no clip is a near thing."""
    count, device = size.batch * size.response, generator.device
    normal = functools.partial(torch.randn, count, generator=generator, device=device)
    steps = torch.tensor([-0.5, -0.1, 0.05, 0.4], device=device)
    chosen = torch.randint(len(steps), (count,), generator=generator, device=device)
    old = normal()
    inputs = {"values": old + steps[chosen], "old_values": old, "returns": old + 3 * normal()}
    weights = torch.full((count,), 1 / count, device=device)
    if not size.plain:
        weights *= torch.rand(count, generator=generator, device=device) + 0.1
        weights[::3] = 0
        inputs["returns"][::3] = float("nan")
    return inputs | {"weights": weights}


def _run_values(inputs: Tensors, size: Size, backend: str) -> Tensors:
    values = inputs["values"].detach().requires_grad_()
    others = {name: x for name, x in inputs.items() if name != "values"}
    loss, clipped = ops.value_loss(values, **others, clip=VALUE_CLIP, backend=backend)
    (slope,) = torch.autograd.grad(loss, [values])
    return {"loss": loss.detach(), "clipped": clipped, "d_values": slope}


def _truth_values(inputs: Tensors, outputs: Tensors) -> Tensors:
    live = inputs["weights"] != 0
    values, old, returns, weights = (torch.where(live, x, 0).double() for x in inputs.values())
    values.requires_grad_()
    bounded = values.clamp(old - VALUE_CLIP, old + VALUE_CLIP)
    plain, other = (values - returns).square(), (bounded - returns).square()
    loss = (0.5 * weights * torch.maximum(plain, other)).sum()
    clipped = live & (other > plain)
    (slope,) = torch.autograd.grad(loss, [values])
    # Where the two squares are equal, autograd halves the slope between them; both have the same.
    slope = torch.where(clipped, 0, (weights * (values - returns)).detach())
    return {"loss": loss.detach(), "clipped": clipped, "d_values": slope}


def _draw_sample(size: Size, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    draw = functools.partial(torch.randint, generator=generator, device=generator.device)
    return {
        "logits": _logits(size.batch, size.vocab, dtype, generator),
        "seeds": draw(1 << 62, (size.batch,)),
        "positions": draw(1 << 20, (size.batch,)),
    }


def _run_sample(inputs: Tensors, size: Size, backend: str, *, options: dict) -> Tensors:
    tokens, logprobs = ops.sample_tokens(**inputs, **options, backend=backend)
    return {"token_ids": tokens, "logprobs": logprobs}


def _truth_sample(inputs: Tensors, outputs: Tensors, *, options: dict) -> Tensors:
    """Tokens by the definition in sample.py with float64 exponentials, whole-number sums and a full
    sort; log-probs of the tokens in the outputs ("drawn", where those are drawn in another way)."""
    logits, name = inputs["logits"], "token_ids" if "token_ids" in outputs else "drawn"
    chosen = outputs[name]
    uniform = philox_uniform(inputs["seeds"], inputs["positions"]) >> 1
    tokens, logprobs = [], []
    for block in row_blocks(*logits.shape):
        x = logits[block].double()
        logp = (x / (options["temperature"] or 1.0)).log_softmax(1)
        drawn = chosen[block, None].clamp(0, logits.shape[1] - 1)
        logprobs.append(logp.gather(1, drawn)[:, 0])
        if options["temperature"] == 0:
            tokens.append((x == x.amax(1, keepdim=True)).int().argmax(1))
        else:
            tokens.append(_inverse_cdf(x, logp, uniform[block], options))
    return {"token_ids": torch.cat(tokens), "logprobs": torch.cat(logprobs)}


def _inverse_cdf(x: torch.Tensor, logp: torch.Tensor, uniform: torch.Tensor, options: dict):
    weights = ((logp - logp.amax(1, keepdim=True)).exp() * 2.0**FRACTION_BITS).long()
    if 0 < options["top_k"] < x.shape[1]:
        floor = x.topk(options["top_k"], dim=1).values[:, -1:]
        weights = torch.where(x >= floor, weights, 0)
    if options["top_p"] < 1:
        heaviest, order = weights.sort(dim=1, descending=True)
        mass = heaviest.cumsum(1)
        share = math.ceil(options["top_p"] * 2**31)
        need = _times(mass[:, -1], [share] * len(mass)).clamp_(min=1)
        last = (mass < need[:, None]).sum(1, keepdim=True)
        floor = x.gather(1, order.gather(1, last))
        weights = torch.where(x >= floor, weights, 0)
    cumulative = weights.cumsum(1)
    target = _times(cumulative[:, -1], uniform.tolist())
    return (cumulative <= target[:, None]).sum(1)


def _times(totals: torch.Tensor, numerators: list[int]) -> torch.Tensor:
    """floor(total * numerator / 2^31) in Python's unbounded integers."""
    exact = [t * n >> 31 for t, n in zip(totals.tolist(), numerators, strict=True)]
    return torch.tensor(exact, device=totals.device)


def _sample_case(name: str) -> Case:
    options: dict[str, Any] = {"options": SAMPLERS[name]}
    run = functools.partial(_run_sample, **options)
    return Case(name, _draw_sample, run, functools.partial(_truth_sample, **options))


CASES = (
    Case("logprob_entropy", _draw_logprob, _run_logprob, _truth_logprob),
    _gae_case("kl_reward_gae", GAE),
    _gae_case("kl_reward_gae.decoupled", DECOUPLED),
    Case("whiten", _draw_whiten, _run_whiten, _truth_whiten),
    Case("value_loss", _draw_values, _run_values, _truth_values),
    *map(_sample_case, SAMPLERS),
)
