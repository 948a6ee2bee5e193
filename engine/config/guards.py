"""What is watched while a run trains, and what follows."""

from typing import Literal

from gearshift.engine.config.keys import Number, Whole, knob, section

# Not `off`, which YAML reads as false.
Action = Literal["ignore", "warn", "stop"]


@section
class GuardConfig:
    """What is watched while a run trains, and what follows; docs/guards.md names the causes.

    warn: a line on the terminal. stop: the run ends with exit status 1, its checkpoints untouched.
    """

    nonfinite: Literal["skip", "stop"] = knob(
        "skip", "a loss or gradient that is not finite: the update is dropped; stop: then the run"
    )
    nonfinite_steps: Whole = knob(
        3, "skip: PPO steps in a row with a dropped update that stop the run", ge=1
    )
    failed_reward: Literal["mean", "drop", "stop"] = knob(
        "mean",
        "a sample's score is missing or not finite: mean of the step's others; drop: it also "
        "teaches nothing; stop",
    )
    failed_reward_share: Number = knob(
        0.1, "share of a step's samples above which failed rewards stop the run", ge=0, le=1
    )
    frozen: Action = knob("warn", "trainable parameters without a gradient at the first update")
    ratio: Action = knob("warn", "the ratio differs from 1 before a step's first update")
    ratio_limit: Number | None = knob(
        None, "distance from 1 that is rounding; null: 0.01 in fp32, 1 in bf16", gt=0
    )
    negative_kl: Action = knob("warn", "the mean KL to the reference is below 0 beyond noise")
    negative_kl_errors: Number = knob(4.0, "standard errors below 0 that are noise", gt=0)
    negative_kl_steps: Whole = knob(2, "PPO steps in a row", ge=1)
    entropy: Action = knob("warn", "the policy's entropy has collapsed")
    entropy_share: Number = knob(0.1, "of the first step's entropy, below which", gt=0, le=1)
    entropy_steps: Whole = knob(5, "PPO steps in a row", ge=1)
    explained_variance: Action = knob("warn", "the critic is worse than a constant")
    explained_variance_steps: Whole = knob(20, "PPO steps in a row", ge=1)
    explained_variance_after: Whole = knob(20, "first PPO steps that do not count", ge=0)
    no_eos: Action = knob("warn", "every response was cut by its length limit")
    no_eos_steps: Whole = knob(10, "PPO steps in a row", ge=1)
    constant_reward: Action = knob("warn", "every response of a step has the same score")
    constant_reward_steps: Whole = knob(5, "PPO steps in a row", ge=1)
