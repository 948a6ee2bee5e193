"""Run on ranks: PPO of an actor with LoRA, with DoRA, and of one that trains whole, at TP 1 and 2.

    torchrun --nproc_per_node W adapters_on_ranks.py MODELS OUT

OUT/rank<r>.json: by case the figures of each step, the tokens and the shift of the last.
OUT/<case>: the runs of the cases `lora1` and `dora1` after their second step.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import LoraConfig, RolloutConfig
from gearshift.engine.gearbox.transfer import minimum_bytes
from tests.tiny import run as tiny_run

CASES = [(kind, tp) for kind in ("plain", "lora", "dora") for tp in (1, 2)]


def config(models: Path, kind: str, tp: int = 1, zero: str = "zero3"):
    made = tiny_run.config(models, zero, lr=1e-2)
    lora = LoraConfig(r=0 if kind == "plain" else 4, alpha=8.0, dora=kind == "dora")
    actor, critic = replace(made.actor, lora=lora), replace(made.critic, lora=lora)
    return replace(made, actor=actor, critic=critic, rollout=RolloutConfig(tp=tp))


def run(models: Path, out: Path, kind: str, tp: int) -> dict:
    made = config(models, kind, tp)
    trainer, figures = tiny_run.trainer(made), []
    for step in range(3):
        found, rows = trainer.step(tiny_run.prompts(made.ppo, step))
        figures.append(found)
        if kind != "plain" and tp == 1 and step == 1:
            tiny_run.save(trainer, out / kind)
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
    found = {f"{kind}{tp}": run(models, out, kind, tp) for kind, tp in CASES}
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
