"""The memory and time plan of a run, from configurations alone: `gearshift plan`, and start-up.

It plans what the code does: every state stays where its DeepSpeed JSON puts it through the whole
step, and the KV cache gets what is left in generation. Bytes are per rank, or per node of the host.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from gearshift.engine import memory_model as model
from gearshift.engine import plan_time
from gearshift.engine.config import Config
from gearshift.engine.hardware import GB, Hardware
from gearshift.engine.memory_model import States, Zero
from gearshift.engine.plan_time import Work
from gearshift.engine.rollout import GPU_CACHE_SHARE
from gearshift.engine.shapes import Shape, shape_of

STAGING = 256 * 2**20  # of a shift on a GPU; rollout.shift_bucket_mb
# Where a measured phase is in metrics.jsonl.
MEASURED = {
    "generate": "generate",
    "rewards": "rewards",
    "logprobs": "logprobs",
    "reference": "ref",
    "values": "values",
    "update_actor": "update_actor",
    "update_critic": "update_critic",
}
TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of the run, as it is planned."""

    name: str
    shape: Shape
    zero: Zero
    states: States
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes of a rank's GPU by what they are, of a node's host in all, and expected seconds."""

    name: str
    gpu: dict[str, float]
    host: float
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.gpu.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step is expected to take. refuse_reason: None where it fits.

    micro_batch: the largest ppo.micro_batch_size that fits, 0 for none; kv_slots: sequences of
    full length that the cache of a TP group holds, at most kv_wanted.
    """

    hardware: Hardware
    roles: tuple[Role, ...]
    phases: tuple[Phase, ...]
    tp: int
    micro_batch: int
    kv_slots: int
    kv_wanted: int
    refuse_reason: str | None

    @property
    def fits(self) -> bool:
        return self.refuse_reason is None

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def step_seconds(self) -> float:
        return sum(p.seconds for p in self.phases if p.name not in ("load", "save"))


def plan(config: Config, hf_configs: dict[str, Any], ds: dict[str, dict], hardware: Hardware):
    """The Plan of a run.

    hf_configs, ds: transformers configuration and DeepSpeed settings by role: actor, critic,
    reference, and reward models by their names. Absent roles take no part.
    """
    return _Planner(config, _roles(config, hf_configs, ds, hardware.world), hardware).plan()


def compare(plan: Plan, figures: dict[str, float]) -> list[str]:
    """Planned beside measured memory of a step, a line per phase; deviations above 5 % say so.

    figures: a PPO step's metrics; memory_gb/<phase> is torch's peak of allocated GPU memory, so
    this is for GPUs.
    """
    lines = []
    for phase in plan.phases:
        measured = figures.get(f"memory_gb/{MEASURED.get(phase.name)}")
        if measured is None:
            continue
        planned = phase.total / GB
        off = measured / planned - 1
        verdict = "" if abs(off) <= TOLERANCE else f", {off:+.0%} off the plan"
        lines.append(f"{phase.name}: planned {planned:.1f} GB, measured {measured:.1f}{verdict}")
    return lines


def _roles(config: Config, hf_configs: dict, ds: dict, world: int) -> tuple[Role, ...]:
    roles = []
    for name, hf_config in hf_configs.items():
        kinds = {"actor": "policy", "reference": "policy", "critic": "critic"}
        shape, zero = _shape(_Key(hf_config), kinds.get(name, "reward")), Zero.of(ds[name])
        trained = name in ("actor", "critic")
        if trained:
            states = model.trained_states(shape, zero, world, getattr(config, name).optimizer)
        else:
            states = model.frozen_states(shape, zero, world)
        roles.append(Role(name=name, shape=shape, zero=zero, states=states, trained=trained))
    return tuple(roles)


class _Key:
    """A configuration that a cache can tell from others by its text."""

    def __init__(self, hf_config: Any):
        self.hf_config, self._text = hf_config, hf_config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: Any) -> bool:
        return self._text == other._text


@cache
def _shape(key: _Key, kind: str) -> Shape:
    return shape_of(key.hf_config, kind)


