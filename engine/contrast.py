"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): groups that teach.

A group is the samples of one prompt; where all of them score alike it has no contrast, and with a
baseline of the group no gradient. Such groups are replaced by those of new prompts.

P prompts on this rank, S samples of each; rows are sample-major: row k * P + p.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gearshift.engine.batch import PromptBatch, Rollout, joined
from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import PPOConfig
from gearshift.engine.data.streams import Redrawn
from gearshift.engine.metrics import StepMetrics
from gearshift.engine.rewards.total import Scores

# (slots, attempt) -> new prompts; see PromptStream.redraw.
Redraw = Callable[[Sequence[int], int], Redrawn]


def flat(judged: Scores, config: PPOConfig) -> Tensor:
    """[P] bool: groups whose scores differ by rounding only."""
    by = config.dynamic_sampling_by
    scores = judged.total if by is None else judged.by_name[by]
    grouped = scores.view(config.samples_per_prompt, -1)
    return grouped.amax(0) - grouped.amin(0) <= 1e-6 * grouped.abs().amax(0)


def with_contrast(
    rollout: Rollout,
    judged: Scores,
    metrics: StepMetrics,
    *,
    config: PPOConfig,
    redraw: Redraw,
    sample: Callable[[PromptBatch], tuple[Rollout, Scores]],
) -> tuple[Rollout, Scores]:
    """The rollout with flat groups replaced, as far as `dynamic_sampling` attempts reach.

    A collective; what is drawn depends on no world size. sample: answers new prompts and scores
    the answers. A group that is replaced passes its row ids on: the place in the step is kept.
    """
    rank, world = distributed.rank(), distributed.world_size()
    generated, counts, attempt = rollout.lengths.sum(), list[int](), 0
    while True:
        own = flat(judged, config).nonzero()[:, 0].tolist()
        gathered = distributed.all_gather_objects([rank + p * world for p in own])
        slots = sorted(slot for theirs in gathered for slot in theirs)
        counts.append(len(slots))
        if not slots or attempt == config.dynamic_sampling:
            break
        attempt += 1
        new = redraw(slots, attempt)
        fresh, scored = sample(new.prompts)
        asked = fresh.lengths.view(config.samples_per_prompt, -1)[:, : len(new.slots)]
        generated = generated + asked.sum()  # without those that only fill up
        good = (~flat(scored, config)).tolist()
        places = [(slot // world, i) for i, slot in enumerate(new.slots) if good[i]]
        samples = config.samples_per_prompt
        rollout, judged = _replaced(rollout, judged, fresh, scored, places, samples)
    metrics.add_value("dynamic_sampling/flat_groups", counts[0])
    metrics.add_value("dynamic_sampling/flat_groups_left", counts[-1])
    metrics.add_value("dynamic_sampling/prompts_redrawn", sum(counts[:attempt]))
    metrics.add_value("dynamic_sampling/attempts", attempt)
    metrics.add_sum("generated_tokens", generated - rollout.lengths.sum())  # what was dropped
    return rollout, judged


def _replaced(
    rollout: Rollout,
    judged: Scores,
    fresh: Rollout,
    scored: Scores,
    places: list[tuple[int, int]],
    samples: int,
) -> tuple[Rollout, Scores]:
    """places: (group of `rollout`, group of `fresh` that takes its place)."""
    device, count = rollout.response_ids.device, len(rollout)
    index = torch.arange(count, device=device).view(samples, -1)
    others = torch.arange(count, count + len(fresh), device=device).view(samples, -1)
    for old, new in places:
        index[:, old] = others[:, new]
    both = joined(rollout, fresh)
    picked = both.rows(index.flatten()).tensors() | {"row_ids": rollout.row_ids}
    return Rollout(**picked), _picked(judged, scored, index.flatten(), both.response_ids.shape[1])


def _picked(first: Scores, second: Scores, index: Tensor, width: int) -> Scores:
    """Of the rows of both, one below the other, those of `index`. width: of the responses."""

    def pick(one: Tensor, two: Tensor) -> Tensor:
        return torch.cat([one, two])[index]

    by_token = None
    if first.by_token is not None or second.by_token is not None:
        parts = [
            torch.zeros(len(s.total), width, device=index.device)
            if s.by_token is None
            else pad(s.by_token, (0, width - s.by_token.shape[1]))
            for s in (first, second)
        ]
        by_token = pick(*parts)
    return Scores(
        total=pick(first.total, second.total),
        by_name={name: pick(own, second.by_name[name]) for name, own in first.by_name.items()},
        teaches=pick(first.teaches, second.teaches),
        failed=first.failed + second.failed,
        fault=first.fault or second.fault,
        usable=first.usable and second.usable,
        by_token=by_token,
    )
