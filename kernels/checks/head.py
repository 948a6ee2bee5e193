"""Cases of the ops that own the language-model head: fused losses and log-probs.

Logits have a spread of 3, so that rows differ in entropy; tokens are drawn from them. Old log-probs
lie at chosen distances from the new, never within 0.04 of where a clip begins: there the right
answers of float32 and of float64 may differ.
"""

import functools
import math
from typing import Any

import torch

from gearshift.kernels import ops
from gearshift.kernels.checks.case import TRUTH_ELEMENTS, Case, Size, Tensors
from gearshift.kernels.head.policy import Objective, PolicyRows, policy_loss_reference
from gearshift.kernels.head.scores import LogitMap, logprob_entropy_reference

SPREAD = 3.0
LOG_RATIOS = (-1.0, -0.1, 0.1, 0.5, 1.6)  # far from ln 0.8 = -0.22, ln 1.28 = 0.25, ln 3 = 1.10
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
KL = {"kl_loss_coef": 0.1, "dual_clip": 3.0}
BONUS = KL | {"entropy_coef": 0.01}
CAPPED = {"logit_softcap": 20.0, "logit_scale": 0.8, "temperature": 0.7}
GSPO = {"policy_loss": "gspo", "dual_clip": 3.0}
COLUMNS = ("weights", "old_logprobs", "advantages", "ref_logprobs")


