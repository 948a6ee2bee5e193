"""The plan at start-up: what this machine is, what the run leaves open, and whether it can fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gearshift.engine.attention.packed import by_layer
from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.memory import host_memory
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import Config
from gearshift.engine.models.cast import Part
from gearshift.engine.plan import advice as plan_advice
from gearshift.engine.plan.hardware import GPUS, Gpu, Hardware
from gearshift.engine.plan.planner import plan
from gearshift.engine.plan.record import Plan

_NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Start:
    """plan: None where a model cannot be planned. said: a line for the console. warning: one that
    should be seen."""

    plan: Plan | None
    said: str
    warning: str | None = None


def plan_run(config: Config, parts: dict[str, Part], hardware: Hardware) -> Start:
    """The plan of a run that is about to start.

    parts: of models.cast. Raises ConfigError where even all memory of the machine is too little,
    unless run.ignore_plan. What fits into all of it but not into what is usually left is only
    warned of.
    """
    for name, part in parts.items():
        text = part.hf_config.get_text_config()
        missing = [key for key in _NEEDED if not hasattr(by_layer(text)[0], key)]
        if missing or part.section.trust_remote_code:
            why = "its code is its own" if not missing else f"its configuration has no {missing[0]}"
            return Start(plan=None, said=f"memory not planned: {name}: {why}")
    made = plan(config, parts, hardware)
    if made.fits:
        return Start(plan=made, said=f"plan: fits; {made.told}")
    advice = plan_advice.advise(config, parts, hardware)
    problem = f"{made.refuse_reason}; {advice}"
    if impossible(made) and not config.run.ignore_plan:
        anyway = "run.ignore_plan=true starts it anyway"
        raise ConfigError("", f"this run cannot fit: {problem}", anyway)
    return Start(plan=made, said=f"plan: {made.told}", warning=f"may not fit: {problem}")


def impossible(made: Plan) -> bool:
    """Whether a phase needs more than all there is, nothing kept back for anything else."""
    hardware = made.hardware
    if hardware.shared:
        return not made.fits
    gpu = max(phase.total for phase in made.phases)
    host = max(phase.host for phase in made.phases)
    return gpu > hardware.gpu.memory or host > hardware.host_bytes


def this_machine(device: torch.device) -> Hardware:
    """What this rank runs on; every node is taken to be as its own.

    A GPU that hardware.py does not know has its own memory and an H100's rates: its seconds are
    wrong, its bytes are right. CPU ranks share the host's memory and have made-up rates, too.
    """
    ranks = distributed.ranks_per_node()
    host = host_memory()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = known_gpu(properties.name, properties.total_memory)
        gpu = replace(GPUS[name or "h100"], memory=properties.total_memory)
    else:
        name, gpu = "cpu", replace(GPUS["h100"], memory=host)
    return Hardware(
        gpu=gpu,
        name=name or "unknown",
        gpus_per_node=ranks,
        nodes=distributed.world_size() // ranks,
        host_bytes=host,
        shared=device.type != "cuda",
    )


def least(machines: Sequence[Hardware]) -> Hardware:
    """What every rank has: all must make the same choices, though nodes differ by some bytes."""
    smallest = min(machines, key=lambda machine: machine.gpu.memory)
    return replace(smallest, host_bytes=min(machine.host_bytes for machine in machines))


def known_gpu(product: str, memory: float) -> str | None:
    """Our name of a GPU that the driver calls `product`, as "NVIDIA A100-SXM4-80GB"."""
    words = product.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("-", " ").split()
    same = [name for name in GPUS if name.split("-")[0] in words and _as_large(GPUS[name], memory)]
    return same[0] if len(same) == 1 else None


def _as_large(gpu: Gpu, memory: float) -> bool:
    return abs(gpu.memory / memory - 1) < 0.05
