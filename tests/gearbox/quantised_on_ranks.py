"""Run on ranks: PPO of actor and critic with adapters beside weights in 4 bit, under ZeRO-2.

    torchrun --nproc_per_node W quantised_on_ranks.py MODELS OUT

OUT/rank<r>.json: by case the figures of each step and the tokens of the last. OUT/checkpoints: the
run of the case `unmerged1` after its second step.
"""

import json
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import LoraConfig, RolloutConfig
from tests.tiny import models as tiny
from tests.tiny import run as tiny_run

needs_packing = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CASES = {"unmerged1": ("unmerged", 1), "merged1": ("merged", 1), "merged2": ("merged", 2)}
# Rows of whole blocks of 64.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.1}
SHAPE |= {"attention_bias": True}


def write_models(directory: Path) -> Path:
    wide = tiny.save_policy(directory / "wide", tiny_run.VOCABULARY, seed=5, **SHAPE)
    model = AutoModelForCausalLM.from_pretrained(wide)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(wide)
    return tiny_run.write_models(directory)


def config(models: Path, generate: str = "unmerged", tp: int = 1, zero: str = "zero2", **lora):
    made = tiny_run.config(models, zero, model="wide", lr=1e-2)
    own = LoraConfig(**{"r": 4, "alpha": 8.0, "load_in_4bit": True, "generate": generate} | lora)
    actor = replace(made.actor, lora=own)
    critic = replace(made.critic, lora=LoraConfig(r=2, load_in_4bit=True))
    return replace(made, actor=actor, critic=critic, rollout=RolloutConfig(tp=tp))


def run(models: Path, out: Path, case: str) -> dict:
    made = config(models, *CASES[case])
    trainer, figures = tiny_run.trainer(made), []
    for step in range(3):
        found, rows = trainer.step(tiny_run.prompts(made.ppo, step))
        figures.append(found)
        if case == "unmerged1" and step == 1:
            tiny_run.save(trainer, out / "checkpoints", about={"config": asdict(made)})
    return {"figures": figures, "tokens": rows.response_ids.tolist()}


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start(1)
    found = {case: run(models, out, case) for case in CASES}
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
