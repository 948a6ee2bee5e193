"""The section of the algorithm, `ppo`; schema.py has the others, and hands it on."""

from typing import Literal

from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.keys import Flag, Number, Tokens, Whole, knob, section

AUTO_TOKENS = 4096  # of a micro-batch that no plan has settled


def _tokens(given: int | str, rows: int | None) -> int | None:
    if given != "auto":
        return int(given)
    return AUTO_TOKENS if rows is None else None


@section
class PPOConfig:
    """The algorithm (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022)."""

    prompts_per_step: Whole = knob(64, "prompts per PPO step, over all ranks", ge=1)
    samples_per_prompt: Whole = knob(1, "responses per prompt", ge=1)
    dynamic_sampling: Whole = knob(
        0, "most times a step's prompts whose samples score alike are replaced (DAPO); 0: off", ge=0
    )
    dynamic_sampling_by: str | None = knob(
        None, "reward by whose scores that is judged; null: by their weighted sum"
    )
    overlong_filter: Flag = knob(
        False, "a response cut by length teaches nothing (DAPO): its advantages are 0"
    )
    minibatch_size: Whole = knob(64, "responses per optimizer step, over all ranks", ge=1)
    micro_batch_tokens: Tokens = knob(
        "auto", "prompt and response tokens per forward and backward, per rank; auto: the plan's"
    )
    score_batch_tokens: Tokens = knob(
        "auto", "tokens per gradient-free forward, per rank; auto: the plan's"
    )
    micro_batch_size: Whole | None = knob(
        None, "responses per forward and backward, at most; given alone, tokens do not count", ge=1
    )
    score_batch_size: Whole | None = knob(
        None, "responses per gradient-free forward, at most; given alone, tokens do not count", ge=1
    )
    epochs: Whole = knob(1, "passes over each rollout", ge=1)
    critic_epochs: Whole | None = knob(None, "of the critic; null: as epochs", ge=1)
    critic_minibatch_size: Whole | None = knob(
        None, "responses per optimizer step of the critic; null: as minibatch_size", ge=1
    )
    estimator: Literal["gae", "rloo", "grpo", "reinforce_pp"] = knob(
        "gae", "advantages: gae needs a critic, the others do not"
    )
    gamma: Number = knob(1.0, "discount; 1 makes the KL term exact", gt=0, le=1)
    lam: Number = knob(0.95, "lambda of GAE", ge=0, le=1)
    lam_critic: Number | None = knob(
        None, "lambda of the critic's returns (VC-PPO: 1); null: that of the advantages", ge=0, le=1
    )
    lam_length_alpha: Number | None = knob(
        None, "lambda of the advantages is 1 - 1 / (this x length), VAPO: 0.05; null: lam", gt=0
    )
    whiten_advantages: Flag = knob(
        True, "zero mean, unit variance over the global rollout (gae, reinforce_pp)"
    )
    policy_loss: Literal["ppo", "gspo", "cispo", "sapo", "dis", "dr_grpo"] = knob(
        "ppo", "how a token's ratio enters its loss; formulas and sources in docs/objective.md"
    )
    sapo_tau_pos: Number = knob(1.0, "sapo: temperature of the gate where A > 0", gt=0)
    sapo_tau_neg: Number = knob(1.05, "sapo: temperature of the gate elsewhere", gt=0)
    clip_low: Number = knob(0.2, "ratio is clipped below 1 - clip_low", gt=0, le=1)
    clip_high: Number = knob(0.2, "ratio is clipped above 1 + clip_high", gt=0)
    dual_clip: Number | None = knob(None, "bound c > 1 of the loss at A < 0 (Ye et al. 2020)", gt=1)
    value_clip: Number | None = knob(0.2, "critic's clip range; null: plain squared error", gt=0)
    update: Literal["separate", "joint"] = knob(
        "separate", "separate: actor's epochs, then critic's; joint: both on every minibatch"
    )
    vf_coef: Number = knob(1.0, "factor of the critic's loss in joint updates", gt=0)
    entropy_coef: Number = knob(0.0, "entropy bonus")
    loss_aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_sum"] = knob(
        "seq_mean_token_mean", "how token losses are weighted; always over the whole optimizer step"
    )
    kl_coef: Number = knob(0.05, "weight of the KL to the reference", ge=0)
    kl_in: Literal["reward", "loss"] = knob("reward", "where the KL acts; never both")
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k1", "k1 in the reward; k2 or k3 in the loss")
    kl_controller: Literal["fixed", "adaptive"] = knob("fixed", "adaptive: Ziegler et al. 2019")
    kl_target: Number = knob(6.0, "adaptive: target KL per response, nats", gt=0)
    kl_horizon: Whole = knob(10000, "adaptive: responses over which the coefficient moves", ge=1)
    target_kl: Number | None = knob(
        None, "stop a step's epochs above this KL to pi_old, nats", gt=0
    )
    critic_warmup_steps: Whole = knob(0, "first PPO steps that train only the critic", ge=0)
    missing_eos: Literal["none", "replace", "subtract"] = knob(
        "none", "treats the score of a response that did not end"
    )
    missing_eos_value: Number = knob(
        1.0, "replace: the score is minus this; subtract: less this", ge=0
    )
    score_clip: Number | None = knob(None, "scores are clipped to +- this", gt=0)
    score_shift: Number = knob(0.0, "(score - shift) / scale, before clipping")
    score_scale: Number = knob(1.0, "(score - shift) / scale, before clipping", gt=0)
    bootstrap_truncated: Flag = knob(False, "value after a response cut by length: the critic's")
    ptx_coef: Number = knob(0.0, "weight of pretraining log-likelihood (PPO-ptx)", ge=0)
    old_logprobs: Literal["train", "rollout"] = knob(
        "train", "recomputed by the training path, or trusted from the sampler"
    )
    max_logprob_error: Number = knob(0.05, "rollout: refuse a larger mean error, nats", gt=0)
    rollout_is_cap: Number | None = knob(
        None, "truncated importance weights for rollout/training mismatch; null: off", gt=0
    )
    rollout_is_low: Number | None = knob(
        None, "tokens of a smaller importance weight are masked, the others weighted", gt=0
    )
    rollout_is_high: Number | None = knob(None, "the same for larger ones (IcePop: 0.5, 5)", gt=0)
    rollout_seq_low: Number | None = knob(
        None, "responses whose geometric mean importance weight is smaller are masked", gt=0
    )
    rollout_seq_high: Number | None = knob(None, "the same for larger ones", gt=0)
    rollout_max_error: Number | None = knob(
        None, "responses of a larger mean log-prob error, nats, are rejected", gt=0
    )

    def __post_init__(self):
        rows, adaptive = self.rows_per_step, self.kl_controller == "adaptive"
        problem = f"must divide prompts_per_step x samples_per_prompt = {rows}"
        for key in ("minibatch_size", "critic_minibatch_size"):
            size = getattr(self, key)
            refuse_if(size and rows % size, key, problem, value=size)
        for kind in ("is", "seq"):
            low, high = (getattr(self, f"rollout_{kind}_{end}") for end in ("low", "high"))
            wrong = low and high and low > high
            problem = f"must be at most rollout_{kind}_high = {high}"
            refuse_if(wrong, f"rollout_{kind}_low", problem, value=low)
        problem, fix = "only k1 keeps the optimum when kl_in=reward", "use k1, or kl_in=loss"
        wrong = self.kl_in == "reward" and self.kl_estimator != "k1"
        refuse_if(wrong, "kl_estimator", problem, fix, self.kl_estimator)
        wrong = self.kl_in == "loss" and adaptive
        refuse_if(wrong, "kl_controller", "needs kl_in=reward", value="adaptive")
        wrong = self.estimator in ("rloo", "grpo") and self.samples_per_prompt < 2
        problem = f"estimator={self.estimator} compares several"
        refuse_if(wrong, "samples_per_prompt", problem, value=1)
        wrong = self.dynamic_sampling > 0 and self.samples_per_prompt < 2
        refuse_if(wrong, "samples_per_prompt", "dynamic_sampling compares several", value=1)
        # Ziegler's update multiplies by 1 + error * n / horizon with error in +-0.2.
        wrong = adaptive and 0.2 * rows >= self.kl_horizon
        problem = f"must exceed 0.2 x {rows} responses a step, or the coefficient turns negative"
        refuse_if(wrong, "kl_horizon", problem, value=self.kl_horizon)

    @property
    def micro_tokens(self) -> int | None:
        """Tokens of a micro-batch; None: as many as micro_batch_size rows have."""
        return _tokens(self.micro_batch_tokens, self.micro_batch_size)

    @property
    def score_tokens(self) -> int | None:
        """Tokens of a gradient-free forward; None: as many as score_batch_size rows have."""
        return _tokens(self.score_batch_tokens, self.score_batch_size)

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def corrections(self) -> list[str]:
        """Keys of the off-policy corrections that are on."""
        names = ("is_cap", "is_low", "is_high", "seq_low", "seq_high", "max_error")
        return [key for name in names if getattr(self, key := f"rollout_{name}") is not None]

    def passes(self, role: str) -> tuple[int, int]:
        """(passes over a rollout, responses per optimizer step) of actor or critic."""
        if role == "actor":
            return self.epochs, self.minibatch_size
        return self.critic_epochs or self.epochs, self.critic_minibatch_size or self.minibatch_size

    def updates(self, role: str) -> int:
        """Optimizer steps of actor or critic in a PPO step."""
        epochs, size = self.passes(role)
        return epochs * (self.rows_per_step // size)
