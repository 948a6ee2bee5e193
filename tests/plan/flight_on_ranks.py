"""Run on one rank: bytes of gradients near the end of each micro-batch's backward.

    flight_on_ranks.py OUT MODEL ENDING[,...]

ENDING: of DeepSpeed files, as zero1_bf16_split; their reduce bucket is made small, since it would
hide the gradients of so small a model. OUT/rank0.jsonl gets an object per ending.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

from gearshift.engine import assemble
from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed
from gearshift.engine.models.shapes import shape_of
from gearshift.engine.plan import bytes as model
from gearshift.engine.ppo import PPOTrainer
from tests.plan import memory_on_ranks as memory

BUCKET = 1000  # elements


def in_flight(trainer: PPOTrainer) -> list[int]:
    """Beside what lives between two steps, of each backward of the actor's, when the gradient
    comes to the embeddings: all others are there."""
    seen: list[int] = []

    def watch(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda _: seen.append(memory.live_bytes() - rest))

    embeddings = trainer.actor.lm.get_input_embeddings().register_forward_hook(watch)
    rest = memory.live_bytes()
    trainer.step(memory.prompts(1))
    embeddings.remove()
    return seen


def measured(model_path: str, ending: str, out: Path) -> dict:
    settings = json.loads(deepspeed.find(f"trained_{ending}.json").read_text())
    settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
    path = out / f"{ending}.json"
    path.write_text(json.dumps(settings))
    config = memory.settings(model_path, ending, "never")
    config = replace(config, actor=replace(config.actor, deepspeed=str(path)))
    roles = assemble.build(assemble.draw_up(config), 10, None)
    trainer = PPOTrainer(config, roles)
    trainer.step(memory.prompts(0))
    shape = shape_of(roles.actor.lm.config, "policy")
    planned = model.reduce_transient(shape, model.Zero.of(settings), 1, several=True)
    largest = max(shape.numels) * 4.0  # whole, and the copy that is communicated
    found = {"ending": ending, "parameters": shape.total, "seen": in_flight(trainer)}
    for role in (roles.actor, roles.critic):
        role.engine.destroy()
    return found | {"planned": planned, "largest": largest}


def main(out: Path, model_path: str, endings: str) -> None:
    distributed.start(threads=1)
    gc.freeze()
    with (out / "rank0.jsonl").open("w") as log:
        for ending in endings.split(","):
            print(json.dumps(measured(model_path, ending, out)), file=log, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
