"""What it takes to believe an op: fresh inputs, poisoned outputs, the truth in float64, a limit.

A Case draws inputs, runs the op and computes what it should have given with the plain PyTorch
formula in float64. It serves the check at start-up, `gearshift bench kernels` (no speed is printed
of an op that failed) and `make gpu-check`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch

Tensors = dict[str, torch.Tensor]
Truths = dict[str, "torch.Tensor | Blocked"]

TRUTH_ELEMENTS = 1 << 26  # of a float64 temporary: 512 MiB
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 2e-4}
MISMATCHES = 5e-3  # share of unequal integers and booleans: a last bit may move a draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the inputs are.

    rows, hidden, vocab: N, H, V of a head. batch, response: B and R of per-token ops; B is also the
    rows of the sampler and the sequences of attention. heads: query heads, key-value heads, head
    size; context: longest cached sequence. logits_bytes: max_logits_bytes of the head ops. plain:
    inputs as peers take them (no masked rows, equal weights, one advantage per sequence), of which
    nothing is clipped or skipped; otherwise everything an op must cope with.
    """

    rows: int
    hidden: int
    vocab: int
    batch: int
    response: int
    heads: tuple[int, int, int] = (14, 2, 64)
    context: int = 1024
    logits_bytes: int | None = None
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class Blocked:
    """A truth [rows, 1] that is too large to hold: block(slice) computes rows of it when read."""

    rows: int
    block: Callable[[slice], torch.Tensor]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """draw(size, dtype, generator) -> inputs on the generator's device; run(inputs, size, backend)
    -> every output and gradient; truth(inputs, outputs) -> the same in float64 (`outputs` decides
    only what was asked at random). `op` is the public name; `name` adds the variant."""

    name: str
    draw: Callable[[Size, torch.dtype, torch.Generator], Tensors]
    run: Callable[[Tensors, Size, str], Tensors]
    truth: Callable[[Tensors, Tensors], Truths]

    @property
    def op(self) -> str:
        return self.name.partition(".")[0]


def verify(
    case: Case, size: Size, dtype: torch.dtype, generator: torch.Generator, backend: str
) -> tuple[dict[str, float], str | None]:
    """Runs `case` on fresh inputs; returns the error of each output, and what is wrong (or None).

    Masked rows hold NaN, and so does every buffer that the op allocates, until it is written.
    """
    inputs = case.draw(size, dtype, generator)
    with poisoned():
        outputs = case.run(inputs, size, backend)
    truth = case.truth(inputs, outputs)
    assert outputs.keys() == truth.keys(), f"{case.name}: {outputs.keys()} and {truth.keys()}"
    errors = errors_of(outputs, truth)
    return errors, complaint(outputs, errors)


def errors_of(outputs: Tensors, truth: Truths) -> dict[str, float]:
    """The error of every output that `truth` knows."""
    return {name: error(value, truth[name]) for name, value in outputs.items() if name in truth}


def complaint(outputs: Tensors, errors: dict[str, float], limit: float | None = None) -> str | None:
    """Names the first output whose error is above `limit` (None: that of its dtype)."""
    for name, found in errors.items():
        allowed = LIMITS.get(outputs[name].dtype, MISMATCHES) if limit is None else limit
        if not found <= allowed:
            return f"{name} is off by {found:.2g} (limit {allowed:.2g})"
    return None


def error(found: torch.Tensor, truth: torch.Tensor | Blocked) -> float:
    """The largest error of a row; infinite where shapes differ or a number is missing.

    Floats: |found_i - truth_i| / (|truth_i| + rms |truth|) over rows i, Euclidean norms; the rms
    keeps rows near 0 from counting for more than they weigh. Others: the share that differs.
    """
    if found.shape != truth.shape:
        return float("inf")
    if not found.is_floating_point():
        return (found != truth).double().mean().item()
    found = found.reshape(len(found) if found.ndim else 1, -1)
    read = truth.block if isinstance(truth, Blocked) else truth.reshape(found.shape).__getitem__
    step = max(1, TRUTH_ELEMENTS // max(1, found.shape[1]))
    blocks = [slice(start, start + step) for start in range(0, len(found), step)]
    squares = sum(read(rows).double().norm().square().item() for rows in blocks)
    rms = (squares / max(1, len(found))) ** 0.5
    worst = 0.0
    for rows in blocks:
        found_worst = _worst(found[rows].double(), read(rows).double(), rms)
        if found_worst != found_worst:
            return float("inf")
        worst = max(worst, found_worst)
    return worst


def _worst(found: torch.Tensor, truth: torch.Tensor, rms: float) -> float:
    gap = (found - truth).norm(dim=1)
    return torch.where(gap == 0, 0.0, gap / (truth.norm(dim=1) + rms)).max().item()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Whatever is allocated without a value holds NaN (integers: 77), never a lucky zero."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        return allocated

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield
