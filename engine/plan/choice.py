"""What a configuration leaves to the plan: how far trained roles sleep, what is recomputed, and how
many tokens a forward reads."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from gearshift.engine.config.schema import Config
from gearshift.engine.models.lora import adapts, is_dora
from gearshift.engine.zero.residence import Sleep

# From the least time to the least memory. Buffers of gradients leave for nothing; `never` is for
# CPU ranks, which gain nothing from a move inside one memory.
SLEEPS: tuple[Sleep, ...] = ("gradients", "exchange", "always")
RECOMPUTE = (False, True)
# Of a micro-batch. More than the first gains nothing: the products are as wide as they get, and
# DeepSpeed's work per parameter is hidden behind them.
GPU_TOKENS = (16384, 8192, 4096, 2048, 1024)
CPU_TOKENS = (2048, 1024, 512)


def choices(config: Config, trained: Iterable[str], *, shared: bool) -> Iterator[Config]:
    """Every way to settle what is left open, the least change first.

    trained: names of the roles. shared: the device's memory is the host's.
    """
    roles = [getattr(config, name) for name in trained]
    sleeps: tuple[Sleep, ...] = ("never",) if shared else SLEEPS
    if all(role.sleep != "auto" for role in roles):
        sleeps = sleeps[:1]
    recompute: tuple[bool, ...] = RECOMPUTE
    if all(role.gradient_checkpointing is not None for role in roles):
        recompute = RECOMPUTE[:1]
    tokens: tuple[int, ...] = CPU_TOKENS if shared else GPU_TOKENS
    ppo = config.ppo
    given = [ppo.micro_batch_size, ppo.score_batch_size]
    given += [None if n == "auto" else n for n in (ppo.micro_batch_tokens, ppo.score_batch_tokens)]
    if (given[0] or given[2]) and (given[1] or given[3]):
        tokens = tokens[:1]
    for merged in (True, False) if _may_stay_apart(config, shared) else (True,):
        for again in recompute:
            for budget in tokens:
                for sleep in sleeps:
                    yield settled(config, sleep, recompute=again, tokens=budget, merged=merged)


def _may_stay_apart(config: Config, shared: bool) -> bool:
    """Whether generation may be planned with adapters beside the weights."""
    asked = config.actor.lora.generate == "auto" and config.rollout.tp < 2
    return adapts(config.actor) and not is_dora(config.actor) and asked and not shared


def settled(
    config: Config, sleep: Sleep, *, recompute: bool, tokens: int, merged: bool = True
) -> Config:
    """The configuration with these choices where it makes none."""
    ppo, lora = config.ppo, config.actor.lora
    if ppo.micro_batch_tokens == "auto" and ppo.micro_batch_size is None:
        ppo = replace(ppo, micro_batch_tokens=tokens)
    if ppo.score_batch_tokens == "auto" and ppo.score_batch_size is None:
        ppo = replace(ppo, score_batch_tokens=tokens)
    roles = {}
    for name in ("actor", "critic"):
        role = getattr(config, name)
        own = role.gradient_checkpointing
        roles[name] = replace(
            role,
            sleep=sleep if role.sleep == "auto" else role.sleep,
            gradient_checkpointing=recompute if own is None else own,
        )
    if lora.generate == "auto" and not merged:
        apart = replace(lora, generate="unmerged")
        roles["actor"] = replace(roles["actor"], lora=apart)
        return replace(config, ppo=ppo, rollout=replace(config.rollout, tp=1), **roles)
    return replace(config, ppo=ppo, **roles)
