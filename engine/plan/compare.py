"""Planned beside measured: bytes of each phase, and the share of the GPUs' rate that was of use."""

from collections import defaultdict
from dataclasses import dataclass, replace

from gearshift.engine.models.cast import within_actor
from gearshift.engine.phase import Phase, update_of
from gearshift.engine.plan.bytes import state_elements
from gearshift.engine.plan.hardware import GB, GPUS, Hardware
from gearshift.engine.plan.planner import TOLERANCE
from gearshift.engine.plan.record import Plan, Role
from gearshift.engine.plan.seconds import ADAM_BYTES, Work, forward_flops, useful_flops


def compare(plan: Plan, figures: dict[str, float], *, first: bool) -> list[str]:
    """Planned beside measured memory of a step's phases in GB; deviations above 5 % say so.

    figures: a PPO step's metrics. On GPUs the peak of a phase is compared, which is memory_gb; on
    CPU that holds the interpreter and freed memory, so the states at its end are, from states_gb.
    first: it is the run's first step, before which there are no moments.
    """
    lines, by_title = [], {phase.planned: phase for phase in Phase}
    for phase in plan.phases:
        key = by_title[phase.name]
        if plan.hardware.shared:
            measured, planned = figures.get(f"states_gb/{key}"), plan.trained_bytes(phase)
        else:
            measured, planned = figures.get(f"memory_gb/{key}"), phase.total
        if measured is None:
            continue
        planned = (planned - (plan.not_yet(phase) if first else 0.0)) / GB
        off = measured / planned - 1
        verdict = "" if abs(off) <= TOLERANCE else f" ({off:+.0%})"
        lines.append(f"{phase.name} {planned:.3g}/{measured:.3g}{verdict}")
    return lines


def mfu(plan: Plan, figures: dict[str, float]) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022) of a whole PPO step: multiplications and
    additions that the algorithm needs, per second, over the dense bf16 rate of all GPUs.

    None where that rate is not known, as on CPU. Lengths enter by their means; what is recomputed
    does not count, nor does sampling's padding.
    """
    if plan.hardware.name not in GPUS:
        return None
    work = _work(plan, figures)
    played = 3 if within_actor(plan.config) else 2  # generated, scored, and as the reference
    useful = sum(
        useful_flops(
            role.shape,
            replace(work, epochs=plan.config.ppo.passes(role.name)[0]),
            scored=played if role.name == "actor" else 1,
            trained=f"timing_s/update_{role.name}" in figures,
        )
        for role in plan.roles
    )
    rate = plan.hardware.gpu.flops * plan.hardware.world
    return useful / figures["timing_s/step"] / rate


@dataclass(frozen=True)
class Need:
    """What a phase cannot do without, on one rank: multiplications and additions, and bytes between
    a GPU and its memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Need") -> "Need":
        return Need(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, hardware: Hardware) -> float | None:
        """The floor, by the GPU's data sheet; None where that is not known, as on CPU."""
        if hardware.name not in GPUS:
            return None
        return max(self.flops / hardware.gpu.flops, self.bytes / hardware.gpu.bandwidth)


def needs(plan: Plan, figures: dict[str, float]) -> dict[str, Need]:
    """By phase, as figures name it, of a step whose figures these are.

    Bytes: of the weights, once a pass and once a decode step; of the keys and values that are
    attended to while decoding; and of AdamW's states on a GPU, once an update. Lengths enter by
    their means.
    """
    work, world, ppo = _work(plan, figures), plan.hardware.world, plan.config.ppo
    found: dict[str, Need] = defaultdict(Need)
    for role in plan.roles:
        shape, weights = role.shape, role.shape.weight_bytes(role.zero.size)
        once = Need(sum(forward_flops(shape, work)) / world, weights)
        judged = Phase.REFERENCE if role.name == "reference" else Phase.REWARDS
        found[{"actor": Phase.LOGPROBS, "critic": Phase.VALUES}.get(role.name, judged)] += once
        if role.name == "actor":
            found[Phase.GENERATE] += Need(once.flops, _decoding(plan, role, work, figures))
            if within_actor(plan.config):
                found[Phase.REFERENCE] += once
        if role.trained:
            update = Phase.UPDATE_ACTOR if ppo.update == "joint" else update_of(role.name)
            states = ADAM_BYTES * state_elements(shape, role.zero, world)
            moved = ppo.updates(role.name) * states if role.zero.optimizer == "gpu" else 0.0
            epochs = ppo.passes(role.name)[0]
            passes = epochs * (3 if shape.whole else 2)
            found[update] += Need(passes * once.flops, 2 * epochs * weights + moved)
    return found


def _decoding(plan: Plan, actor: Role, work: Work, figures: dict[str, float]) -> float:
    """Bytes that a rank of a TP group reads while the group decodes."""
    shape, size = actor.shape, actor.zero.size
    tokens = work.rows * plan.tp / plan.hardware.world * work.response
    steps = max(figures["response_length/max"], tokens / max(1, plan.kv_slots))
    context = work.prompt + work.response / 2
    weights = size * (shape.body + (shape.head or shape.embedding)) / plan.tp
    if plan.config.actor.lora.generate == "unmerged":
        weights += shape.weight_bytes(size) - size * shape.total
    return steps * weights + tokens * context * shape.kv_bytes_per_token(plan.tp, size)


def _work(plan: Plan, figures: dict[str, float]) -> Work:
    """Of all ranks, at the mean lengths of a step."""
    ppo, response = plan.config.ppo, figures["response_length/mean"]
    return Work(
        rows=ppo.rows_per_step,
        prompt=figures["tokens"] / ppo.rows_per_step - response,  # type: ignore[arg-type]
        response=response,  # type: ignore[arg-type]
        score_pieces=1,
    )
