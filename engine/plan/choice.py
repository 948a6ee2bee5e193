"""What a configuration leaves to the plan: how far trained roles sleep, and what is recomputed."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from gearshift.engine.config.schema import Config
from gearshift.engine.zero.residence import Sleep

# From the least time to the least memory. Buffers of gradients leave for nothing; `never` is for
# CPU ranks, which gain nothing from a move inside one memory.
SLEEPS: tuple[Sleep, ...] = ("gradients", "exchange", "always")
RECOMPUTE = (False, True)


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
    for again in recompute:
        for sleep in sleeps:
            yield settled(config, sleep, recompute=again)


def settled(config: Config, sleep: Sleep, *, recompute: bool) -> Config:
    """The configuration with these choices where it makes none."""
    roles = {}
    for name in ("actor", "critic"):
        role = getattr(config, name)
        own = role.gradient_checkpointing
        roles[name] = replace(
            role,
            sleep=sleep if role.sleep == "auto" else role.sleep,
            gradient_checkpointing=recompute if own is None else own,
        )
    return replace(config, **roles)
