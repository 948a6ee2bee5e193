"""Run on ranks: PPO runs of tiny models that must not depend on how they are split.

    torchrun --nproc_per_node W ppo_on_ranks.py MODELS OUT CASE[,CASE]

OUT/<case>.pt gets the weights of actor and critic and the figures of every step.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from gearshift.engine.checkpoint.export import whole_weights
from gearshift.engine.cluster import distributed
from tests.tiny import run as tiny_run

BY_TOKENS = {"micro_batch_size": None}  # a minibatch has four rows of 2 to 12 tokens each

# ZeRO setting, PPO steps, and what is changed: together every loss aggregation, both kinds of
# update, pretraining text, tied weights, an estimator that compares a prompt's samples, and every
# way of dealing rows to micro-batches. `attn` is the actor's.
CASES = {
    "zero3_micro1": ("zero3", 2, {"micro_batch_size": 1, "score_batch_size": 3}),
    "zero2_micro8": ("zero2", 2, {"micro_batch_size": 8}),
    "tokens1": ("zero3", 1, {**BY_TOKENS, "micro_batch_tokens": 1, "score_batch_tokens": 1}),
    "tokens24": ("zero2", 1, {**BY_TOKENS, "micro_batch_tokens": 24, "score_batch_tokens": 24}),
    "tokens10000": ("zero3", 1, {**BY_TOKENS, "micro_batch_tokens": 10_000}),
    "padded": ("zero3", 1, {**BY_TOKENS, "attn": "sdpa", "micro_batch_tokens": 24}),
    "zero2_text": ("zero2", 1, {"ptx_coef": 0.3}),
    "zero0": ("zero0", 1, {}),
    "tied": (
        "zero3",
        1,
        {"micro_batch_size": 1, "loss_aggregation": "token_mean", "update": "joint"}
        | {"vf_coef": 0.5, "ptx_coef": 0.3},
    ),
    "critic": (
        "zero3",
        1,
        {"micro_batch_size": 1, "critic_epochs": 3, "critic_minibatch_size": 8}
        | {"lam_critic": 1.0, "lam_length_alpha": 0.4},
    ),
    "gspo": (
        "zero3",
        1,
        {**BY_TOKENS, "micro_batch_tokens": 24, "policy_loss": "gspo", "clip_high": 0.01}
        | {"rollout_seq_high": 1.5, "rollout_is_low": 0.9},
    ),
    "dr_grpo": (
        "zero2",
        1,
        {"policy_loss": "dr_grpo", "estimator": "grpo", "samples_per_prompt": 2}
        | {"rollout_max_error": 0.5, "rollout_is_cap": 0.9},
    ),
    "grpo": (
        "zero3",
        1,
        {"micro_batch_size": 1, "loss_aggregation": "seq_sum"}
        | {"estimator": "grpo", "samples_per_prompt": 2},
    ),
}


class Text:
    """A stream of pretraining rows, dealt to the ranks."""

    def __init__(self):
        self.step = 0

    def next_batch(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        rows = torch.randint(3, tiny_run.VOCABULARY, (4, 6), generator=generator)
        return rows[distributed.rank() :: distributed.world_size()]


def run(models: Path, case: str, *, zero: str | None = None, **changes) -> dict:
    """Trains a case and returns its whole weights (rank 0's) and its figures."""
    own_zero, steps, own = CASES[case]
    model = "tied" if case == "tied" else "policy"
    ppo = own | changes
    attn = ppo.pop("attn", "auto")
    config = tiny_run.config(models, zero or own_zero, model, **ppo)
    config = replace(config, actor=replace(config.actor, attn=attn))
    trainer = tiny_run.trainer(config, Text() if config.ppo.ptx_coef else None)
    figures = [trainer.step(tiny_run.prompts(config.ppo, step))[0] for step in range(steps)]
    weights = {"actor": whole_weights(trainer.actor.lm)}
    if trainer.critic:
        weights["critic"] = whole_weights(trainer.critic.model)
    return {"weights": weights, "figures": figures}


def main() -> None:
    models, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
    distributed.start(1)
    for case in cases:
        result = run(models, case)
        if distributed.is_main():
            torch.save(result, out / f"{case}.pt")


if __name__ == "__main__":
    main()
