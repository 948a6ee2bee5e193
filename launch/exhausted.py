"""What a run that used up the GPU's memory says: the phase, and the key that makes it smaller."""

import torch

from gearshift.engine.config.schema import Config
from gearshift.engine.phase import Phase

_UPDATES = tuple(phase for phase in Phase if phase.trains)
_SCORING = (Phase.REWARDS, Phase.LOGPROBS, Phase.REFERENCE, Phase.VALUES)


class OutOfMemory(RuntimeError):
    """The GPU's memory did not suffice; one line."""


def explained(error: torch.OutOfMemoryError, phase: str, config: Config) -> OutOfMemory:
    """phase: of engine.cluster.progress. config: with what the plan chose."""
    asked = " ".join(str(error).split()).split(". ")[1:2]  # "Tried to allocate 2.00 GiB"
    held = ""
    if torch.cuda.is_available():
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
        own = torch.cuda.memory_allocated() / 1e9
        held = f"; {own:.1f} of {total:.1f} GB in tensors, {free:.1f} GB free"
    tried = f" ({asked[0][0].lower()}{asked[0][1:]}{held})" if asked else ""
    return OutOfMemory(f"the GPU ran out of memory in {phase}{tried}; {_fix(phase, config)}")


def _fix(phase: str, config: Config) -> str:
    again = "then the same command goes on from the last checkpoint"
    ppo, rollout = config.ppo, config.rollout
    if phase in _UPDATES:
        smaller = _halved("ppo.micro_batch_tokens", ppo.micro_tokens, "ppo.micro_batch_size")
        return f"{smaller}, or actor.sleep and critic.sleep to always; {again}"
    if phase in _SCORING:
        smaller = _halved("ppo.score_batch_tokens", ppo.score_tokens, "ppo.score_batch_size")
        return f"{smaller}; {again}"
    if phase == Phase.GENERATE:
        sequences = max(1, rollout.max_sequences // 2)
        cache = f"rollout.kv_cache_gb (now {rollout.kv_cache_gb:g}; 0: what is free)"
        return f"set rollout.max_sequences to {sequences}, or bound {cache}; {again}"
    return f"`gearshift plan --config FILE` says what each phase needs; {again}"


def _halved(key: str, tokens: int | None, rows: str) -> str:
    if tokens is None:
        return f"lower {rows}"
    return f"set {key} to {max(1, tokens // 2)} (now {tokens})"