def row_blocks(rows: int, vocab: int) -> list[slice]:
    """Slices of rows whose float64 logits fit a temporary."""
    step = max(1, TRUTH_ELEMENTS // vocab)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _draw(
    size: Size, dtype: torch.dtype, generator: torch.Generator, *, head, dead_rows, sequences=False
):
    """hidden [N,H], weight [V,H], bias [V] if the head has options, token_ids [N]; f32 [N] weights,
    old_logprobs, advantages, ref_logprobs; with `sequences` [S] int64 sequence_lengths."""
    n, device = size.rows, generator.device
    normal = functools.partial(torch.randn, generator=generator, device=device)
    inputs = {
        "hidden": normal(n, size.hidden).to(dtype),
        "weight": normal(size.vocab, size.hidden).mul_(SPREAD / math.sqrt(size.hidden)).to(dtype),
    }
    if head:
        inputs["bias"] = normal(size.vocab).to(dtype)
    inputs["token_ids"], logprobs = _sampled(inputs, head, generator)
    inputs["ref_logprobs"] = logprobs + 0.3 * normal(n)
    if size.plain:
        length = math.gcd(n, 1024)
        inputs["weights"] = torch.full((n,), 1 / n, device=device)
        inputs["old_logprobs"] = logprobs + 0.02 * normal(n)
        inputs["advantages"] = normal(n // length).repeat_interleave(length)
        if sequences:
            inputs["sequence_lengths"] = torch.full((n // length,), length, device=device)
        return inputs
    chosen = torch.randint(len(LOG_RATIOS), (n,), generator=generator, device=device)
    if sequences:  # tokens of one sequence lie about one distance
        lengths = inputs["sequence_lengths"] = _lengths(n, generator)
        chosen = chosen[: len(lengths)].repeat_interleave(lengths)
        logprobs = logprobs + 0.1 * (2 * torch.rand(n, generator=generator, device=device) - 1)
    inputs["old_logprobs"] = logprobs - torch.tensor(LOG_RATIOS, device=device)[chosen]
    inputs["advantages"] = normal(n)
    share = torch.rand(n, generator=generator, device=device)
    inputs["weights"] = (share + 0.1) / n
    if dead_rows:
        inputs["weights"][share < 0.3] = 0
        inputs["hidden"][share < 0.3] = float("nan")
        inputs["old_logprobs"][share < 0.3] = float("nan")
        inputs["token_ids"][share < 0.3] = -100
    return inputs


def _lengths(rows: int, generator: torch.Generator) -> torch.Tensor:
    """[S] int64, of 1 to 40 rows each, and as many as are left."""
    drawn = torch.randint(1, 41, (rows,), generator=generator, device=generator.device)
    ends = drawn.cumsum(0).clamp(max=rows)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    return lengths[lengths > 0]


def _sampled(inputs: Tensors, head: dict, generator: torch.Generator):
    """A token per row by the Gumbel-max trick, and its log-prob to the precision of the logits."""
    picked = []
    for rows in row_blocks(len(inputs["hidden"]), len(inputs["weight"])):
        logp = _mapped(inputs["hidden"][rows], inputs, head).log_softmax(1)
        race = torch.zeros_like(logp).exponential_(generator=generator)
        tokens = (logp - race.log_()).argmax(1)
        picked.append((tokens, logp.gather(1, tokens[:, None])[:, 0]))
    tokens, logprobs = zip(*picked, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _mapped(hidden: torch.Tensor, inputs: Tensors, head: dict) -> torch.Tensor:
    """What the softmax of a row is taken of, f32 [n,V]."""
    logits = (hidden @ inputs["weight"].t()).float()
    if "bias" in inputs:
        logits += inputs["bias"]
    gain, bound = _logit_map(head)
    return logits * gain if bound is None else (logits * gain).tanh() * bound


def _logit_map(head: dict) -> LogitMap:
    return LogitMap.of(
        head.get("temperature", 1.0), head.get("logit_softcap"), head.get("logit_scale", 1.0)
    )


def _scores_truth(hidden, token_ids, weight, bias, head):
    """Log-probs and entropy of some rows, from float64 leaves."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    return logprob_entropy_reference(logits, token_ids, _logit_map(head))


def _run_logprob(inputs: Tensors, size: Size, backend: str, *, head: dict) -> Tensors:
    logprobs, entropy = ops.linear_logprob(
        inputs["hidden"],
        inputs["weight"],
        inputs["token_ids"],
        bias=inputs.get("bias"),
        max_logits_bytes=size.logits_bytes,
        backend=backend,
        **head,
    )
    return {"logprobs": logprobs, "entropy": entropy}


def _truth_logprob(inputs: Tensors, outputs: Tensors, *, head: dict) -> Tensors:
    weight, bias = inputs["weight"].double(), inputs.get("bias")
    parts = [
        _scores_truth(inputs["hidden"][r].double(), inputs["token_ids"][r], weight, bias, head)
        for r in row_blocks(len(inputs["hidden"]), len(weight))
    ]
    logprobs, entropy = zip(*parts, strict=True)
    return {"logprobs": torch.cat(logprobs), "entropy": torch.cat(entropy)}


def _run_ppo(inputs: Tensors, size: Size, backend: str, *, head: dict, objective: dict) -> Tensors:
    options = {**{name: inputs[name] for name in COLUMNS}, **CLIP, **objective, **head}
    options["sequence_lengths"] = inputs.get("sequence_lengths")
    return _graded(ops.linear_ppo_loss, inputs, size, backend=backend, **options)


def _run_cross_entropy(inputs: Tensors, size: Size, backend: str) -> Tensors:
    weights = inputs["weights"]
    return _graded(ops.linear_cross_entropy, inputs, size, backend=backend, weights=weights)


def _graded(op, inputs: Tensors, size: Size, **options) -> Tensors:
    """What `op` returns, its loss detached, and the gradients of hidden, weight and bias."""
    names = ("hidden", "weight", "bias")
    leaves = {n: inputs[n].detach().requires_grad_() for n in names if n in inputs}
    limit = size.logits_bytes
    result = op(**leaves, token_ids=inputs["token_ids"], max_logits_bytes=limit, **options)
    found = {"loss": result} if isinstance(result, torch.Tensor) else result._asdict()
    gradients = torch.autograd.grad(found["loss"], list(leaves.values()))
    named = {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {**found, "loss": found["loss"].detach(), **named}


def _ppo_rows(logprobs, entropy, inputs: Tensors, live: torch.Tensor, *, objective: dict):
    """Losses of the rows `live`, and which of them the clip holds."""
    names = [*COLUMNS, "sequence"] if "sequence" in inputs else COLUMNS
    columns = (inputs[name][live].double() for name in names)
    rows = PolicyRows(Objective(**CLIP, **objective), *columns)
    ratio = (logprobs - rows.old_logprobs if rows.sequence is None else rows.sequence).exp()
    bounded = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    clipped = bounded * rows.advantages < ratio * rows.advantages
    if rows.objective.policy_loss in ("cispo", "dis"):
        clipped = bounded != ratio
    elif rows.objective.policy_loss == "sapo":
        clipped = torch.zeros_like(clipped)
    return policy_loss_reference(logprobs, entropy, rows), clipped


def _with_sequences(inputs: Tensors, head: dict) -> Tensors:
    """The inputs with the mean log-ratio [N] float64 of each row's sequence, a sequence after the
    other."""
    live = inputs["weights"] != 0
    rows = inputs | {name: inputs[name][live] for name in ("hidden", "token_ids")}
    ratios = torch.zeros(len(live), dtype=torch.float64, device=live.device)
    ratios[live] = _truth_logprob(rows, {}, head=head)["logprobs"]
    ratios[live] -= inputs["old_logprobs"][live].double()
    means, start = torch.zeros_like(ratios), 0
    for length in inputs["sequence_lengths"].tolist():
        own = slice(start, start + length)
        means[own], start = ratios[own][live[own]].mean(), start + length
    return inputs | {"sequence": means}


def _cross_entropy_rows(logprobs, entropy, inputs: Tensors, live: torch.Tensor):
    return -inputs["weights"][live].double() * logprobs, torch.zeros_like(live, dtype=torch.bool)


def _truth_loss(inputs: Tensors, outputs: Tensors, *, head: dict, rows_loss) -> Tensors:
    """Loss, row results and gradients by float64 autograd, a block of live rows at a time."""
    if "sequence_lengths" in inputs:
        inputs = _with_sequences(inputs, head)
    hidden = inputs["hidden"]
    shared = {n: inputs[n].double().requires_grad_() for n in ("weight", "bias") if n in inputs}
    truth = {f"d_{n}": torch.zeros_like(leaf) for n, leaf in shared.items()}
    truth["d_hidden"] = torch.zeros_like(hidden, dtype=torch.float64)
    truth["loss"] = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for name in ("logprobs", "entropy"):
        truth[name] = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    truth["clipped"] = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    every = inputs["weights"].nonzero()[:, 0]
    for block in row_blocks(len(every), len(inputs["weight"])):
        live = every[block]
        x = hidden[live].double().requires_grad_()
        scores = _scores_truth(
            x, inputs["token_ids"][live], shared["weight"], shared.get("bias"), head
        )
        losses, truth["clipped"][live] = rows_loss(*scores, inputs, live)
        gradients = torch.autograd.grad(losses.sum(), [x, *shared.values()])
        truth["d_hidden"][live] = gradients[0]
        for name, gradient in zip(shared, gradients[1:], strict=True):
            truth[f"d_{name}"] += gradient
        truth["loss"] += losses.sum().detach()
        truth["logprobs"][live], truth["entropy"][live] = (s.detach() for s in scores)
    return {name: truth[name] for name in outputs}


def _logprob_case(name: str, head: dict) -> Case:
    part = functools.partial
    draw = part(_draw, head=head, dead_rows=False)
    return Case(name, draw, part(_run_logprob, head=head), part(_truth_logprob, head=head))


def _ppo_case(name: str, head: dict, objective: dict) -> Case:
    part = functools.partial
    rows_loss = part(_ppo_rows, objective=objective)
    return Case(
        name,
        part(_draw, head=head, dead_rows=True, sequences=objective.get("policy_loss") == "gspo"),
        part(_run_ppo, head=head, objective=objective),
        part(_truth_loss, head=head, rows_loss=rows_loss),
    )


CASES = (
    _logprob_case("linear_logprob", {}),
    _logprob_case("linear_logprob.capped", CAPPED),
    _ppo_case("linear_ppo_loss", {}, {}),
    _ppo_case("linear_ppo_loss.kl", {}, KL),
    _ppo_case("linear_ppo_loss.bonus", {}, BONUS),
    _ppo_case("linear_ppo_loss.capped", CAPPED, {}),
    _ppo_case("linear_ppo_loss.gspo", {}, GSPO),
    *(_ppo_case(f"linear_ppo_loss.{n}", {}, {"policy_loss": n}) for n in ("cispo", "sapo", "dis")),
    Case(
        "linear_cross_entropy",
        functools.partial(_draw, head={}, dead_rows=True),
        _run_cross_entropy,
        functools.partial(_truth_loss, head={}, rows_loss=_cross_entropy_rows),
    ),
)
