"""What a cold critic costs: PPO by three recipes on a task with one score, at the end.

    PYTHONPATH=. python tests/cold_critic.py docs/results/cpu-cold-critic.json

A response of a tiny random policy has up to 48 tokens and scores its words with an even id, divided
by 48: to be learned are even words, and not to end early. The value head starts at 0. Compared are
the defaults (lambda 0.95 for advantages and returns), returns with lambda 1 (VC-PPO's decoupled
GAE), and these with a critic that was trained before on the policy as it was (`run.task: critic`).
All else is the same: data, seeds and learning rates.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gearshift.engine.batch import Experience, PromptBatch
from gearshift.engine.checkpoint.export import export_role
from gearshift.engine.config.load import Resolved
from gearshift.engine.config.schema import Config, OptimizerConfig, RunConfig
from gearshift.engine.ppo import PPOTrainer
from gearshift.kernels import ops
from gearshift.launch.pretraining import Patience, settle
from tests.tiny import models as tiny
from tests.tiny import run as tiny_run

VOCABULARY, LONGEST, ROWS = 64, 48, 64
STEPS, PRETRAINING, SEEDS = 24, 20, (0, 1, 2)
RECIPES = {"default": {}, "lam_critic 1": {"lam_critic": 1.0}}
RECIPES["lam_critic 1, pretrained"] = RECIPES["lam_critic 1"]
GOALS = (0.6, 0.7, 0.8, 0.9)  # of the score
REWARD = f"""
def score(prompts, completion_ids, **columns):
    return [sum(i % 2 == 0 and i > 3 for i in ids) / {LONGEST} for ids in completion_ids]
"""


def configuration(folder: Path, seed: int, **ppo: object) -> Config:
    """The defaults of `ppo`, but without a reference: 64 responses a step in two minibatches."""
    settings = {"prompts_per_step": ROWS, "minibatch_size": ROWS // 2, "micro_batch_size": None}
    settings |= {"micro_batch_tokens": 8192, "kl_coef": 0.0}
    base = tiny_run.config(folder, **settings | ppo)
    actor, critic = (OptimizerConfig(lr=lr, schedule="constant") for lr in (3e-3, 6e-3))
    return replace(
        base,
        run=RunConfig(steps=STEPS, seed=seed),
        actor=replace(base.actor, optimizer=actor),
        critic=replace(base.critic, optimizer=critic),
        sampling=replace(base.sampling, max_new_tokens=LONGEST),
        rollout=replace(base.rollout, engine="hf"),
    )


def prompts(seed: int, step: int) -> PromptBatch:
    """Four words each."""
    generator = torch.Generator().manual_seed(1_000 * seed + step)
    ids = torch.randint(4, VOCABULARY, (ROWS, 4), generator=generator)
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        row_ids=torch.arange(ROWS) + step * ROWS,
        columns={},
    )


def variance(values: Tensor, mask: Tensor) -> float:
    return float(values[mask].double().var(correction=0))


def observed(trainer: PPOTrainer, figures: dict[str, float], batch: Experience) -> dict[str, float]:
    """Of a step, before its update: the score; the variance of its advantages, not whitened; and
    the share of the variance of the score, at every token, that the values explain."""
    ppo, mask = trainer.ppo, batch.response_mask
    lams = {"gamma": ppo.gamma, "lam": ppo.lam, "lam_critic": ppo.lam_critic}
    same = (batch.logprobs, batch.logprobs, batch.values, mask, batch.scores)
    raw = ops.kl_reward_gae(*same, kl_coef=0.0, **lams).advantages
    score = batch.scores[:, None].expand_as(batch.values)
    return {
        "score": figures["objective/scores"],
        "length": figures["response_length/mean"],
        "advantage_variance": variance(raw, mask),
        "explained": 1 - variance(score - batch.values, mask) / variance(score, mask),
    }


def steps(trainer: PPOTrainer, seed: int, *, first: int) -> Iterator[tuple[dict, dict]]:
    """(the trainer's figures, ours) of every step. first: number of the first batch of prompts."""
    for step in range(trainer.config.run.steps):
        figures, batch = trainer.step(prompts(seed, first + step))
        yield figures, observed(trainer, figures, batch)


def pretrained(config: Config, seed: int, out: Path) -> int:
    """Writes a critic of the policy as it is to `out`; returns the steps that it took."""
    run = replace(config.run, task="critic", steps=PRETRAINING)
    alone = settle(Resolved(replace(config, run=run), {})).config
    trainer, patience = tiny_run.trainer(alone, steps=PRETRAINING), Patience(alone.critic)
    for figures, _ in steps(trainer, seed, first=STEPS):
        patience.see(figures)
        if patience.over:
            break
    export_role(trainer.critic.model, trainer.actor.tokenizer, out)
    return trainer.steps_done


def run(folder: Path, recipe: str, seed: int) -> dict:
    """A run of one recipe: its figures by step."""
    config, before = configuration(folder, seed, **RECIPES[recipe]), 0
    if recipe.endswith("pretrained"):
        before = pretrained(config, seed, folder / f"critic{seed}")
        config = tiny_run.with_critic(config, folder / f"critic{seed}")
    trainer = tiny_run.trainer(config, steps=STEPS)
    found = [ours for _, ours in steps(trainer, seed, first=0)]
    columns = {key: [round(row[key], 4) for row in found] for key in found[0]}
    name = {"recipe": recipe, "seed": seed, "pretraining_steps": before}
    return name | {"steps_to": steps_to(columns["score"])} | columns


def steps_to(scores: list[float]) -> dict[str, int | None]:
    """By goal the first step after which the mean score of the last five was at least that."""
    means = {end: sum(scores[end - 5 : end]) / 5 for end in range(5, len(scores) + 1)}
    return {
        str(goal): next((end for end, mean in means.items() if mean >= goal), None)
        for goal in GOALS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out, runs = parser.parse_args().out, []
    with tempfile.TemporaryDirectory(prefix="gearshift-") as name, tiny_run.alone():
        folder = Path(name)
        (folder / "reward.py").write_text(REWARD)
        for seed in SEEDS:
            shape = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
            tiny.save_policy(folder / "policy", VOCABULARY, seed, initializer_range=0.1, **shape)
            for recipe in RECIPES:
                runs.append(run(folder, recipe, seed))
                told = ("recipe", "seed", "pretraining_steps", "steps_to")
                print({key: runs[-1][key] for key in told}, flush=True)
    out.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")


if __name__ == "__main__":
    main()
