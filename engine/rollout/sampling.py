"""What both ways to generate share: the request, the draw of a token and the end of a response."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.context import positions
from gearshift.kernels import ops

_BANNED = -1e30  # a logit: its probability is 0, and a row of others stays finite


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response."""

    token_ids: list[int]  # with the end token, if there is one
    logprobs: list[float]  # of the temperature-scaled distribution, before top-k and top-p
    finished: bool  # ended by an end token or a stop string, not by length
    ended: bool = True  # by any of these; False: generation was stopped, and can go on


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


class Sampler:
    """What generates with one module: the two engines.

    group: the tensor-parallel group. tokenizer: needed for stop strings alone.
    """

    def __init__(
        self,
        module: nn.Module,
        config: RolloutConfig,
        *,
        eos_token_ids: list[int],
        pad_token_id: int,
        tokenizer: Any = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ):
        self.module, self.config, self.device = module, config, torch.device(device)
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        self.tokenizer, self.group = tokenizer, group

    def release(self) -> None:
        """Gives back what stays between calls."""

    def free_workspaces(self) -> None:
        """Gives back what cuBLAS keeps for every thread that multiplied, up to 32 MB each: a
        streamed pass has as many threads as micro-batches."""
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()


class Bans:
    """Tokens that may not be drawn: some never, end tokens not before a response is long enough.

    The log-prob of what is drawn stays that of the distribution over all tokens, as with top-k.
    """

    def __init__(self, sampling: SamplingConfig, eos_token_ids: list[int]):
        self._never, self._ends = sampling.suppress_tokens, eos_token_ids
        self._least, self._temperature = sampling.min_new_tokens, sampling.temperature or 1.0
        self._masks: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, sampling: SamplingConfig, eos_token_ids: list[int]) -> "Bans | None":
        """None where every token may be drawn."""
        some = sampling.suppress_tokens or sampling.min_new_tokens
        return cls(sampling, eos_token_ids) if some else None

    def apply(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 logits [S, V] of which only the allowed ones can be drawn, and [S] what to add to
        the log-prob of a token drawn from them. positions [S]: tokens that each row has drawn.

        Reads nothing on the host, and makes its masks in its first call: a CUDA graph can hold it.
        Writes over fp32 logits.
        """
        if self._masks is None:
            self._masks = self._mask(self._never, logits), self._mask(self._ends, logits)
        never, ends = self._masks
        banned = never | (positions[:, None] < self._least) & ends
        logits = logits.float()
        whole = self._mass(logits)
        allowed = logits.masked_fill_(banned, _BANNED)
        return allowed, self._mass(allowed) - whole

    def _mass(self, logits: Tensor) -> Tensor:
        scaled = logits if self._temperature == 1 else logits / self._temperature
        return scaled.logsumexp(-1)

    @staticmethod
    def _mask(token_ids: list[int], logits: Tensor) -> Tensor:
        known = [i for i in token_ids if 0 <= i < logits.shape[-1]]
        mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
        mask[known] = True
        return mask.to(logits.device)


class Ending:
    """Decides when a response is over.

    stop strings are searched in the decoded last tokens, as many as the longest one has bytes:
    every token stands for at least one. bans: what may not be drawn before.
    """

    def __init__(self, sampling: SamplingConfig, eos_token_ids: list[int], tokenizer=None):
        if sampling.stop and tokenizer is None:
            raise ValueError(f"sampling.stop={sampling.stop}: stop strings need a tokenizer")
        self.eos, self.stops, self._tokenizer = eos_token_ids, sampling.stop, tokenizer
        self.bans, self._least = Bans.of(sampling, eos_token_ids), sampling.min_new_tokens
        self._tail = 4 + max((len(text.encode()) for text in sampling.stop), default=0)

    def reached(self, tokens: list[int], length: int) -> bool:
        """Whether the last of `tokens` ends the response, which is the last `length` of them."""
        if tokens[-1] in self.eos:
            return True
        length -= self._least
        if not self.stops or length < 1:
            return False
        tail = tokens[-min(self._tail, length) :]
        text = self._tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in self.stops)


def draw(
    logits: Tensor,
    sampling: SamplingConfig,
    seeds: list[int],
    positions: list[int],
    group: dist.ProcessGroup | None = None,
    bans: Bans | None = None,
) -> tuple[list[int], list[float]]:
    """Token ids and log-probs, one per row of logits [S, V]; see draw_packed."""
    seed, position = (torch.tensor(numbers, device=logits.device) for numbers in (seeds, positions))
    token_ids, bits = draw_packed(logits, sampling, seed, position, group, bans).cpu()
    return token_ids.tolist(), bits.to(torch.int32).view(torch.float32).tolist()


def draw_packed(
    logits: Tensor,
    sampling: SamplingConfig,
    seeds: Tensor,
    positions: Tensor,
    group: dist.ProcessGroup | None,
    bans: Bans | None = None,
) -> Tensor:
    """Samples one token per row of logits [S, V]; the same on every rank of `group`.

    Returns [2, S] int64: token ids, and the bits of their fp32 log-probs. Rank 0 of the group
    samples and broadcasts: logits that differ in their last bit between ranks would otherwise let
    the ranks' schedules part, and hang. Other ranks' logits are not read.
    """
    alone = group is None or dist.get_world_size(group) == 1
    packed = torch.empty(2, len(seeds), dtype=torch.int64, device=logits.device)
    if alone or dist.get_rank(group) == 0:
        allowed, less = bans.apply(logits, positions) if bans else (logits, None)
        token_ids, logprobs = ops.sample_tokens(
            allowed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seeds=seeds,
            positions=positions,
        )
        logprobs = logprobs if less is None else logprobs + less
        packed[0], packed[1] = token_ids, logprobs.view(torch.int32)
    if not alone:
        dist.broadcast(packed, dist.get_global_rank(group, 0), group=group)
    return packed
