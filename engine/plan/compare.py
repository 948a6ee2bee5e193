"""Planned beside measured: bytes of each phase, and the share of the GPUs' rate that was of use."""

from dataclasses import replace

from gearshift.engine.phase import Phase
from gearshift.engine.plan.hardware import GB, GPUS
from gearshift.engine.plan.planner import TOLERANCE
from gearshift.engine.plan.record import Plan
from gearshift.engine.plan.seconds import Work, useful_flops


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
    ppo = plan.config.ppo
    response = figures["response_length/mean"]
    work = Work(
        rows=ppo.rows_per_step,
        prompt=figures["tokens"] / ppo.rows_per_step - response,  # type: ignore[arg-type]
        response=response,  # type: ignore[arg-type]
        score_pieces=1,
    )
    useful = sum(
        useful_flops(
            role.shape,
            replace(work, epochs=ppo.passes(role.name)[0]),
            scored=2 if role.name == "actor" else 1,  # generated, and scored
            trained=f"timing_s/update_{role.name}" in figures,
        )
        for role in plan.roles
    )
    rate = plan.hardware.gpu.flops * plan.hardware.world
    return useful / figures["timing_s/step"] / rate
