"""Run on ranks: PPO of actor and critic with adapters, on a base each and on one that they share.

    torchrun --nproc_per_node W share_on_ranks.py MODELS OUT

MODELS: of tiny_run.write_models, and `judge`, a directory of peft with a reward model's adapters.
OUT/rank<r>.json: by case what `run` gives of two steps, of one more, and of that one taken up from
a checkpoint, and bytes on the device. OUT/<case>: that checkpoint, and the exports of actor and
critic. The case `judged`, of one step, has the adapters of a reward model on the same base, too.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.checkpoint.export import export_role
from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import Config, LoraConfig, RewardConfig
from gearshift.engine.ppo import PPOTrainer
from gearshift.engine.zero import state
from gearshift.engine.zero.layout import partition
from tests.tiny import run as tiny_run

COSTS = ("timing_s/", "memory_gb/", "states_gb/", "throughput/")


def config(models: Path, share: bool, zero: str = "zero3", **ppo) -> Config:
    made = tiny_run.config(models, zero, lr=1e-2, **ppo)
    lora = LoraConfig(r=4, alpha=8.0)
    actor = replace(made.actor, lora=lora)
    return replace(made, actor=actor, critic=replace(made.critic, lora=lora, share_base=share))


def run(made: Config, steps: range, trainer: PPOTrainer | None = None) -> tuple[PPOTrainer, dict]:
    """(the trainer, its numbers): figures of each step that measure no machine, the tokens of the
    last, and sums of all that an optimizer holds."""
    trainer, figures = trainer or tiny_run.trainer(made), []
    for step in steps:
        found, rows = trainer.step(tiny_run.prompts(made.ppo, step))
        figures.append({k: v for k, v in found.items() if not k.startswith(COSTS)})
    views = {
        f"{role} {name}": view.double().sum().item()
        for role in ("actor", "critic")
        for name, view in state.tensors(getattr(trainer, role).engine)[0].items()
    }
    return trainer, {"figures": figures, "tokens": rows.response_ids.tolist(), "views": views}


def judged(models: Path, path: str = "judge") -> Config:
    """Four roles on one base: the actor is its own reference."""
    made = config(models, True)
    judge = RewardConfig(kind="model", path=str(models / path), deepspeed="frozen_zero3.json")
    return replace(made, critic=replace(made.critic, path=made.actor.path), rewards=[judge])


def weights(trainer: PPOTrainer) -> int:
    """Bytes of storages that parameters of any role, or their partitions, are in."""
    judges = trainer.roles.rewards._scorers.values()
    storages = [
        tensor.untyped_storage()
        for role in (trainer.actor, trainer.critic, *judges)
        for parameter in role.engine.module.parameters()
        for tensor in (parameter, partition(parameter))
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start(1)
    found = {}
    for case, share in (("apart", False), ("shared", True)):
        made = config(models, share)
        trainer, begun = run(made, range(2))
        held = trainer.residence.device_bytes()
        tiny_run.save(trainer, out / case)
        for role, module in (("actor", trainer.actor.lm), ("critic", trainer.critic.model)):
            export_role(module, trainer.actor.tokenizer, out / case / role)
        _, straight = run(made, range(2, 3), trainer)
        again = tiny_run.trainer(made)
        checkpoint.load(out / case / "step_000002", again, {})
        _, resumed = run(made, range(2, 3), again)
        found[case] = {"begun": begun, "straight": straight, "resumed": resumed, "bytes": held}
    trainer = tiny_run.trainer(judged(models))
    found["judged"] = {"rest": weights(trainer)}
    found["judged"] |= run(judged(models), range(1), trainer)[1]
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
