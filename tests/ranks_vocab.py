"""Three gloo ranks cut a vocabulary; each compares what it got with one rank and with float64.

ranks_vocab.py OUT BACKEND      writes OUT/rank<r>.jsonl, a line per case
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from gearshift.kernels import dispatch, ops
from tests.test_linear_ppo import Problem, relative

VOCAB = 1003
CUTS = {3: (400, 3, 600), 2: (600, 403)}
EDGES = (0, 399, 400, 402, 403, 599, 600, 1002)  # first and last tokens of all parts
FIVE_ROWS = {"max_logits_bytes": 5 * 640 * 4}  # of 600 columns, and 25 rows of 3
OBJECTIVES = {
    "plain": {},
    "bonus": {"entropy_coef": 0.2, "kl_loss_coef": 0.1, "dual_clip": 2.0},
    "k2": {"kl_loss_coef": 0.3, "kl_estimator": "k2"},
}
HEADS = {
    "": {},
    "biased": {"bias": True, "temperature": 0.7},
    "capped": {"bias": True, "logit_softcap": 4.0, "logit_scale": 2.0},
}
HOLES = {
    "no token in the middle part": (slice(400, 403), -torch.inf),
    "only the last part has tokens": (slice(0, 403), -torch.inf),
    "no token at all": (slice(None), -torch.inf),
    "one NaN": (slice(700, 701), torch.nan),
}
BACKENDS = ("torch", "triton") if dispatch.HAS_TRITON else ("torch",)


class Part:
    """This rank's part of a problem, and what an op makes of it."""

    def __init__(self, problem: Problem, group, *, backwards: bool = False):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = CUTS[ranks][::-1] if backwards else CUTS[ranks]
        place = ranks - 1 - rank if backwards else rank
        start = sum(sizes[:place])
        self.rows = slice(start, start + sizes[place])
        self.problem = problem
        self.options = {"group": group, "vocab_start": start if backwards else None}

    def cut(self, tensors) -> list[torch.Tensor]:
        """Hidden as it is, weight and bias as this rank holds them."""
        return [tensors[0], *(t[self.rows] for t in tensors[1:])]

    def leaves(self) -> list[torch.Tensor]:
        return [t.clone().requires_grad_() for t in self.cut(self.problem.tensors())]

    def run(self, **options):
        return self.problem.poisoned().run(self.leaves(), **self.options, **options)


def bits(*tensors: torch.Tensor) -> str:
    """What all ranks must have in common."""
    plain = (t.detach().float().numpy().tobytes() for t in tensors)
    return hashlib.sha256(b"".join(plain)).hexdigest()


def apart(found, expected) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def compare(part: Part, options: dict, objective: dict) -> dict:
    """Relative errors of the gradients against one rank and float64; absolute ones of the rows."""
    whole, gradients = part.problem.run(**options, **objective)
    exact_loss, exact = part.problem.reference(**objective)
    found, pieces = part.run(**options, **objective)
    return {
        "one_rank": max(map(relative, pieces, part.cut(gradients))),
        "float64": max(map(relative, pieces, part.cut(exact))),
        "loss": relative(found.loss.detach(), exact_loss),
        "rows": apart(found[1:3], whole[1:3]),
        "clipped": [int(found.clipped.sum()), int((found.clipped ^ whole.clipped).sum())],
        "bits": bits(*found, pieces[0]),
    }


def losses(groups: dict, options: dict):
    """(name, comparison) of the PPO loss."""
    for ranks, group in groups.items():
        for name, objective in OBJECTIVES.items():
            for head, values in HEADS.items():
                if head and (ranks == 2 or name == "k2"):
                    continue
                problem = Problem.random(12, VOCAB, head=values, ids=EDGES)
                part = Part(problem, group, backwards=name == "k2")
                yield f"{name}, {head}, {ranks} ranks", compare(part, options, objective)
    far = Problem.random(9, VOCAB, offset=-60.0, ids=EDGES)  # the anchored pass gives up
    far.columns["advantages"] = -far.columns["advantages"].abs()
    yield "far", compare(Part(far, groups[3]), options, OBJECTIVES["k2"])
    bf16 = Problem.random(9, VOCAB, torch.bfloat16, ids=EDGES)
    yield "bf16", compare(Part(bf16, groups[3]), options, {})


