"""PromptBatch -> Rollout: the actor's sampling, between the records and the rollout engine."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from gearshift.engine.attention import paged
from gearshift.engine.batch import PromptBatch, Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.schema import SamplingConfig
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.padded import PaddedEngine
from gearshift.engine.rollout.sampling import Completion
from gearshift.engine.rollout.stragglers import Backlog, as_prompts

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


def generate_responses(
    engine: RolloutEngine | PaddedEngine,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    seed: int,
    group: dist.ProcessGroup | None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Samples one response for each row. The ranks of a TP group generate their rows together."""
    return as_rollout(prompts, _complete(engine, prompts, sampling, seed, group, progress))


def generate_deferring(
    engine: RolloutEngine | PaddedEngine,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    seed: int,
    group: dist.ProcessGroup | None,
    progress: Callable[[int, int], None] | None,
    backlog: Backlog,
) -> Rollout:
    """As many responses as there are prompts, to these or to those of earlier steps; the others
    wait in the backlog. The rows get the places of `prompts` in the step. The engine is paged."""
    flying, wanted = backlog.launch(prompts)
    asked, begun = as_prompts(flying, prompts), [w.drawn for w in flying]
    completions = _complete(
        engine, asked, sampling, seed, group, progress, begun=begun, wanted=wanted
    )
    ended = backlog.land(flying, completions)
    places = as_prompts(ended, prompts).tensors() | {"row_ids": prompts.row_ids}
    return as_rollout(PromptBatch(**places), [w.drawn for w in ended if w.drawn])


def _complete(
    engine: RolloutEngine | PaddedEngine,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    seed: int,
    group: dist.ProcessGroup | None,
    progress: Callable[[int, int], None] | None,
    **deferring: Any,
) -> list[Completion]:
    """Of this rank's prompts. deferring: begun, what they have of their responses; wanted, how many
    of these must end before generation may stop."""
    ids = [
        row[live].tolist()
        for row, live in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
    ]
    seeds = [sequence_seed(seed, row) for row in prompts.row_ids.tolist()]
    mine = ids, seeds, limits_of(prompts, sampling), deferring
    shares = distributed.all_gather_objects(mine, group) if group else [mine]
    counts = [len(share[0]) for share in shares]
    more: dict[str, Any] = {}
    if deferring and max(share[3]["wanted"] for share in shares) <= 0:
        nothing = Completion(token_ids=[], logprobs=[], finished=False, ended=False)
        return [drawn or nothing for drawn in deferring["begun"]]
    if deferring:
        more["begun"] = [drawn for share in shares for drawn in share[3]["begun"]]
        more["enough"] = _enough(counts, [share[3]["wanted"] for share in shares])
    completions = engine.generate(
        [row for share in shares for row in share[0]],
        sampling,
        [seed for share in shares for seed in share[1]],
        limits=[limit for share in shares for limit in share[2]] or None,
        progress=progress,
        **more,
    )
    first = sum(counts[: dist.get_rank(group) if group else 0])
    return completions[first : first + len(ids)]


def _enough(counts: list[int], wanted: list[int]) -> Callable[[int], bool]:
    """Whether every rank of a TP group has as many responses as it wants, told of each that ends.

    counts: prompts of each rank, which follow one another.
    """
    owner = [rank for rank, count in enumerate(counts) for _ in range(count)]
    left = list(wanted)

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
