"""What to change first where a plan does not fit, found by planning the changes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import Config
from gearshift.engine.plan.hardware import GB, Hardware
from gearshift.engine.plan.planner import Plan, plan

MOST_NODES = 64
Settings = dict[str, dict]


def advise(config: Config, hf_configs: dict[str, Any], ds: Settings, hardware: Hardware) -> str:
    """One line: the first change, cheapest first, that makes the run fit, or more nodes."""

    def fits(config: Config, ds: Settings, hardware: Hardware = hardware) -> bool:
        return plan(config, hf_configs, ds, hardware).fits

    before, done = (config, ds), []
    cache_gb = _room_for_cache(plan(config, hf_configs, ds, hardware))
    if cache_gb and fits(_cache(config, cache_gb), ds):
        return f"set rollout.kv_cache_gb: {cache_gb}"
    for said, change in _changes(config, ds):
        if fits(*change(config, ds)):
            return said
    for said, change in _changes(config, ds):
        config, ds = change(config, ds)
        done.append(said)
        if fits(config, ds):
            return ", and ".join(done)
    for said, settings in (("", before), (f", {', and '.join(done)}", (config, ds))):
        for nodes in range(hardware.nodes + 1, MOST_NODES + 1):
            more = replace(hardware, nodes=nodes)
            if fits(*settings, more):
                return f"use {nodes} nodes ({more.world} GPUs){said}"
    return "use smaller models"


def _room_for_cache(made: Plan) -> int:
    """Whole GB beside everything else that generation holds."""
    generate = next(phase for phase in made.phases if phase.name == "generate")
    return max(0, int((made.hardware.usable - generate.total + generate.gpu["KV cache"]) / GB))


def _cache(config: Config, cache_gb: int) -> Config:
    return replace(config, rollout=replace(config.rollout, kv_cache_gb=float(cache_gb)))


def _changes(config: Config, ds: Settings) -> Iterator[tuple[str, Callable]]:
    """(what to write, a function of configuration and settings), cheapest in time first."""
    ppo, run = config.ppo, config.run
    if run.export:
        yield (
            "set run.export: false, and gearshift export the last checkpoint",
            lambda c, d: (replace(c, run=replace(c.run, export=False)), d),
        )
    if ppo.micro_batch_size > 1:
        yield "set ppo.micro_batch_size: 1", lambda c, d: (_ppo(c, micro_batch_size=1), d)
    if ppo.score_batch_size > 1:
        yield "set ppo.score_batch_size: 1", lambda c, d: (_ppo(c, score_batch_size=1), d)
    roles = (config.actor, config.critic)
    if any(role.sleep not in ("auto", "always") for role in roles):
        yield "set sleep: auto on actor and critic", lambda c, d: (_roles(c, sleep="auto"), d)
    if any(role.gradient_checkpointing is False for role in roles):
        yield (
            "set gradient_checkpointing: true on actor and critic",
            lambda c, d: (_roles(c, gradient_checkpointing=True), d),
        )
    frozen = [name for name in ds if name not in ("actor", "critic")]
    if any("offload_param" not in ds[name]["zero_optimization"] for name in frozen):
        yield "give the frozen models frozen_zero3_cpu_bf16.json", lambda c, d: (c, _on_host(d))
    trained = [name for name in ds if name in ("actor", "critic")]
    # split_adamw updates the weights where they are used, and refuses offload.
    plain = all(getattr(config, name).optimizer.name == "adamw" for name in trained)
    kept = any("offload_optimizer" not in ds[name]["zero_optimization"] for name in trained)
    if plain and kept:
        yield (
            "give actor and critic {actor,critic}_zero3_bf16_offload.json",
            lambda c, d: (c, _optimizer_on_host(d)),
        )


def _ppo(config: Config, **changes: Any) -> Config:
    return replace(config, ppo=replace(config.ppo, **changes))


def _roles(config: Config, **changes: Any) -> Config:
    actor, critic = replace(config.actor, **changes), replace(config.critic, **changes)
    return replace(config, actor=actor, critic=critic)


def _load(names: dict[str, str]) -> Settings:
    frozen = ("frozen_zero3_cpu_bf16",)
    return {role: ds_config.load(name, frozen=name in frozen) for role, name in names.items()}


def _on_host(ds: Settings) -> Settings:
    names = {name: "frozen_zero3_cpu_bf16" for name in ds if name not in ("actor", "critic")}
    return ds | _load(names)


def _optimizer_on_host(ds: Settings) -> Settings:
    names = {name: f"{name}_zero3_bf16_offload" for name in ds if name in ("actor", "critic")}
    return ds | _load(names)
