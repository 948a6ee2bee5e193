"""One step's figures: sums kept on the device, reduced over all ranks once, by reduce().

Nothing here waits for the device before reduce(). The report_* functions name what a PPO step
reports, as the field does (as TRL where it has the figure).
"""

import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gearshift.engine import trace
from gearshift.engine.batch import Experience, Rollout
from gearshift.engine.cluster import distributed, progress
from gearshift.engine.microbatch import Budget
from gearshift.engine.objective import Correction

# Width of the reduction of maxima. Fixed, so that ranks with different keys meet in one collective
# of one size and are told apart there.
_MAXIMA = 256
_GB = 1e9
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_Sums = list[Tensor]  # float64 scalars, added over calls and ranks


class StepMetrics:
    """Every rank adds the same names, in any order; reduce() asserts it.

    Calls with one name add up, so the micro-batches of a step need no list. Masked entries are
    never read and may be NaN; a live NaN makes its metric NaN (in a maximum or minimum: infinite).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, _Sums] = {}
        self._finish: dict[str, Callable[..., Tensor]] = {}
        self._maxima: dict[str, Tensor] = {}
        self._minima: dict[str, Tensor] = {}
        self._values: dict[str, float] = {}
        self._memory_gb: dict[str, float] = {}
        self._spans: dict[str, list[_Span]] = {}

    def add_mean(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """sum(weights * values) / sum(weights); weights: a mask or factors, all 1 if not given."""
        live, weight = _live(values, weights)
        self._add(name, _mean, (weight * live).sum(), weight.sum())

    def add_sum(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """sum(weights * values)."""
        live, weight = _live(values, weights)
        self._add(name, _total, (weight * live).sum())

    def add_variance(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Weighted variance, dividing by sum(weights)."""
        live, weight = _live(values, weights)
        self._add(name, _variance, *_moments(live, weight))

    def add_std(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Root of the weighted variance."""
        live, weight = _live(values, weights)
        self._add(name, _std, *_moments(live, weight))

    def add_explained_variance(
        self, name: str, values: Tensor, returns: Tensor, mask: Tensor
    ) -> None:
        """1 - var(returns - values) / var(returns) over the mask; NaN for constant returns."""
        target, weight = _live(returns, mask)
        error, _ = _live(returns.detach() - values.detach(), mask)
        self._add(name, _explained, *_moments(target, weight), *_moments(error, weight))

    def add_max(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Largest live value; -inf where no rank has one."""
        found = _largest(values, mask)
        self._maxima[name] = torch.maximum(self._maxima.get(name, found), found)

    def add_min(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Smallest live value; inf where no rank has one."""
        found = _largest(-values, mask)
        self._minima[name] = torch.maximum(self._minima.get(name, found), found)

    def add_value(self, name: str, value: float) -> None:
        """A number that every rank already has; the last one given counts."""
        self._values[name] = float(value)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the seconds inside to timing_s/<name>, of which the slowest rank counts.

        On CUDA it is the time between two events of the current stream.
        """
        span = _Span(self.device)
        with trace.phase(name):
            yield
        span.stop()
        self._spans.setdefault(f"timing_s/{name}", []).append(span)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """time(), and the highest peak_memory() of any rank as memory_gb/<name>. Does not nest."""
        progress.enter(name)
        reset_peak_memory(self.device)
        with self.time(name):
            yield
        key = f"memory_gb/{name}"
        self._memory_gb[key] = max(self._memory_gb.get(key, 0.0), peak_memory(self.device))

    def reduce(self) -> dict[str, float]:
        """All figures over all ranks, by name. A collective: two reductions, whatever the names."""
        maxima = self._reduced_maxima()
        figures = self._values | maxima | self._reduced_sums()
        return dict(sorted(figures.items()))

    def _reduced_sums(self) -> dict[str, float]:
        names = sorted(self._sums)
        if not names:
            return {}
        sums = distributed.global_sum(torch.stack([s for name in names for s in self._sums[name]]))
        parts = sums.split([len(self._sums[name]) for name in names])
        finished = [self._finish[name](*part) for name, part in zip(names, parts, strict=True)]
        return dict(zip(names, torch.stack(finished).tolist(), strict=True))

    def _reduced_maxima(self) -> dict[str, float]:
        names = sorted(self._maxima) + sorted(self._minima)
        tensors = [self._maxima[n] for n in sorted(self._maxima)]
        tensors += [self._minima[n] for n in sorted(self._minima)]
        seconds = {name: sum(span.seconds() for span in s) for name, s in self._spans.items()}
        floats = dict(sorted((seconds | self._memory_gb).items()))
        names += floats
        assert len(names) + 2 <= _MAXIMA, "more maxima than their reduction has room for"

        row = torch.zeros(_MAXIMA, dtype=torch.float64, device=self.device)
        key = zlib.crc32("\n".join(self._names(names)).encode())  # 32 bits: exact in float64
        row[:2] = torch.tensor([key, -key], dtype=torch.float64)
        if tensors:
            # Collectives differ in what they make of NaN in a maximum; infinity they all keep.
            row[2 : 2 + len(tensors)] = torch.stack(tensors).nan_to_num(
                nan=torch.inf, posinf=torch.inf, neginf=-torch.inf
            )
        row[2 + len(tensors) : 2 + len(names)] = torch.tensor(
            list(floats.values()), dtype=torch.float64
        )
        largest, negative, *reduced = distributed.global_max(row).tolist()
        assert largest == -negative, f"ranks measured different metrics; here: {self._names(names)}"
        result = dict(zip(names, reduced, strict=False))
        return {n: -v if n in self._minima else v for n, v in result.items()}

    def _add(self, name: str, finish: Callable[..., Tensor], *parts: Tensor) -> None:
        assert self._finish.get(name, finish) is finish, f"{name} was added in two ways"
        self._finish[name] = finish
        before = self._sums.get(name)
        self._sums[name] = (
            [a + b for a, b in zip(before, parts, strict=True)] if before else list(parts)
        )

    def _names(self, maxima: list[str]) -> list[str]:
        sums = [f"{name} ({self._finish[name].__name__})" for name in sorted(self._sums)]
        return [*maxima, *sums, *sorted(self._values)]


def peak_memory(device: torch.device) -> float:
    """GB (1e9 bytes), the most since reset_peak_memory: allocated on CUDA, resident on CPU.

    Where the kernel lets nobody reset a process's peak (other than Linux, some sandboxes), the CPU
    figure is what is resident now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GB
    if not peak_can_be_reset():
        return psutil.Process().memory_info().rss / _GB
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / _GB


def reset_peak_memory(device: torch.device) -> None:
    """Starts the peak anew at what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif peak_can_be_reset():
        _CLEAR_REFS.write_text("5")  # proc(5): VmHWM becomes VmRSS


def peak_can_be_reset() -> bool:
    """Whether this process may start its own peak of resident memory anew."""
    return os.access(_CLEAR_REFS, os.W_OK)


class _Span:
    """Seconds between making and stop(), read only after the device has got there."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._begin = self._now()

    def _now(self) -> Any:  # a float, or a torch.cuda.Event
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._end = self._now()

    def seconds(self) -> float:
        if not self._cuda:
            return self._end - self._begin
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


def _live(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and weights in float64, values 0 where the weight is: 0 * NaN would be NaN."""
    values = values.detach().double()
    if weights is None:
        return values, torch.ones_like(values)
    weights = weights.detach().double()
    return torch.where(weights != 0, values, 0.0), weights


def _largest(values: Tensor, mask: Tensor | None) -> Tensor:
    values = values.detach().double()
    return (values if mask is None else torch.where(mask.bool(), values, -torch.inf)).amax()


def _moments(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight.sum(), (weight * values).sum(), (weight * values * values).sum()


def _total(total: Tensor) -> Tensor:
    return total


def _mean(total: Tensor, weight: Tensor) -> Tensor:
    return total / weight


def _variance(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return (second / weight - (first / weight) ** 2).clamp(min=0)


def _std(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return _variance(weight, first, second).sqrt()


def _explained(*moments: Tensor) -> Tensor:
    target, error = _variance(*moments[:3]), _variance(*moments[3:])
    # Sums of squares cancel: below this the returns are constant to rounding.
    rounding = 1e-12 * moments[2] / moments[0]
    return torch.where(target > rounding, 1 - error / target, torch.nan)


def report_experience(
    metrics: StepMetrics, experience: Experience, rewards: Tensor, kl: Tensor, *, critic: bool
) -> None:
    """Figures of a judged rollout; rewards and kl are [B, R], per token.

    objective/kl sums over a response's tokens and averages over responses, in nats.
    """
    mask = experience.response_mask
    total = rewards.sum(1)
    metrics.add_mean("objective/kl", kl.sum(1))
    metrics.add_std("objective/kl_std", kl.sum(1))
    metrics.add_mean("objective/kl_per_token", kl, mask)
    metrics.add_mean("objective/entropy", -experience.logprobs.sum(1))
    metrics.add_mean("objective/non_score_reward", total - experience.scores)
    metrics.add_mean("objective/rlhf_reward", total)
    if critic:
        metrics.add_explained_variance(
            "critic/vf_explained_var", experience.values, experience.returns, mask
        )


def report_rollout(
    metrics: StepMetrics, rollout: Rollout, scores: Tensor, by_name: dict[str, Tensor]
) -> None:
    """Figures of a scored rollout; scores [B] are as the rewards gave them."""
    lengths = rollout.lengths
    metrics.add_mean("objective/scores", scores)
    metrics.add_std("objective/scores_std", scores)
    for name, values in by_name.items():
        metrics.add_mean(f"rewards/{name}/mean", values)
    metrics.add_mean("response_length/mean", lengths)
    metrics.add_min("response_length/min", lengths)
    metrics.add_max("response_length/max", lengths)
    metrics.add_mean("response/finished_fraction", rollout.finished)
    metrics.add_sum("generated_tokens", lengths)
    metrics.add_sum("tokens", lengths + rollout.prompt_mask.sum(1))


def report_deferred(metrics: StepMetrics, rollout: Rollout, begun: int, stale_tokens: int) -> None:
    """rollout/deferred, responses that go on in the next step, and rollout/stale_fraction, the
    share of this step's response tokens that earlier policies drew."""
    drawn = rollout.lengths.sum().double()
    metrics.add_sum("rollout/deferred", torch.full_like(drawn, begun))
    metrics.add_mean("rollout/stale_fraction", stale_tokens / drawn, drawn)


def report_batches(metrics: StepMetrics, micros: Sequence[Experience], budget: Budget) -> None:
    """batch/padding_fraction, the share of what an update's forwards read that is padding, and
    batch/budget_used, the mean share of ppo.micro_batch_tokens that they fill (where only rows are
    limited, of ppo.micro_batch_size)."""
    for micro in micros:
        mask = micro.attention_mask
        live = mask.sum().double()
        read = live if budget.packed else torch.full_like(live, mask.numel())
        metrics.add_mean("batch/padding_fraction", 1 - live / read, read)
        rows = torch.full_like(live, len(micro))
        used = rows / (budget.rows or len(micro)) if budget.tokens is None else read / budget.tokens
        metrics.add_mean("batch/budget_used", used)


def report_correction(metrics: StepMetrics, correction: Correction, mask: Tensor) -> None:
    """rollout/<rule>: the share of tokens, or of responses, that each off-policy correction changed
    or removed, whatever the others did."""
    for name, removed in correction.tokens.items():
        metrics.add_mean(f"rollout/{name}", removed, mask)
    for name, removed in correction.responses.items():
        metrics.add_mean(f"rollout/{name}", removed)


def report_streams(metrics: StepMetrics, moved: dict[str, dict[str, float]]) -> None:
    """stream/<role>_ratio, bytes that came to the device over the least that scoring needs, and
    stream/<role>_gb, what one rank brought. Ranks bring equal parts."""
    for role, figures in moved.items():
        for name, value in figures.items():
            metrics.add_value(f"stream/{role}_{name}", value)


def report_policy(
    metrics: StepMetrics,
    micro: Experience,
    stats: dict[str, Tensor],
    weights: Tensor,
    *,
    first: bool,
) -> Tensor:
    """Figures of one actor micro-batch; stats are [N], of its live tokens.

    weights: [B, R], of the policy's loss. A token of weight 0, which a correction leaves out, has
    no log-prob in `stats` and counts in no figure.
    first: nothing has been updated since the rollout, so every ratio should be 1.
    Returns [sum of the tokens' KL(pi_old || pi), tokens] in float64.
    """
    counted = weights[micro.response_mask] != 0
    log_ratio = (stats["logprobs"] - micro.logprobs[micro.response_mask]).clamp(-20, 20)
    ratio = log_ratio.exp()
    kl = (ratio - 1 - log_ratio).double()  # k3 on samples of pi_old
    metrics.add_mean("policy/approxkl_avg", kl, counted)
    metrics.add_mean("policy/clipfrac_avg", stats["clipped"], counted)
    metrics.add_mean("policy/entropy_avg", stats["entropy"], counted)
    metrics.add_mean("val/ratio", ratio, counted)
    metrics.add_variance("val/ratio_var", ratio, counted)
    if first:
        metrics.add_max("rollout/ratio_first_max", (ratio - 1).abs(), counted)
    return torch.stack([kl[counted].sum(), counted.sum().double()])


def report_loss(metrics: StepMetrics, name: str, part: Tensor, pieces: int) -> None:
    """Mean over optimizer steps of a loss that is the sum of `pieces` micro-batches' parts on every
    rank; called with each part."""
    parts = pieces * distributed.world_size()
    metrics.add_mean(name, part * parts, part.new_tensor(1 / parts))


def add_throughput(figures: dict[str, float]) -> dict[str, float]:
    """The reduced figures of a step, with tokens per second over all ranks."""
    step, generate = figures["timing_s/step"], figures["timing_s/generate"]
    return figures | {
        "throughput/tokens_per_s": figures["tokens"] / step,
        "throughput/generated_tokens_per_s": figures["generated_tokens"] / generate,
    }


def report_states(metrics: StepMetrics, phase: str, held: dict[str, int]) -> None:
    """states_gb/<phase>: what actor and critic hold on the device at its end, of the rank that
    holds most. held: bytes by role and what they are, from the storages themselves."""
    size = torch.tensor(sum(held.values()) / _GB, device=metrics.device)
    metrics.add_max(f"states_gb/{phase}", size)
