"""The fallback for models whose attention does not go through AttentionInterface.

A plain loop over the module with its own cache on a left-padded batch. Draws, log-probs, seeds and
endings are those of the paged engine, so that both give the same responses.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.attention import trial
from gearshift.engine.attention.packed import LAYER_TYPES, accepts, padded
from gearshift.engine.attention.paged import evaluating
from gearshift.engine.config.errors import ConfigError, said
from gearshift.engine.config.schema import SamplingConfig
from gearshift.engine.data.streams import left_padded
from gearshift.engine.rollout.context import positions
from gearshift.engine.rollout.graphs import has_experts
from gearshift.engine.rollout.linear import generation_linear
from gearshift.engine.rollout.sampling import Completion, Ending, Request, Sampler, draw

logger = logging.getLogger("gearshift")
_LENGTHS, _STEPS = (5, 17), 4  # of rows that show how a module reads them; the tokens compared


@dataclass(frozen=True)
class Manner:
    """How a module reads rows while it generates.

    pads: rows of several lengths together, begun with padding; else only those of one length.
    cache: the argument that keeps a state of past tokens; "": all columns are read every time.
    """

    pads: bool
    cache: str


class PaddedEngine(Sampler):
    """Has the calls of RolloutEngine.

    Batches of `config.max_sequences` prompts run one after the other, each until its last response
    ends. manner: of reading rows; chosen in the first call, see choose_manner.
    """

    manner: Manner | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        *,
        limits: list[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """As RolloutEngine.generate; progress is told once, at the end."""
        if not prompts:
            return []
        request = Request(prompts=prompts, sampling=sampling, seeds=seeds, limits=limits or [])
        request.check_context(self.module)
        ending = Ending(sampling, self.eos_token_ids, self.tokenizer)
        if self.manner is None:
            self.manner = choose_manner(self.module, self.pad_token_id, self.group, self.device)
        made: dict[int, Completion] = {}
        most = self.config.max_sequences
        with evaluating(self.module), padded(self.module), generation_linear(self.module):
            for together in _groups(prompts, self.manner):
                for start in range(0, len(together), most):
                    rows = together[start : start + most]
                    done = self._complete(request, rows, ending, self.manner)
                    made |= zip(rows, done, strict=True)
        if progress:
            progress(len(prompts), len(prompts))
        return [made[row] for row in range(len(prompts))]

    def rest(self) -> None:
        """Nothing outlives a call."""

    def _complete(
        self, request: Request, rows: list[int], ending: Ending, manner: Manner
    ) -> list[Completion]:
        """The responses of one batch, the request's `rows`."""
        tokens = [list(request.prompts[row]) for row in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        over = [False] * len(rows)
        live = list(range(len(rows)))
        reader = _Rows(self.module, tokens, self.pad_token_id, self.device, manner)
        while live:
            token_ids, drawn = draw(
                reader.logits()[live],
                request.sampling,
                [request.seeds[rows[i]] for i in live],
                [len(logprobs[i]) for i in live],
                self.group,
                ending.bans,
            )
            for i, token, logprob in zip(live, token_ids, drawn, strict=True):
                tokens[i].append(token)
                logprobs[i].append(logprob)
                over[i] = ending.reached(tokens[i], len(logprobs[i]))
            reader.append(dict(zip(live, token_ids, strict=True)))
            live = [i for i in live if not over[i] and len(logprobs[i]) < request.limits[rows[i]]]
        return [
            Completion(token_ids=ids[-len(values) :], logprobs=values, finished=ended)
            for ids, values, ended in zip(tokens, logprobs, over, strict=True)
        ]


class _Rows:
    """Rows [B] that a module reads token after token."""

    def __init__(self, module, tokens: list[list[int]], pad_token_id: int, device, manner: Manner):
        self.module, self.pad, self.device, self.manner = module, pad_token_id, device, manner
        ids, mask = left_padded(tokens, pad_token_id)
        self.inputs, self.mask = ids.to(device), mask.long().to(device)
        self.cache = None

    def logits(self) -> Tensor:
        """[B, V] of the last column.

        Where there is no padding there is no mask, which some would apply to a single new column.
        """
        module, kept = self.module, self.manner.cache
        arguments = {"input_ids": self.inputs, "use_cache": bool(kept)}
        if self.cache is not None:
            arguments[kept] = self.cache
        if self.manner.pads:
            columns = (self.mask.cumsum(1) - 1).clamp(min=0)
            arguments["position_ids"] = columns[:, -self.inputs.shape[1] :]
            arguments["attention_mask"] = self.mask
        if accepts(module, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        output = module(**arguments)
        self.cache = getattr(output, kept, None) if kept else None
        return output.logits[:, -1]

    def append(self, tokens: dict[int, int]) -> None:
        """Another column: by row, and padding elsewhere."""
        following = [[tokens.get(row, self.pad)] for row in range(len(self.mask))]
        column = torch.tensor(following, device=self.device)
        self.inputs = column if self.cache is not None else torch.cat([self.inputs, column], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)


def _groups(rows: list[list[int]], manner: Manner) -> list[list[int]]:
    """Which rows may be read together."""
    lengths = [0 if manner.pads else len(row) for row in rows]
    return [[i for i, m in enumerate(lengths) if m == n] for n in sorted(set(lengths))]


@torch.no_grad()
def choose_manner(
    module: nn.Module,
    pad_token_id: int,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> Manner:
    """The first manner in which a module reads rows as its own forward reads each alone.

    Some are misled by padding; some keep a state that is right only after what they expect before
    the text (GIT: an image). Some forwards of a few tokens; the same on all ranks of a group.
    Raises ConfigError where the module fails once it is cut for tensor parallelism.
    """
    text = module.config.get_text_config()  # type: ignore[union-attr,operator]
    most, words = positions(text) or max(_LENGTHS), min(text.vocab_size, 61)
    rows = [[7 * i % words for i in range(min(length, most))] for length in _LENGTHS]
    # Padding is tried where the module is told positions and no layer looks at parts of a row by
    # column, as those that compress it do.
    kinds = set(getattr(text, "layer_types", None) or ())
    pads = accepts(module, "position_ids") and kinds <= {*LAYER_TYPES, "linear_attention"}
    # One that does not name its state as most do is Mamba.
    cache = next(
        (name for name in ("past_key_values", "cache_params") if accepts(module, name)), ""
    )
    with evaluating(module), padded(module), generation_linear(module):
        alone = _alone(module, rows, group, device)
        for manner in dict.fromkeys([Manner(pads, cache), Manner(False, cache)]):
            why = _unlike(module, rows, alone, pad_token_id, device, manner)
            if why is None:
                return manner
            way = "begun with padding" if manner.pads else "through its cache"
            name = type(module).__name__
            logger.warning("%s reads rows %s otherwise than alone: %s", name, way, why)
    return Manner(False, "")


def _alone(
    module: nn.Module, rows: list[list[int]], group: dist.ProcessGroup | None, device
) -> list[Tensor]:
    """The last logits [STEPS, V] of each row, read alone and at once."""
    ids = [torch.tensor([row], device=device) for row in rows]
    try:
        return [module(input_ids=row, use_cache=False).logits[0, -_STEPS:] for row in ids]
    except trial.FAULTS as error:
        if group is None or not trial.is_its_own(error):
            raise
        problem = f"{type(module).__name__} fails when it is cut: {said(error)}"
        raise ConfigError("rollout.tp", problem, "set 1", dist.get_world_size(group)) from error


def _unlike(
    module: nn.Module,
    rows: list[list[int]],
    alone: list[Tensor],
    pad_token_id: int,
    device: torch.device | str,
    manner: Manner,
) -> str | None:
    """What tells the last logits of rows, read in a manner, from those of each row alone."""
    errors, steps = [], len(alone[0])
    try:
        for together in _groups(rows, manner):
            starts = [rows[i][: 1 - steps or None] for i in together]
            reader = _Rows(module, starts, pad_token_id, device, manner)
            for step in range(steps):
                expected = torch.stack([alone[i][step] for i in together])
                distance = (reader.logits() - expected).abs().amax(1)
                errors.append(distance / expected.abs().amax())
                reader.append({n: rows[i][step + 1 - steps] for n, i in enumerate(together)})
    except trial.FAULTS as error:
        if not trial.is_its_own(error):
            raise
        return said(error)
    found = torch.cat(errors).float()
    experts = has_experts(module.config.get_text_config())  # type: ignore[union-attr,operator]
    unlike = trial.excess(found, alone[0].dtype, experts) > 0
    return f"logits differ by {float(found.max()):.2g} of the largest" if unlike else None