def others(group, options: dict):
    """(name, figures) of what is no comparison of a PPO loss with gradients."""
    problem = Problem.random(12, VOCAB, head={"bias": True}, ids=EDGES)
    part = Part(problem, group)
    found, pieces = part.run(**options)
    with torch.no_grad():
        quiet = part.problem.loss(part.leaves(), **part.options, **options)
    frozen = part.leaves()
    for leaf in frozen[1:]:
        leaf.requires_grad_(False)
    loss = problem.loss(frozen, **part.options, **options).loss
    (only,) = torch.autograd.grad(loss, frozen[:1])
    yield (
        "less is asked",
        {"quiet": apart(quiet[:3], found[:3]), "frozen": torch.equal(only, pieces[0])},
    )
    problem.columns["weights"].zero_()
    found, pieces = part.run(**options)
    zero = not any(t.count_nonzero() for t in (found.loss, *pieces))
    yield "all masked", {"zero": zero, "graph": found.loss.requires_grad}
    yield "cross-entropy", cross_entropy(part, options)
    problem.bias[403:] += 200.0  # the other parts weigh less than float32 can say
    yield "parts far apart", cross_entropy(part, options)
    for name, (column, value) in HOLES.items():
        yield name, scores(group, options, column, value)


def cross_entropy(part: Part, options: dict) -> dict:
    ids, weights = part.problem.token_ids, torch.linspace(-0.5, 1, 12)
    results = []
    for leaves, where in ((part.problem.leaves(), {}), (part.leaves(), part.options)):
        hidden, weight, bias = leaves
        loss = ops.linear_cross_entropy(hidden, weight, ids, weights, bias=bias, **where, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, leaves)))
    (whole, gradients), (loss, pieces) = results
    return {
        "loss": relative(loss, whole),
        "one_rank": max(map(relative, pieces, part.cut(gradients))),
        "bits": bits(loss, pieces[0]),
    }


def scores(group, options: dict, columns: slice, value: float) -> dict:
    """linear_logprob where the bias of some tokens is -inf or NaN, against one rank."""
    problem = Problem.random(9, VOCAB, head={"bias": True, "temperature": 0.8}, ids=EDGES)
    problem.bias[columns] = value
    part = Part(problem, group)
    both = []
    for tensors, where in ((problem.tensors(), {}), (part.cut(problem.tensors()), part.options)):
        hidden, weight, bias = tensors
        both.append(
            ops.linear_logprob(
                hidden, weight, problem.token_ids, bias=bias, temperature=0.8, **where, **options
            )
        )
    whole, found = both
    finite = [t.isfinite() for t in (*whole, *found)]
    close = [torch.allclose(a, b, atol=3e-6, equal_nan=True) for a, b in zip(*both, strict=True)]
    return {"close": all(close), "finite": [int(f.sum()) for f in finite], "bits": bits(*found)}


def refusals(group):
    """(name, message) of bad input: every rank must raise, none may wait for another."""
    rank = dist.get_rank()
    problem = Problem.random(9, VOCAB, ids=EDGES)
    part = Part(problem, group)
    budget = 4 * 512 if rank == 2 else 1 << 20
    hidden = problem.hidden[: 9 - rank]
    changes = {
        "gap": {"vocab_start": (0, 401, 403)[rank]},
        "one is silent": {"vocab_start": 0 if rank == 0 else None},
        "budget": {"max_logits_bytes": budget},
        "rows": {"hidden": hidden},
        "gradients": {"weight": part.cut(problem.tensors())[1].requires_grad_(rank == 1)},
    }
    for name, change in changes.items():
        call = dict(zip(("hidden", "weight"), part.cut(problem.tensors()), strict=True))
        call |= {"token_ids": problem.token_ids[: len(change.get("hidden", problem.hidden))]}
        call |= {"weights": torch.ones(len(call["token_ids"])), "group": group} | change
        try:
            ops.linear_cross_entropy(**call)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        yield f"refused: {name}", {"said": said}


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    groups = {3: dist.group.WORLD} | ({2: pair} if rank < 2 else {})
    with (out / f"rank{rank}.jsonl").open("w") as lines:
        for backend in BACKENDS:
            options = {"backend": backend, **FIVE_ROWS}
            cases = [*losses(groups, options), *others(groups[3], options)]
            for name, found in cases:
                lines.write(json.dumps({"case": name, "backend": backend, **found}) + "\n")
        for name, found in refusals(groups[3]):
            lines.write(json.dumps({"case": name, **found}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