class _Planner:
    def __init__(self, config: Config, roles: tuple[Role, ...], hardware: Hardware):
        self.config, self.roles, self.hw = config, roles, hardware
        self.by_name = {role.name: role for role in roles}
        self.actor = self.by_name["actor"]
        ppo = config.ppo
        rows = math.ceil(ppo.rows_per_step / hardware.world)
        self.work = Work(
            rows=rows,
            prompt=config.data.max_prompt_tokens,
            response=config.sampling.max_new_tokens,
            score_pieces=math.ceil(rows / ppo.score_batch_size),
            train_pieces=math.ceil(rows / ppo.micro_batch_size),
            epochs=ppo.epochs,
            updates=ppo.optimizer_steps_per_step,
        )
        self.resident = self._resident(roles)
        self.host = self._host(roles)
        self.tp = self._tp()

    def plan(self) -> Plan:
        generate, slots, wanted = self._generate()
        phases = [self._load(), generate, *self._scores(), *self._updates(), self._save()]
        room = self.hw.usable - sum(self.resident.values())
        return Plan(
            hardware=self.hw,
            roles=self.roles,
            phases=tuple(phases),
            tp=self.tp,
            micro_batch=self._largest_micro_batch(room),
            kv_slots=slots,
            kv_wanted=wanted,
            refuse_reason=self._refusal(phases, slots),
        )

    def _resident(self, roles: Iterable[Role]) -> dict[str, float]:
        """What is on the GPU in every phase: 'actor fp32 master' and so on."""
        return {f"{r.name} {what}": size for r in roles for what, size in r.states.gpu.items()}

    def _host(self, roles: Iterable[Role]) -> float:
        return self.hw.gpus_per_node * sum(role.states.steady_host for role in roles)

    def _tp(self) -> int:
        """As Gearbox chooses it: the least whose shards fill half of what is free."""
        if self.config.rollout.tp or self.hw.world == 1:
            return self.config.rollout.tp or 1
        node, free = self.hw.gpus_per_node, self.hw.usable - sum(self.resident.values())
        sizes = [size for size in range(1, node + 1) if node % size == 0]
        weights = self.actor.zero.size * self.actor.shape.total
        return next((size for size in sizes if weights / size <= free / 2), node)

    def _load(self) -> Phase:
        later = ("moments", "low master bits", "whole")
        gpu = {what: size for what, size in self.resident.items() if not what.endswith(later)}
        read = sum(r.zero.size * r.shape.total for r in self.roles)
        return Phase(name="load", gpu=gpu, host=self.host, seconds=read / plan_time.DISK)

    def _generate(self) -> tuple[Phase, int, int]:
        actor, rollout, work = self.actor, self.config.rollout, self.work
        shape, size = actor.shape, actor.zero.size
        gpu = dict(self.resident)
        gpu["generation shards"] = self._shards()
        gpu["shift staging"] = (rollout.shift_bucket_mb * 2**20 or STAGING) * (self.hw.world > 1)
        prefill = model.scoring_activations(shape, actor.zero, rollout.max_batch_tokens)
        # Logits of the drawing rows in the model's dtype, and the sampler's fp32 form.
        logits = min(rollout.max_sequences, work.rows * self.tp) * shape.vocabulary * (size + 4)
        gpu["prefill and logits"] = prefill + logits
        per_token = shape.kv_bytes_per_token(self.tp, size)
        sequence = math.ceil(work.length / rollout.block_size + 1) * rollout.block_size * per_token
        wanted = min(rollout.max_sequences, work.rows * self.tp)
        free = GPU_CACHE_SHARE * (self.hw.usable - sum(gpu.values()) + gpu["prefill and logits"])
        budget = rollout.kv_cache_gb * GB or free
        slots = max(0, min(wanted, int(budget // sequence)))
        gpu["KV cache"] = float(slots * sequence)
        seconds = plan_time.generate_seconds(
            shape, actor.zero, work, self.hw, self.tp, slots or wanted
        )
        return Phase(name="generate", gpu=gpu, host=self.host, seconds=seconds), slots, wanted

    def _shards(self) -> float:
        """Zero where the generation gear has views of the weights."""
        zero = self.actor.zero
        partitioned = zero.stage == 3 and self.hw.world > 1
        if not partitioned and self.tp == 1 and zero.parameters == "gpu":
            return 0.0
        return zero.size * self.actor.shape.total / self.tp

    def _scores(self) -> list[Phase]:
        named = {"actor": "logprobs", "reference": "reference", "critic": "values"}
        order = [r for r in self.roles if r.name not in named]
        order += [self.by_name[name] for name in named if name in self.by_name]
        return [self._score(role, named.get(role.name, "rewards")) for role in order]

    def _score(self, role: Role, phase: str) -> Phase:
        ppo, work, zero = self.config.ppo, self.work, role.zero
        rows = min(ppo.score_batch_size, work.rows)
        if phase == "rewards":
            reward = next(r for r in self.config.rewards if r.name == role.name)
            rows = min(reward.batch_size, work.rows)
        gpu = dict(self.resident)
        gpu["gathered weights"] = model.live_weights(role.shape, zero, self.hw.world)
        gpu["activations"] = model.scoring_activations(role.shape, zero, rows * work.length)
        if role.shape.head:
            response = rows * work.response
            gpu["logits chunk"] = model.logits_chunk(role.shape, zero, response, training=False)
        seconds = plan_time.score_seconds(role.shape, zero, work, self.hw)
        return Phase(name=phase, gpu=gpu, host=self.host, seconds=seconds)

    def _updates(self) -> list[Phase]:
        return [self._update(role) for role in self.roles if role.trained]

    def _update(self, role: Role) -> Phase:
        zero, shape = role.zero, role.shape
        recompute = getattr(self.config, role.name).gradient_checkpointing
        gpu = self.resident | self._update_parts(role, self.config.ppo.micro_batch_size)
        seconds = plan_time.train_seconds(shape, zero, self.work, self.hw, recompute)
        return Phase(name=f"update_{role.name}", gpu=gpu, host=self.host, seconds=seconds)

    def _update_parts(self, role: Role, rows: int) -> dict[str, float]:
        """The larger of a backward and an optimizer step; they do not meet."""
        zero, shape, world = role.zero, role.shape, self.hw.world
        recompute = getattr(self.config, role.name).gradient_checkpointing
        rows = min(rows, max(1, math.ceil(self.config.ppo.minibatch_size / world)))
        tokens, response = rows * self.work.length, rows * self.work.response
        backward = {
            "gathered weights": model.live_weights(shape, zero, world),
            "activations": model.training_activations(shape, zero, tokens, recompute),
            "logits chunk": model.logits_chunk(shape, zero, response, training=True),
            "gradients in flight": model.reduce_transient(shape, zero, world),
        }
        step = {"optimizer step": model.step_transient(shape, zero, world)}
        if zero.optimizer != "gpu":
            step = {}
        return max(backward, step, key=lambda parts: sum(parts.values()))

    def _save(self) -> Phase:
        trained = [role for role in self.roles if role.trained]
        whole = max(role.zero.size * role.shape.total for role in trained)
        written = sum(plan_time.save_seconds(r.shape, r.zero, self.hw) for r in trained)
        # Export: rank 0 holds the whole model on the host, and gathers a parameter at a time.
        gpu = self.resident | {"one parameter": 4.0 * max(self.actor.shape.numels)}
        return Phase(name="save", gpu=gpu, host=self.host + whole, seconds=written)

    def _largest_micro_batch(self, room: float) -> int:
        most = max(1, math.ceil(self.config.ppo.minibatch_size / self.hw.world))
        trained = [role for role in self.roles if role.trained]

        def holds(rows: int) -> bool:
            return all(sum(self._update_parts(r, rows).values()) <= room for r in trained)

        return next((rows for rows in range(most, 0, -1) if holds(rows)), 0)

    def _refusal(self, phases: list[Phase], slots: int) -> str | None:
        worst = max(phases, key=lambda phase: phase.total)
        if worst.total > self.hw.usable:
            return (
                f"{worst.name} needs {worst.total / GB:.1f} GB of a GPU's "
                f"{self.hw.usable / GB:.1f} usable"
            )
        host = max(phases, key=lambda phase: phase.host)
        if host.host > self.hw.usable_host:
            return (
                f"{host.name} needs {host.host / GB:.1f} GB of a host's "
                f"{self.hw.usable_host / GB:.1f} usable"
            )
        if slots < 1:
            return "generate has no room for the KV cache of one sequence"
        return None
