"""Run on ranks: a run that is interrupted and taken up again beside one that is not.

    torchrun --nproc_per_node W save_on_ranks.py MODELS OUT

OUT/whole.pt and OUT/resumed.pt: weights, optimizer states (rank 0's part), random numbers and
figures of the last two of four steps. OUT/checkpoints: the folder of the first run. OUT/export: its
Hugging Face directories, and OUT/tables.pt the logits and values that its engines give.
OUT/told.json: what was said of saves that failed on the way, in OUT/interrupted.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.checkpoint import store as checkpoint_store
from gearshift.engine.checkpoint.export import export, whole_weights
from gearshift.engine.checkpoint.save import Checkpoints
from gearshift.engine.cluster import distributed
from gearshift.engine.models.reading import lay_out
from gearshift.engine.ppo import PPOTrainer
from tests.tiny import run as tiny_run

CHANGES = {"micro_batch_size": 1, "kl_controller": "adaptive", "kl_horizon": 20, "kl_target": 0.01}


class Prompts:
    """A stream with a position."""

    def __init__(self, ppo):
        self.ppo, self.step = ppo, 0

    def next_batch(self):
        self.step += 1
        return tiny_run.prompts(self.ppo, self.step - 1)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def start(models: Path) -> tuple[PPOTrainer, Prompts]:
    config = tiny_run.config(models, "zero3", "tied", **CHANGES)
    return tiny_run.trainer(config), Prompts(config.ppo)


def advance(trainer: PPOTrainer, stream: Prompts, steps: int) -> list[dict]:
    return [trainer.step(stream.next_batch())[0] for _ in range(steps)]


def state(trainer: PPOTrainer, figures: list[dict]) -> dict:
    roles = {"actor": trainer.actor, "critic": trainer.critic}
    modules = {"actor": trainer.actor.lm, "critic": trainer.critic.model}
    return {
        "weights": {name: whole_weights(module) for name, module in modules.items()},
        "moments": {name: moments(role.optimizer) for name, role in roles.items()},
        "schedule": {
            name: role.schedule.state_dict()["last_epoch"] for name, role in roles.items()
        },
        "kl_coef": trainer.kl.coef,
        "random": [random.random(), float(np.random.rand()), float(torch.rand(()))],
        "figures": figures,
    }


def moments(optimizer) -> list[torch.Tensor]:
    return [
        value.clone()
        for entry in optimizer.optimizer.state.values()
        for name, value in sorted(entry.items())
        if isinstance(value, torch.Tensor)
    ]


def tables(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Log-probs and values of a fixed batch, from the engines."""
    ids = torch.arange(12).view(2, 6)
    reading, places = lay_out(ids, torch.ones_like(ids, dtype=torch.bool), packs=True)
    before = places[:, :-1].flatten()
    with torch.no_grad():
        logprobs = trainer.actor.engine(
            reading, before, lambda rows, weight, bias: (rows @ weight.T).log_softmax(-1)
        )
        values = trainer.critic.engine(reading, places.flatten()).view(2, 6)
    return {"actor": logprobs.view(2, 5, -1), "critic": values}


def save(checkpoints: Checkpoints, trainer: PPOTrainer, stream: Prompts) -> None:
    checkpoints.take(trainer, {"prompts": stream}, reward=float(trainer.steps_done))
    checkpoints.publish()


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start(1)
    torch.manual_seed(5 + distributed.rank())  # generators of its own on every rank
    checkpoints = Checkpoints(out / "checkpoints", keep=1, background=True)
    trainer, stream = start(models)
    advance(trainer, stream, 1)
    save(checkpoints, trainer, stream)
    advance(trainer, stream, 1)
    save(checkpoints, trainer, stream)
    whole = state(trainer, advance(trainer, stream, 2))  # while a thread writes
    checkpoints.settle()
    read = tables(trainer)
    tokenizer = trainer.actor.tokenizer
    export(trainer.actor.lm, tokenizer, out / "export" / "actor")
    export(trainer.critic.model, tokenizer, out / "export" / "critic")
    del trainer

    other, stream = start(models)
    remarks = checkpoint.load(out / "checkpoints" / "step_000002", other, {"prompts": stream})
    assert remarks == []
    resumed = state(other, advance(other, stream, 2))
    for name, content in (("whole", whole), ("resumed", resumed)):
        if distributed.is_main():
            torch.save(content, out / f"{name}.pt")
        torch.save(content["random"], out / f"{name}.random{distributed.rank()}.pt")
    if distributed.is_main():
        torch.save(read, out / "tables.pt")
    interrupt(other, stream, out)


def interrupt(trainer: PPOTrainer, stream: Prompts, out: Path) -> None:
    """The second rank's disk is full for a while, with and without a thread that writes."""
    told, tries = [], []
    write = checkpoint_store.write_tensors

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for background in (True, False):
        folder = out / "interrupted" / ("thread" if background else "wait")
        checkpoints = Checkpoints(folder, keep=2, background=background, tell=told.append)
        save(checkpoints, trainer, stream)
        checkpoints.settle()
        checkpoint_store.write_tensors = full if distributed.rank() == 1 else write
        for _ in range(2):
            trainer.steps_done += 1
            save(checkpoints, trainer, stream)
            checkpoints.settle()
            tries.append(checkpoints.retry)
        checkpoint_store.write_tensors = write
        if not background:
            trainer.steps_done += 1
            save(checkpoints, trainer, stream)
            checkpoints.settle()
            tries.append(checkpoints.retry)
    if distributed.is_main():
        (out / "told.json").write_text(json.dumps({"told": told, "retry": tries}))


if __name__ == "__main__":
    main()
