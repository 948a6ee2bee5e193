"""Run on ranks: faults of the second rank only, and what every rank makes of them.

    torchrun --nproc_per_node 2 guards_on_ranks.py MODELS OUT

OUT/rank<r>.jsonl: a line per case, with the guards' figures and alarms on that rank.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import GuardConfig
from gearshift.engine.zero.unreached import GradientWatch
from tests.engine.test_guards import same, state
from tests.tiny import run as tiny_run

REWARD = """
def score(completion_ids, **columns):
    if {poisoned}:
        1 / min(len(ids) != {length} for ids in completion_ids)
    return [float(len(ids)) for ids in completion_ids]
"""


def trainer(models: Path, **changes):
    config = tiny_run.config(models, "zero3")
    guards = GuardConfig(failed_reward_share=0.2)
    return tiny_run.trainer(replace(config, guards=guards, **changes))


def step(trainer) -> tuple:
    figures, experience = trainer.step(tiny_run.prompts(trainer.ppo, trainer.steps_done))
    guards = {name: value for name, value in figures.items() if name.startswith("guards/")}
    alarms = [alarm.text for alarm in trainer.guards.drain()]
    return {"figures": guards, "alarms": alarms}, figures, experience


def reward(models: Path) -> dict:
    """One row of the second rank raises; it gets the mean of both ranks' others."""
    probe = trainer(models)
    rollout = probe.actor.generate(tiny_run.prompts(probe.ppo, 0), probe.config.sampling)
    lengths = rollout.lengths.tolist()
    alone = next(n for n in lengths if lengths.count(n) == 1)
    second = distributed.rank() == 1
    file = models / f"reward_of_rank{distributed.rank()}.py"
    file.write_text(REWARD.format(poisoned=second, length=alone))
    source = replace(probe.config.rewards[0], function=f"{file}:score")
    line, figures, _ = step(trainer(models, rewards=[source]))
    live = torch.tensor([sum(lengths) - alone * second, len(lengths) - second])
    total, rows = distributed.global_sum(live).tolist()
    return line | {"scores_mean": figures["objective/scores"], "mean_of_others": total / rows}


def nonfinite(models: Path) -> dict:
    """The critic's value of one row of the second rank is no number."""
    run = trainer(models)
    step(run)
    before = list(state(run.actor))
    values = run.critic.values

    def poisoned(rollout):
        found, after = values(rollout)
        found[rollout.row_ids == 13, 0] = torch.nan
        return found, after

    run.critic.values = poisoned
    line, *_ = step(run)
    return line | {"unchanged": same(before, run.actor)}


def frozen(models: Path) -> dict:
    """A parameter that is cut off on both ranks; and, in a plain module, one on the first only."""
    run = trainer(models)
    mlp = run.actor.lm.model.layers[1].mlp
    mlp.up_proj.register_forward_hook(lambda *args: args[-1].detach())
    layers = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    watch = GradientWatch(layers)
    layers[: 1 + distributed.rank()](torch.ones(1, 2)).sum().backward()
    return step(run)[0] | {"unreached": watch.unreached(torch.device("cpu"))}


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start(1)
    with (out / f"rank{distributed.rank()}.jsonl").open("w") as file:
        for case in (reward, nonfinite, frozen):
            file.write(json.dumps({"case": case.__name__} | case(models)) + "\n")


if __name__ == "__main__":
    main()
