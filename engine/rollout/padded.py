"""The fallback for models whose attention does not go through AttentionInterface.

A plain loop over the module with its own cache on a left-padded batch. Draws, log-probs, seeds and
endings are those of the paged engine, so that both give the same responses.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.attention.packed import LAYER_TYPES, padded
from gearshift.engine.attention.paged import accepts, evaluating
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.linear import generation_linear
from gearshift.engine.rollout.sampling import Completion, Ending, Request, draw


@torch.no_grad()
def hf_generate(
    module: nn.Module,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    seeds: list[int],
    *,
    eos_token_ids: list[int],
    pad_token_id: int,
    tokenizer=None,
    limits: list[int] | None = None,
    max_sequences: int = 256,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> list[Completion]:
    """One response per prompt; arguments and errors as RolloutEngine.generate's.

    Batches of `max_sequences` prompts run one after the other, each until its last response ends.
    Where a module may count a row's tokens by itself, prompts of one length make a batch, so that
    nothing is padded.
    """
    if not prompts:
        return []
    request = Request(prompts=prompts, sampling=sampling, seeds=seeds, limits=limits or [])
    request.check_context(module)
    ending = Ending(sampling, eos_token_ids, tokenizer)
    groups = {0: list(range(len(prompts)))}
    if not _pads(module):
        lengths = [len(prompt) for prompt in prompts]
        groups = {n: [i for i, m in enumerate(lengths) if m == n] for n in sorted(set(lengths))}
    made: dict[int, Completion] = {}
    with evaluating(module), padded(module), generation_linear(module):
        for group_rows in groups.values():
            for start in range(0, len(group_rows), max_sequences):
                rows = group_rows[start : start + max_sequences]
                out = _complete(module, request, rows, ending, pad_token_id, group, device)
                made |= dict(zip(rows, out, strict=True))
    return [made[row] for row in range(len(prompts))]


class PaddedEngine:
    """hf_generate with the constructor and the calls of RolloutEngine."""

    def __init__(self, module: nn.Module, config: RolloutConfig, **setup):
        """setup: eos_token_ids, pad_token_id, tokenizer, group, device."""
        self.module, self.config, self.setup = module, config, setup

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        *,
        limits: list[int] | None = None,
        progress=None,
    ) -> list[Completion]:
        """As RolloutEngine.generate; progress is told once, at the end."""
        slots = self.config.max_sequences
        completions = hf_generate(
            self.module, prompts, sampling, seeds, limits=limits, max_sequences=slots, **self.setup
        )
        if progress:
            progress(len(prompts), len(prompts))
        return completions

    def rest(self) -> None:
        """Nothing outlives a call."""


def _complete(
    module: nn.Module,
    request: Request,
    rows: list[int],
    ending: Ending,
    pad_token_id: int,
    group: dist.ProcessGroup | None,
    device: torch.device | str,
) -> list[Completion]:
    """The responses of one batch, the request's `rows`."""
    tokens = [list(request.prompts[row]) for row in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    over = [False] * len(rows)
    live = list(range(len(rows)))
    inputs, mask = _left_padded(tokens, pad_token_id, device)
    cache = None
    while live:
        logits, cache = _forward(module, inputs, mask, cache)
        token_ids, drawn = draw(
            logits[live],
            request.sampling,
            [request.seeds[rows[i]] for i in live],
            [len(logprobs[i]) for i in live],
            group,
            ending.bans,
        )
        following = torch.full((len(rows), 1), pad_token_id)
        for i, token, logprob in zip(live, token_ids, drawn, strict=True):
            tokens[i].append(token)
            logprobs[i].append(logprob)
            following[i] = token
            over[i] = ending.reached(tokens[i], len(logprobs[i]))
        live = [i for i in live if not over[i] and len(logprobs[i]) < request.limits[rows[i]]]
        following = following.to(device)
        inputs = torch.cat([inputs, following], 1) if cache is None else following
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return [
        Completion(token_ids=ids[-len(values) :], logprobs=values, finished=ended)
        for ids, values, ended in zip(tokens, logprobs, over, strict=True)
    ]


def _pads(module: nn.Module) -> bool:
    """Whether rows may begin with padding: the module is told positions, and no layer looks at
    parts of a row by column, as those that compress it do."""
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ())  # type: ignore[union-attr,operator]
    return accepts(module, "position_ids") and kinds <= {*LAYER_TYPES, "linear_attention"}


def _left_padded(
    prompts: list[list[int]], pad_token_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, P] int64."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _forward(module: nn.Module, inputs: Tensor, mask: Tensor, cache) -> tuple[Tensor, object]:
    """Logits [B, V] of the last column, and the module's cache; inputs [B, n], mask [B, all].

    A module without a cache has None, and reads all columns every time. One that does not name a
    state of past tokens as most do keeps it in `cache_params` (Mamba). Where there is no
    padding there is no mask, which some would apply to a single new column.
    """
    kept = next((name for name in ("past_key_values", "cache_params") if accepts(module, name)), "")
    arguments = {"input_ids": inputs, "use_cache": bool(kept)}
    if cache is not None:
        arguments[kept] = cache
    if _pads(module):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        arguments |= {"position_ids": positions[:, -inputs.shape[1] :], "attention_mask": mask}
    if accepts(module, "logits_to_keep"):
        arguments["logits_to_keep"] = 1
    output = module(**arguments)
    return output.logits[:, -1], getattr(output, kept, None) if kept else None
