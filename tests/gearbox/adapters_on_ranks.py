"""Run on ranks: PPO of an actor with adapters, and of one that trains whole, at TP 1 and 2.

    torchrun --nproc_per_node W adapters_on_ranks.py MODELS OUT

OUT/rank<r>.json: by case the figures of each step, the tokens and the shift of the last.
OUT/checkpoints: the run of the case `lora1` after its second step.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import LoraConfig, RolloutConfig
from gearshift.engine.gearbox.transfer import minimum_bytes
from tests.tiny import run as tiny_run

CASES = {"plain1": (0, 1), "plain2": (0, 2), "lora1": (4, 1), "lora2": (4, 2)}


def config(models: Path, r: int, tp: int, zero: str = "zero3"):
    made = tiny_run.config(models, zero, lr=1e-2)
    actor = replace(made.actor, lora=LoraConfig(r=r, alpha=8.0))
    critic = replace(made.critic, lora=LoraConfig(r=r, alpha=8.0))
    return replace(made, actor=actor, critic=critic, rollout=RolloutConfig(tp=tp))


def run(models: Path, out: Path, case: str) -> dict:
    made = config(models, *CASES[case])
    trainer, figures = tiny_run.trainer(made), []
    for step in range(3):
        found, rows = trainer.step(tiny_run.prompts(made.ppo, step))
        figures.append(found)
        if case == "lora1" and step == 1:
            tiny_run.save(trainer, out / "checkpoints")
    gearbox = trainer.actor.gearbox
    return {
        "figures": figures,
        "tokens": rows.response_ids.tolist(),
        "received": gearbox.stats.bytes_received,
        "minimum": gearbox.stats.bytes_minimum,
        "of_adapters": minimum_bytes(gearbox._passing, gearbox._topology),
        "left": sum(p.numel() for p in gearbox.module.parameters()),
    }


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start(1)
    found = {case: run(models, out, case) for case in CASES}
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
