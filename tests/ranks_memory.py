"""Run on ranks: the tensors that live after each phase of a step, beside what was planned.

    deepspeed --num_accelerators W ranks_memory.py OUT MODEL:PRECISION[,MODEL:PRECISION]

MODEL: directory of a causal LM. PRECISION: the ending of DeepSpeed files, `zero3` or `zero3_bf16`.
OUT/rank<r>.jsonl gets one object per case: measured and planned bytes of the states by phase.

Storages are counted, not the process: a walk over all Python objects finds every tensor, and each
storage counts once, whole. The interpreter, libraries and freed memory are therefore no part of it.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gearshift.engine import assemble, distributed, memory, plan_inputs
from gearshift.engine.config import (
    Config,
    CriticConfig,
    DataConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainedConfig,
)
from gearshift.engine.hardware import GPUS, Hardware


def live_bytes() -> int:
    """Bytes of all storages that any tensor of this process holds."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = (t.untyped_storage() for t in tensors if t.device.type != "meta")
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def settings(model: str, precision: str) -> Config:
    frozen = "frozen_" + precision.replace("zero3", "zero3_cpu")
    return Config(
        actor=TrainedConfig(path=model, deepspeed=f"actor_{precision}.json"),
        critic=CriticConfig(deepspeed=f"critic_{precision}.json"),
        reference=ReferenceConfig(deepspeed=f"{frozen}.json"),
        rewards=[RewardConfig(function="gearshift.launch.sentiment:sentiment_of_completion")],
        data=DataConfig(max_prompt_tokens=8),
        sampling=SamplingConfig(max_new_tokens=8),
        rollout=RolloutConfig(tp=1),
        ppo=PPOConfig(prompts_per_step=2, minibatch_size=2, micro_batch_size=1),
    )


def update(role) -> None:
    """One optimizer step of a loss that every weight has a part in."""
    ids = torch.arange(8)[None]
    live = torch.ones_like(ids, dtype=torch.bool)
    role.engine.train()
    if hasattr(role, "lm"):
        out = role.engine(ids, live, live[:, 1:], lambda hidden, weight, bias: hidden @ weight.t())
    else:
        out = role.engine(ids, live, 7)
    role.backward(out.float().sum(), last=True)
    role.step()


def measure(config: Config) -> dict[str, int]:
    before = live_bytes()
    roles = assemble.build(assemble.draw_up(config), 10, None)
    measured = {"load": live_bytes() - before}
    for name in ("actor", "critic"):
        update(getattr(roles, name))
        measured[f"update_{name}"] = live_bytes() - before
    with roles.actor.gearbox.generation():
        measured["generate"] = live_bytes() - before
    for role in (roles.actor, roles.critic, roles.reference):
        role.engine.destroy()
    return measured


def planned(config: Config) -> dict[str, float]:
    """The same from the plan: states of GPU and host together, as both are the host here."""
    place = Hardware(gpu=GPUS["h100"], name="two ranks", gpus_per_node=2, nodes=1, host_bytes=64e9)
    made = memory.plan(config, *plan_inputs.read(config), place)
    phases = {phase.name: phase for phase in made.phases}
    states = {role.name: role.states for role in made.roles}
    host = sum(unrounded(s) for s in states.values())
    whole = host + sum(s.steady for s in states.values())
    later = ("moments", "small weights, whole")
    critic_step = sum(states["critic"].gpu[what] for what in later)
    return {
        "buckets": sum(states[name].gpu["reduce buckets"] for name in ("actor", "critic")),
        "load": host + phases["load"].total,
        "update_actor": whole - critic_step,
        "update_critic": whole,
        "generate": whole + phases["generate"].gpu["generation shards"],
    }


def unrounded(states: memory.States) -> float:
    """Nothing is pinned without a GPU."""
    return states.steady_host - states.host.get("pinned rounding", 0.0)


def main(out: str, cases: str) -> None:
    distributed.start(threads=1)
    with Path(out, f"rank{dist.get_rank()}.jsonl").open("w") as log:
        for case in cases.split(","):
            config = settings(*case.split(":"))
            found = {"case": case, "planned": planned(config), "measured": measure(config)}
            print(json.dumps(found), file=log, flush=True)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
