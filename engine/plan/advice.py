"""What to change first where a plan does not fit, found by planning the changes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from gearshift.engine.config.schema import Config
from gearshift.engine.models.cast import Part
from gearshift.engine.plan.hardware import GB, Hardware
from gearshift.engine.plan.planner import Plan, plan

MOST_NODES = 64
Parts = dict[str, Part]
Change = Callable[[Config, Parts], tuple[Config, Parts]]


def advise(config: Config, parts: Parts, hardware: Hardware) -> str:
    """One line: the first change, cheapest first, that makes the run fit, or more nodes."""

    def fits(config: Config, parts: Parts, hardware: Hardware = hardware) -> bool:
        return plan(config, parts, hardware).fits

    before, done = (config, parts), []
    cache_gb = _room_for_cache(plan(config, parts, hardware))
    if cache_gb and fits(*_keys("rollout", kv_cache_gb=float(cache_gb))(config, parts)):
        return f"set rollout.kv_cache_gb: {cache_gb}"
    for said, change in _changes(config, parts):
        if fits(*change(config, parts)):
            return said
    for said, change in _changes(config, parts):
        config, parts = change(config, parts)
        done.append(said)
        if fits(config, parts):
            return ", and ".join(done)
    for said, settings in (("", before), (f", {', and '.join(done)}", (config, parts))):
        for nodes in range(hardware.nodes + 1, MOST_NODES + 1):
            more = replace(hardware, nodes=nodes)
            if fits(*settings, more):
                return f"use {nodes} nodes ({more.world} GPUs){said}"
    return "use smaller models"


def _room_for_cache(made: Plan) -> int:
    """Whole GB beside everything else that generation holds."""
    generate = next(phase for phase in made.phases if phase.name == "generate")
    return max(0, int((made.hardware.usable - generate.total + generate.gpu["KV cache"]) / GB))


def _changes(config: Config, parts: Parts) -> Iterator[tuple[str, Change]]:
    """(what to write, what that changes), cheapest in time first."""
    ppo = config.ppo
    if config.run.export:
        yield (
            "set run.export: false, and gearshift export the last checkpoint",
            _keys("run", export=False),
        )
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    for kind in ("micro", "score"):
        tokens, rows = f"{kind}_batch_tokens", f"{kind}_batch_size"
        if isinstance(getattr(ppo, tokens), int) and getattr(ppo, tokens) > longest:
            yield f"set ppo.{tokens}: {longest}", _keys("ppo", **{tokens: longest})
        if (getattr(ppo, rows) or 1) > 1:
            yield f"set ppo.{rows}: 1", _keys("ppo", **{rows: 1})
    roles = (config.actor, config.critic)
    if any(role.sleep not in ("auto", "always") for role in roles):
        yield "set sleep: auto on actor and critic", _keys("actor", "critic", sleep="auto")
    if any(role.gradient_checkpointing is False for role in roles):
        yield (
            "set gradient_checkpointing: true on actor and critic",
            _keys("actor", "critic", gradient_checkpointing=True),
        )
    frozen = [part for part in parts.values() if not part.trained and not part.base]
    if any("offload_param" not in part.settings["zero_optimization"] for part in frozen):
        name = "frozen_zero3_cpu_bf16"
        yield f"give the frozen models {name}.json", _deepspeed(name, trained=False)
    trained = [part for part in parts.values() if part.trained]
    # split_adamw updates the weights where they are used, and refuses offload; ZeRO-3 refuses
    # weights in 4 bit.
    own = [getattr(config, part.name) for part in trained]
    plain = all(r.optimizer.name == "adamw" and not r.lora.load_in_4bit for r in own)
    kept = any("offload_optimizer" not in part.settings["zero_optimization"] for part in trained)
    if plain and kept:
        yield (
            "give actor and critic {actor,critic}_zero3_bf16_offload.json",
            _deepspeed("trained_zero3_bf16_offload", trained=True),
        )


def _keys(*sections: str, **changes: Any) -> Change:
    """These keys in each of these sections."""

    def change(config: Config, parts: Parts) -> tuple[Config, Parts]:
        made = {name: replace(getattr(config, name), **changes) for name in sections}
        return replace(config, **made), parts

    return change


def _deepspeed(name: str, *, trained: bool) -> Change:
    """Another JSON for the trained parts, or for the frozen ones."""

    def change(config: Config, parts: Parts) -> tuple[Config, Parts]:
        made = {
            key: part.under(name) if part.trained == trained else part
            for key, part in parts.items()
        }
        return config, made

    return change
