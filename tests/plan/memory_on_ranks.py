"""Run on ranks: what lives in each phase of a PPO step, beside what was planned.

    deepspeed --num_accelerators W memory_on_ranks.py OUT MODEL:PRECISION:SLEEP[:R[:KIND]][,...]

MODEL: directory of a causal LM. PRECISION: the ending of DeepSpeed files, as `zero3_bf16`. SLEEP:
of actor and critic. R: rank of their adapters; KIND: "shared", on one base, or "dora".
OUT/rank<r>.jsonl gets an object per case: measured and planned bytes by phase.

Storages are counted, not the process: a walk over all Python objects finds every tensor, and each
storage counts once, whole. The interpreter, libraries and freed memory are therefore no part of it,
and what a forward or a backward holds for a moment is not either.
"""

import gc
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from gearshift.engine import assemble
from gearshift.engine.batch import PromptBatch
from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import (
    Config,
    CriticConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainedConfig,
)
from gearshift.engine.metrics import StepMetrics
from gearshift.engine.models.cast import cast
from gearshift.engine.plan import planner as memory
from gearshift.engine.plan.hardware import GPUS, Hardware
from gearshift.engine.ppo import PPOTrainer
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.zero.residence import take_turns

PROMPT = RESPONSE = 8
ROWS = 8  # of a step, over all ranks


def live_bytes() -> int:
    """Bytes of all storages that any tensor of this process holds."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = (t.untyped_storage() for t in tensors if t.device.type != "meta")
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def settings(model: str, precision: str, sleep: str, r: str = "0", kind: str = "") -> Config:
    split = precision.endswith("_split")
    frozen = "frozen_zero3_cpu" + ("_bf16" if "bf16" in precision else "")
    optimizer = OptimizerConfig(name="split_adamw" if split else "adamw")
    lora = LoraConfig(r=int(r), dora=kind == "dora")
    trained = {"path": model, "optimizer": optimizer, "sleep": sleep, "lora": lora}
    return Config(
        actor=TrainedConfig(deepspeed=f"actor_{precision}.json", **trained),
        critic=CriticConfig(
            deepspeed=f"critic_{precision}.json", share_base=kind == "shared", **trained
        ),
        reference=ReferenceConfig(deepspeed=f"{frozen}.json"),
        rewards=[RewardConfig(function="gearshift.launch.sentiment:sentiment_of_completion")],
        data=DataConfig(max_prompt_tokens=PROMPT),
        sampling=SamplingConfig(max_new_tokens=RESPONSE),
        rollout=RolloutConfig(tp=1),
        ppo=PPOConfig(prompts_per_step=ROWS, minibatch_size=ROWS, micro_batch_size=2),
    )


def prompts(step: int) -> PromptBatch:
    own = ROWS // dist.get_world_size()
    ids = torch.randint(4, 64, (own, PROMPT), generator=torch.Generator().manual_seed(step))
    rows = torch.arange(own) + own * dist.get_rank() + ROWS * step
    mask = torch.ones_like(ids, dtype=torch.bool)
    columns = {"prompt": [""] * own}
    return PromptBatch(prompt_ids=ids, prompt_mask=mask, row_ids=rows, columns=columns)


@contextmanager
def watching(seen: dict[str, int]):
    """Notes what lives at the end of each phase, in `generate` before its cache is given back."""
    phase, generate = StepMetrics.phase, RolloutEngine.generate

    @contextmanager
    def watched_phase(self, name):
        with phase(self, name):
            yield
            if name in ("values", "update_actor", "update_critic"):
                seen[name] = live_bytes()

    def watched_generate(self, *args, **kwargs):
        done = generate(self, *args, **kwargs)
        seen["generate"] = live_bytes()
        return done

    StepMetrics.phase, RolloutEngine.generate = watched_phase, watched_generate
    yield
    StepMetrics.phase, RolloutEngine.generate = phase, generate


def measure(config: Config) -> tuple[dict[str, int], dict[str, float]]:
    """(bytes by phase of the second step, that step's figures); of the third where the roles take
    turns, before which the actor, whose states are the larger, trained last."""
    before = live_bytes()
    roles = assemble.build(assemble.draw_up(config), 10, None)
    trainer = PPOTrainer(config, roles)
    earlier = 2 if take_turns(trainer.residence.sleeps, joint=False) else 1
    for step in range(earlier):
        trainer.step(prompts(step))
    seen: dict[str, int] = {}
    with watching(seen):
        figures, _ = trainer.step(prompts(earlier))
    for role in (roles.actor, roles.critic):
        role.engine.destroy()
    return {name: size - before for name, size in seen.items()}, figures


def planned(config: Config) -> dict[str, dict[str, float]]:
    """The same from the plan: states of device and host together, as both are one memory here, the
    room of those who sleep, and in generation the cache and the shards."""
    place = Hardware(
        gpu=GPUS["h100"], name="cpu", gpus_per_node=2, nodes=1, host_bytes=64e9, shared=True
    )
    made = memory.plan(config, cast(config), place)
    states = {f"{role.name} {what}" for role in made.roles for what in role.states.gpu}
    counted = states | {"generation shards", "KV cache"}
    found = {}
    for phase in made.phases:
        parts = {what: size for what, size in phase.gpu.items() if what in counted}
        buckets = sum(size for what, size in parts.items() if what.endswith("reduce buckets"))
        found[phase.name] = {
            "bytes": sum(parts.values()) + phase.host / place.gpus_per_node,
            "buckets": buckets,
            "states": made.trained_bytes(phase),
        }
    return found


def main(out: str, cases: str) -> None:
    distributed.start(threads=1)
    gc.freeze()  # the libraries' million objects: a walk leaves them out
    with Path(out, f"rank{dist.get_rank()}.jsonl").open("w") as log:
        for case in cases.split(","):
            config = settings(*case.split(":"))
            measured, figures = measure(config)
            states = {k: v for k, v in figures.items() if k.startswith("states_gb/")}
            found = {"case": case, "planned": planned(config), "measured": measured}
            print(json.dumps(found | {"states": states}), file=log, flush=True)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
