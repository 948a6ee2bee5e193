"""The knobs of a run that do not change what it learns: its folder, its checkpoints, its guards."""

from dataclasses import dataclass
from typing import Literal

from gearshift.engine.config.fields import Bounded, knob

# Not `off`, which YAML reads as false.
Action = Literal["ignore", "warn", "stop"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Bounded):
    """The run folder and what is written to it."""

    dir: str = knob("runs/latest", "run folder; must be empty or new unless resumed")
    steps: int = knob(100, "PPO steps", least=1)
    seed: int = knob(0, "of data order, sampling and initialisation", least=0)
    resume: str = knob("auto", "auto: continue the run folder's last checkpoint; none; or a path")
    resume_changed: list[str] = knob([], "keys whose changed values a resumed run accepts")
    save_every: int = knob(0, "PPO steps between checkpoints; 0: only at the end", least=0)
    save_last: bool = knob(True, "save the last step, too")
    save_minutes: float = knob(0.0, "also after so many minutes without a checkpoint", least=0)
    save_by: str | None = knob(
        None, "save and end before: 08:00, 2026-11-23 08:00, or slurm-10 (min before its limit)"
    )
    async_save: bool = knob(
        True, "write checkpoints while the run goes on, from a copy on the host"
    )
    keep_checkpoints: int = knob(2, "the last ones that stay, besides the best by reward", least=1)
    export: bool = knob(True, "write Hugging Face directories of actor and critic at the end")
    sample_every: int = knob(5, "PPO steps between sample tables; 0: never", least=0)
    samples: int = knob(4, "rows of a sample table", least=1)
    trackers: list[str] = knob([], "any of tensorboard, wandb, trackio")
    tracker_project: str = knob("gearshift", "project name for wandb and trackio")
    ignore_plan: bool = knob(False, "start even where the memory plan says that it cannot fit")
    threads: int = knob(0, "CPU threads per rank; 0: cores / ranks on this node", least=0)
    hang_timeout_s: float = knob(
        1200.0,
        "seconds a rank may stand still before it is named and the run ended; 0: forever",
        least=0,
    )


# What a resumed run may change without becoming another run: patterns of keys. All else decides
# what is learned.
RESUME_MAY_CHANGE = (
    "run.*",
    "guards.*",
    "rollout.*",
    "*.attn",
    "*.deepspeed",
    "*.gradient_checkpointing",
    "*.sleep",
    "*.batch_size",
    "rewards.*.timeout_s",
    "rewards.*.retries",
    "rewards.*.urls",
    "ppo.micro_batch_size",
    "ppo.score_batch_size",
    "ppo.max_logprob_error",
)
# What no run.resume_changed accepts: the order of the prompts and the row ids follow from them.
RESUME_MUST_MATCH = ("run.seed", "ppo.prompts_per_step", "ppo.samples_per_prompt")


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Bounded):
    """What is watched while a run trains, and what follows; docs/guards.md names the causes.

    warn: a line on the terminal. stop: the run ends with exit status 1, its checkpoints untouched.
    """

    nonfinite: Literal["skip", "stop"] = knob(
        "skip", "a loss or gradient that is not finite: the update is dropped; stop: then the run"
    )
    nonfinite_steps: int = knob(
        3, "skip: PPO steps in a row with a dropped update that stop the run", least=1
    )
    failed_reward: Literal["mean", "drop", "stop"] = knob(
        "mean",
        "a sample's score is missing or not finite: mean of the step's others; drop: it also "
        "teaches nothing; stop",
    )
    failed_reward_share: float = knob(
        0.1, "share of a step's samples above which failed rewards stop the run", least=0, most=1
    )
    frozen: Action = knob("warn", "trainable parameters without a gradient at the first update")
    ratio: Action = knob("warn", "the ratio differs from 1 before a step's first update")
    ratio_limit: float | None = knob(
        None, "distance from 1 that is rounding; null: 0.01 in fp32, 1 in bf16", above=0
    )
    negative_kl: Action = knob("warn", "the mean KL to the reference is below 0 beyond noise")
    negative_kl_errors: float = knob(4.0, "standard errors below 0 that are noise", above=0)
    negative_kl_steps: int = knob(2, "PPO steps in a row", least=1)
    entropy: Action = knob("warn", "the policy's entropy has collapsed")
    entropy_share: float = knob(0.1, "of the first step's entropy, below which", above=0, most=1)
    entropy_steps: int = knob(5, "PPO steps in a row", least=1)
    explained_variance: Action = knob("warn", "the critic is worse than a constant")
    explained_variance_steps: int = knob(20, "PPO steps in a row", least=1)
    explained_variance_after: int = knob(20, "first PPO steps that do not count", least=0)
    no_eos: Action = knob("warn", "every response was cut by its length limit")
    no_eos_steps: int = knob(10, "PPO steps in a row", least=1)
    constant_reward: Action = knob("warn", "every response of a step has the same score")
    constant_reward_steps: int = knob(5, "PPO steps in a row", least=1)
