"""A head whose vocabulary is cut over the ranks of a group: who holds what, and what they exchange.

Rank r holds the rows start_r .. start_r + V_r - 1 of the weight, hence those columns of the logits.
Hidden states, token ids and everything else about the rows are the same on all ranks. Per chunk:

    anchored pass    x_tok [C], then (S, t) [2,C]: two SUMs. The old log-prob stands where other
                     losses need a maximum over the vocabulary (anchored.py)
    scores           (peak, ln S, entropy, y_tok) [4,C] of every rank, gathered once. Sums that all
                     ranks could simply add would need the common peak first: a MAX and then a SUM,
                     two exchanges in a row where this is one
    dhidden [K,H]    one SUM, in fp32, of what each rank's part of the weight contributes

    d_r = gain (peak_r - peak) + ln S_r     peak = max_r peak_r     ln S = ln sum_r exp d_r
    q_r = exp(d_r - ln S)     entropy = sum_r q_r (entropy_r - ln q_r)      (its chain rule)

Every rank merges the same numbers in rank order, so all of them get the same bits: the rows that
are skipped, and the chunks that are done again, are the same everywhere.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist

from gearshift.kernels.logprob import FLOOR, LogitMap, Scores, score_torch_

LOWEST = -1e38  # stands for -inf where a shard holds nothing else: -inf - -inf would be NaN


@dataclasses.dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary: tokens start .. start + size - 1 of `vocab`.

    chunk_rows: rows that fit every rank's budget, since all must cut their chunks alike.
    """

    group: dist.ProcessGroup
    start: int
    size: int
    vocab: int
    chunk_rows: int

    @classmethod
    def of(
        cls, group: dist.ProcessGroup, vocab_start: int | None, weight: torch.Tensor, same: dict
    ) -> "Shard":
        """Exchanges what the ranks hold; waits for the device once.

        vocab_start None: parts lie in rank order. same: name -> integer that must agree between
        ranks, except "chunk_rows", of which the smallest counts. Raises ValueError, on all ranks,
        where parts leave gaps or overlap or something disagrees.
        """
        if dist.get_rank(group) < 0:
            raise ValueError("group: this process is not one of its ranks")
        start = -1 if vocab_start is None else vocab_start
        mine = torch.tensor([start, len(weight), *same.values()], device=weight.device)
        starts, sizes, *others = _gather(mine, group).T.tolist()
        columns = dict(zip(same, others, strict=True))
        chunk_rows = min(columns.pop("chunk_rows"))
        for name, values in columns.items():
            if len(set(values)) > 1:
                raise ValueError(f"{name}: {values} on the ranks of the group, must be the same")
        starts = _starts(starts, sizes)
        rank = dist.get_rank(group)
        return cls(group, starts[rank], sizes[rank], sum(sizes), chunk_rows)

    def local(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[C] int64: columns of the tokens in this rank's logits; -1 for those of other ranks."""
        ids = token_ids.long() - self.start
        return torch.where((ids >= 0) & (ids < self.size), ids, -1)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def target_logits(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """f32 [C]: the logit of each row's token, as it came, on every rank."""
        return self.sum_(_own_targets(logits, ids))

    def score_(
        self,
        score: Callable[..., Scores],
        logits: torch.Tensor,
        ids: torch.Tensor,
        logit_map: LogitMap,
        *,
        rescale: bool,
    ) -> Scores:
        """`score` of this rank's logits [C,V_r], merged over the ranks; `ids` as of `local`.

        score_torch_ turns the logits into exp(x - max x) with this rank's maximum; `rescale` makes
        that the maximum of all ranks.
        """
        targets = _own_targets(logits, ids)
        if score is score_torch_:
            logits.clamp_(min=LOWEST)
        local = score(logits, ids.clamp(min=0), logit_map)
        own = torch.stack([local.peak, local.log_sum, local.entropy, targets])
        scores = _merge(_gather(own, self.group), logit_map)
        if rescale and score is score_torch_:
            gap = (local.peak - scores.peak) * _peak_gain(logit_map)
            logits.mul_(gap.exp_()[:, None]).clamp_(min=torch.tensor(FLOOR).exp().item())
        return scores


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[ranks, *shape], in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


def _starts(starts: list[int], sizes: list[int]) -> list[int]:
    """First token of each rank; rank order where no rank gave one."""
    if all(start == -1 for start in starts):
        return [sum(sizes[:rank]) for rank in range(len(sizes))]
    end = 0
    for start, size in sorted(zip(starts, sizes, strict=True)):
        if start != end:
            raise ValueError(
                f"vocab_start: {starts} with {sizes} rows of weight on the ranks of the group must "
                "cover the vocabulary from 0 without gap or overlap (None on all: rank order)"
            )
        end += size
    return starts


def _own_targets(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    found = logits.gather(1, ids.clamp(min=0)[:, None])[:, 0]
    return torch.where(ids < 0, 0.0, found)


def _peak_gain(logit_map: LogitMap) -> float:
    """What a difference of peaks is multiplied with: those of a capped head are scaled already."""
    return logit_map.gain if logit_map.bound is None else 1.0


def _merge(parts: torch.Tensor, logit_map: LogitMap) -> Scores:
    """Scores of the whole row from [ranks, 4, C]: peak, ln S, entropy, y_tok or 0."""
    peaks, log_sums, entropies, targets = parts.unbind(1)
    target, gain = targets.sum(0), _peak_gain(logit_map)
    if logit_map.bound is not None:
        target = target.mul_(logit_map.gain).tanh_().mul_(logit_map.bound)
    peak = peaks.amax(0)
    peak = torch.where(peak <= LOWEST, torch.nan, peak)  # a row of nothing but -inf has no softmax
    sizes = (peaks - peak) * gain + log_sums
    log_sum = sizes.logsumexp(0)
    log_shares = sizes - log_sum
    shares = log_shares.exp()
    entropy = torch.where(shares == 0, 0.0, shares * (entropies - log_shares)).sum(0)
    return Scores((target - peak) * gain - log_sum, entropy, peak, log_sum)
