"""What both ways to generate share: the request, the draw of a token and the end of a response."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.config.schema import SamplingConfig
from gearshift.engine.rollout.context import positions
from gearshift.kernels import ops


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response."""

    token_ids: list[int]  # with the end token, if there is one
    logprobs: list[float]  # of the temperature-scaled distribution, before top-k and top-p
    finished: bool  # ended by an end token or a stop string, not by length


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts to complete, checked: one seed and one longest length per prompt."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    seeds: list[int]
    limits: list[int] = field(default_factory=list)  # empty: sampling.max_new_tokens for all

    def __post_init__(self):
        if not self.limits:
            object.__setattr__(self, "limits", [self.sampling.max_new_tokens] * len(self.prompts))
        for name in ("seeds", "limits"):
            if len(getattr(self, name)) != len(self.prompts):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {len(self.prompts)} "
                    "prompts: give one each"
                )
        for index, (prompt, limit) in enumerate(zip(self.prompts, self.limits, strict=True)):
            if not prompt:
                raise ValueError(f"prompts[{index}] is empty: start it with at least one token")
            if limit < 1:
                raise ValueError(f"limits[{index}]={limit}: must be at least 1")

    def check_context(self, module: nn.Module) -> None:
        """Raises ValueError if a prompt and its response may exceed the model's positions."""
        limit = positions(module.config)
        if limit is None:
            return
        for index, (prompt, new) in enumerate(zip(self.prompts, self.limits, strict=True)):
            if len(prompt) + new > limit:
                raise ValueError(
                    f"sampling.max_new_tokens={new}: prompt {index} has {len(prompt)} tokens and "
                    f"the model {limit} positions; lower it to {limit - len(prompt)} or shorten "
                    "data.max_prompt_tokens"
                )


class Ending:
    """Decides when a response is over.

    stop strings are searched in the decoded last tokens, as many as the longest one has bytes:
    every token stands for at least one.
    """

    def __init__(self, sampling: SamplingConfig, eos_token_ids: list[int], tokenizer=None):
        if sampling.stop and tokenizer is None:
            raise ValueError(f"sampling.stop={sampling.stop}: stop strings need a tokenizer")
        self._eos, self._stop, self._tokenizer = frozenset(eos_token_ids), sampling.stop, tokenizer
        self._tail = 4 + max((len(text.encode()) for text in sampling.stop), default=0)

    def reached(self, tokens: list[int], length: int) -> bool:
        """Whether the last of `tokens` ends the response, which is the last `length` of them."""
        if tokens[-1] in self._eos:
            return True
        if not self._stop:
            return False
        tail = tokens[-min(self._tail, length) :]
        text = self._tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in self._stop)


def draw(
    logits: Tensor,
    sampling: SamplingConfig,
    seeds: list[int],
    positions: list[int],
    group: dist.ProcessGroup | None = None,
) -> tuple[list[int], list[float]]:
    """Token ids and log-probs, one per row of logits [S, V]; see draw_packed."""
    seed, position = (torch.tensor(numbers, device=logits.device) for numbers in (seeds, positions))
    token_ids, bits = draw_packed(logits, sampling, seed, position, group).cpu()
    return token_ids.tolist(), bits.to(torch.int32).view(torch.float32).tolist()


def draw_packed(
    logits: Tensor,
    sampling: SamplingConfig,
    seeds: Tensor,
    positions: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Samples one token per row of logits [S, V]; the same on every rank of `group`.

    Returns [2, S] int64: token ids, and the bits of their fp32 log-probs. Rank 0 of the group
    samples and broadcasts: logits that differ in their last bit between ranks would otherwise let
    the ranks' schedules part, and hang. Other ranks' logits are not read.
    """
    alone = group is None or dist.get_world_size(group) == 1
    packed = torch.empty(2, len(seeds), dtype=torch.int64, device=logits.device)
    if alone or dist.get_rank(group) == 0:
        token_ids, logprobs = ops.sample_tokens(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seeds=seeds,
            positions=positions,
        )
        packed[0], packed[1] = token_ids, logprobs.view(torch.int32)
    if not alone:
        dist.broadcast(packed, dist.get_global_rank(group, 0), group=group)
    return packed
