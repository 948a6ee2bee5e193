"""Run on ranks: PPO runs whose actor and critic sleep, beside the same runs with all resident.

    torchrun --nproc_per_node W sleep_on_ranks.py MODELS OUT

OUT/rank<r>.json: by case, whether weights and figures equal the resident run's, and the bytes of
each phase, as the roles report them and as a walk over all live tensors finds them.
"""

import gc
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from gearshift.engine.checkpoint.export import whole_weights
from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.metrics import StepMetrics
from gearshift.engine.phase import Phase
from tests.tiny import run as tiny_run

SPLIT = {"name": "split_adamw"}
# End of the DeepSpeed files' names, optimizer, and the kinds of sleep that are compared.
CASES = {
    "zero0": ("zero0", {}, ("always",)),
    "zero1_bf16": ("zero1_bf16", {}, ("exchange",)),
    "zero3": ("zero3", {}, ("gradients", "exchange")),
    "split1": ("zero1_bf16_split", SPLIT, ("exchange",)),
    "split2": ("zero2_bf16_split", SPLIT, ("exchange",)),
    "split3_bf16": ("zero3_bf16_split", SPLIT | {"moments": "bf16"}, ("always",)),
}
STEPS = 2
WALKED = ("generate", "update_actor", "update_critic")  # of the last step


def write_settings(folder: Path) -> None:
    """A DeepSpeed file beside the shipped ones: stage 1 in bf16."""
    if not distributed.is_main():
        return
    for role in ("actor", "critic"):
        one = ds_config.load(f"{role}_zero2_bf16") | {"zero_optimization": {"stage": 1}}
        (folder / f"{role}_zero1_bf16.json").write_text(json.dumps(one))


def settings(models: Path, zero: str, optimizer: dict, sleep: str):
    plain = tiny_run.config(models, zero)
    chosen = replace(plain.actor.optimizer, **optimizer)
    actor = replace(plain.actor, optimizer=chosen, sleep=sleep)
    return replace(plain, actor=actor, critic=replace(plain.critic, optimizer=chosen, sleep=sleep))


def live_bytes(but: torch.Tensor | None = None) -> int:
    """Bytes of all storages that any tensor of this process holds; one of them left out."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage() for t in tensors if t.device.type != "meta"}
    found = {s.data_ptr(): s.nbytes() for s in storages}
    if but is not None:
        found.pop(but.untyped_storage().data_ptr())
    return sum(found.values())


def besides(trainer) -> int:
    """What lives that is neither a state of actor and critic on the device nor their host room."""
    exchange = trainer.residence.exchange
    arena = exchange.arena.memory if exchange else None
    return live_bytes(arena) - sum(trainer.residence.device_bytes().values())


@contextmanager
def watching(trainer, seen: dict):
    """Notes the bytes at the start of every phase, host memory of sleepers left out."""
    original = StepMetrics.phase

    @contextmanager
    def phase(self, name):
        if name in WALKED:
            roles = trainer.residence.device_bytes()
            seen[name] = {"besides": besides(trainer), "roles": roles}
        with original(self, name):
            yield

    StepMetrics.phase = phase
    yield
    StepMetrics.phase = original


def run(config) -> dict:
    trainer = tiny_run.trainer(config)
    loaded = besides(trainer)
    seen: dict = {}
    figures = []
    for step in range(STEPS - 1):
        figures.append(trainer.step(tiny_run.prompts(config.ppo, step))[0])
    with watching(trainer, seen):
        figures.append(trainer.step(tiny_run.prompts(config.ppo, STEPS - 1))[0])
    weights = {
        **{f"actor {k}": v for k, v in whole_weights(trainer.actor.lm).items()},
        **{f"critic {k}": v for k, v in whole_weights(trainer.critic.model).items()},
    }
    timeless = ("timing_s/", "memory_gb/", "throughput/", "states_gb/", "perf/")
    figures = [{k: v for k, v in f.items() if not k.startswith(timeless)} for f in figures]
    trainer.residence.enter(Phase.GENERATE)
    state = [
        t.clone() for sleeper in trainer.residence.sleepers.values() for _, t in sleeper.tensors()
    ]
    host = trainer.residence.host_bytes
    for role in (trainer.actor, trainer.critic):
        role.engine.destroy()
    learned = {"weights": weights, "state": state, "figures": figures}
    return learned | {"seen": seen, "besides": loaded, "host": host}


def same(a: dict, b: dict) -> dict[str, bool]:
    return {
        "weights": a["weights"].keys() == b["weights"].keys()
        and all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"]),
        "state": len(a["state"]) == len(b["state"])
        and all(map(torch.equal, a["state"], b["state"])),
        "figures": a["figures"] == b["figures"],
    }


def measured(result: dict) -> dict:
    return {key: result[key] for key in ("seen", "besides", "host")}


def compare(models: Path, cases: list[str]) -> dict:
    found = {}
    for name in cases:
        zero, optimizer, sleeps = CASES[name]
        resident = run(settings(models, zero, optimizer, "never"))
        found[name] = {"never": measured(resident)}
        for sleep in sleeps:
            slept = run(settings(models, zero, optimizer, sleep))
            found[name][sleep] = measured(slept) | {"same": same(resident, slept)}
    return found


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start(1)
    gc.freeze()  # the libraries' million objects: a walk leaves them out
    write_settings(models)
    distributed.barrier()
    found = compare(models, list(CASES) if len(sys.argv) < 4 else sys.argv[3].split(","))
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
