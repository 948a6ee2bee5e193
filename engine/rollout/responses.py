"""PromptBatch -> Rollout: the actor's sampling, between the records and the rollout engine."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from gearshift.engine.attention import paged
from gearshift.engine.batch import PromptBatch, Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.padded import PaddedEngine
from gearshift.engine.rollout.sampling import Completion
from gearshift.engine.rollout.stragglers import Backlog, Waiting, as_prompts

logger = logging.getLogger("gearshift")


def sequence_seed(seed: int, row_id: int) -> int:
    """A 63-bit seed for one response of a run (SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    state = (seed * 0x9E3779B97F4A7C15 + row_id * 0xBF58476D1CE4E5B9 + 1) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return (state ^ (state >> 31)) >> 1


def end_token_ids(tokenizer: Any, lm: nn.Module) -> list[int]:
    """Every id that ends a response: the tokenizer's, the model's and the chat template's.

    A converted tokenizer may name another end than the one its chats are trained with, so the
    template is rendered once and asked which special token follows an assistant's turn.
    """
    ends = {tokenizer.eos_token_id}
    for config in (lm.config, lm.generation_config):
        found = getattr(config, "eos_token_id", None)
        ends.update(found if isinstance(found, (list, tuple)) else [found])
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "gearshift"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False).rsplit("gearshift", 1)[-1]
        following = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends.update([i for i in following if i in tokenizer.all_special_ids][:1])
    ends.discard(None)
    if not ends:
        raise ValueError("tokenizer: it has no EOS token; set one with the actor's tokenizer key")
    return sorted(ends)


def choose_engine(
    lm: nn.Module, wanted: str, device: torch.device | str = "cpu"
) -> type[RolloutEngine] | type[PaddedEngine]:
    """The engine that `rollout.engine` names; "auto" is the paged one where the model allows it,
    which a forward of one token shows: a collective under ZeRO-3.

    Raises ValueError, with the reason, for "paged" and a model that cannot.
    """
    if wanted == "hf":
        return PaddedEngine
    reason = paged.supports(lm) or next(iter(paged.probe(lm, device).faults), None)
    if reason is None:
        return RolloutEngine
    if wanted == "paged":
        raise ValueError(f"rollout.engine=paged: {reason}; use rollout.engine: hf")
    logger.warning("rollout.engine=auto: %s; generating with a padded batch instead", reason)
    return PaddedEngine


def engine_alone(
    lm: nn.Module, config: RolloutConfig, tokenizer: Any, device: torch.device
) -> RolloutEngine | PaddedEngine:
    """Generates with a whole model, which goes to the device, in this process."""
    lm, ends = lm.to(device), end_token_ids(tokenizer, lm)
    setup = {"eos_token_ids": ends, "pad_token_id": ends[0], "tokenizer": tokenizer}
    return choose_engine(lm, config.engine, device)(lm, config, **setup, device=device)


class Share(NamedTuple):
    """What a rank brings to the generation of its TP group; seeds, limits and begun by prompt."""

    prompts: list[list[int]]
    seeds: list[int]
    limits: list[int]
    begun: list[Completion | None]
    wanted: int  # of these must end before generation may stop


def generate_responses(
    engine: RolloutEngine | PaddedEngine,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    seed: int,
    group: dist.ProcessGroup | None,
    progress: Callable[[int, int], None] | None = None,
    backlog: Backlog | None = None,
) -> Rollout:
    """Samples one response for each row. The ranks of a TP group generate their rows together.

    With a backlog, which only a paged engine takes, they are responses to these prompts or to those
    of earlier steps, and the others wait in it. The rows get the places of `prompts` in the step.
    """
    flying: list[Waiting] = []
    asked, wanted = prompts, len(prompts)
    if backlog:
        flying, wanted = backlog.launch(prompts)
        asked = as_prompts(flying, prompts)
    seeds = [sequence_seed(seed, row) for row in asked.row_ids.tolist()]
    limits, begun = limits_of(asked, sampling), [w.drawn for w in flying]
    own = Share(asked.token_ids(), seeds, limits, begun, wanted)
    shares = [*distributed.all_gather_objects(own, group)] if group else [own]
    before = dist.get_rank(group) if group else 0
    completions = _generate(engine, shares, sampling, progress, bool(backlog))[before]
    if not backlog:
        return as_rollout(prompts, completions)
    ended = backlog.land(flying, completions)
    places = as_prompts(ended, prompts).tensors() | {"row_ids": prompts.row_ids}
    return as_rollout(PromptBatch(**places), [w.drawn for w in ended if w.drawn])


def _generate(
    engine: RolloutEngine | PaddedEngine,
    shares: list[Share],
    sampling: SamplingConfig,
    progress: Callable[[int, int], None] | None,
    defers: bool,
) -> list[list[Completion]]:
    """The responses to each share's prompts; those that did not end, too, where one may defer."""
    deferring: dict[str, Any] = {}
    if defers:
        deferring["begun"] = [drawn for share in shares for drawn in share.begun]
        deferring["enough"] = _enough(shares)
    if max(share.wanted for share in shares) <= 0:
        nothing = Completion(token_ids=[], logprobs=[], finished=False, ended=False)
        return [[drawn or nothing for drawn in share.begun] for share in shares]
    completions = iter(
        engine.generate(
            [prompt for share in shares for prompt in share.prompts],
            sampling,
            [seed for share in shares for seed in share.seeds],
            limits=[limit for share in shares for limit in share.limits] or None,
            progress=progress,
            **deferring,
        )
    )
    return [[next(completions) for _ in share.prompts] for share in shares]


def _enough(shares: list[Share]) -> Callable[[int], bool]:
    """Whether every rank has as many responses as it wants, told of each prompt of all whose
    response ends."""
    owner = [rank for rank, share in enumerate(shares) for _ in share.prompts]
    left = [share.wanted for share in shares]

    def enough(place: int) -> bool:
        left[owner[place]] -= 1
        return max(left) <= 0

    return enough


def limits_of(prompts: PromptBatch, sampling: SamplingConfig) -> list[int]:
    """The longest response of each row, from the column sampling.limit_key; empty without one."""
    if sampling.limit_key is None:
        return []
    found = prompts.columns[sampling.limit_key]
    limits = (limit_in(value, sampling.limit_key) for value in found)
    return [min(limit, sampling.max_new_tokens) for limit in limits]


def limit_in(value: Any, key: str) -> int:
    """The longest response that a cell of the column `key` allows; a csv's cells are text.

    Raises ConfigError for what is no whole number above 0.
    """
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    wrong = type(number) is not int or number < 1
    problem = f"a prompt has {value!r} in this column, which is no whole number above 0"
    refuse_if(wrong, "sampling.limit_key", problem, value=key)
    return number


def as_rollout(prompts: PromptBatch, completions: list[Completion]) -> Rollout:
    """Right-pads the completions, each of at least one token, with id 0 under a False mask."""
    device = prompts.prompt_ids.device
    ids = [torch.tensor(c.token_ids) for c in completions]
    logprobs = [torch.tensor(c.logprobs) for c in completions]
    lengths = torch.tensor([len(row) for row in ids])
    return Rollout(
        **prompts.tensors(),
        response_ids=pad_sequence(ids, batch_first=True).to(device),
        response_mask=(torch.arange(int(lengths.max())) < lengths[:, None]).to(device),
        rollout_logprobs=pad_sequence(logprobs, batch_first=True).float().to(device),
        finished=torch.tensor([c.finished for c in completions], device=device),
    )
