"""Every knob, once: its type, default, bounds and help, filled from YAML and overrides by load.py.

The text of a knob is its help and its line in docs/config.md. Bounds that concern one field are in
`knob`; those that concern several are in `__post_init__`.
"""

from dataclasses import replace
from pathlib import PurePath
from typing import Literal

from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.guards import GuardConfig
from gearshift.engine.config.keys import (
    Flag,
    Number,
    Options,
    Part,
    Parts,
    Tokens,
    Whole,
    knob,
    section,
)
from gearshift.engine.config.prompts import (
    DataConfig,
    PretrainConfig,
    SamplingConfig,
    SourceConfig,
)


@section
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    name: Literal["adamw", "split_adamw"] = knob(
        "adamw", "split_adamw: the fp32 master is the bf16 weights and 16 low bits; docs/memory.md"
    )
    moments: Literal["fp32", "bf16"] = knob("fp32", "of split_adamw; bf16 needs betas below 0.99")
    lr: Number = knob(1e-6, "peak learning rate", ge=0)
    beta1: Number = knob(0.9, "decay of the first moment", ge=0, le=1)
    beta2: Number = knob(0.95, "decay of the second moment", ge=0, le=1)
    eps: Number = knob(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: Number = knob(0.0, "decoupled weight decay; not applied to vectors", ge=0)
    schedule: Literal["linear", "cosine", "constant"] = knob("linear", "decay after warm-up, to 0")
    warmup: Number = knob(0.03, "share of its optimizer steps spent warming up", ge=0, le=1)

    def __post_init__(self):
        if self.moments == "fp32":
            return
        fix = "set name to split_adamw"
        refuse_if(self.name == "adamw", "moments", "only split_adamw has them", fix, "bf16")
        problem = "bf16 moments do not resolve so slow a decay and freeze"
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            refuse_if(beta >= 0.99, name, problem, "use 0.95, or moments: fp32", beta)


@section
class ModelConfig:
    """Where a model comes from and how DeepSpeed runs it."""

    path: str | None = knob(None, "Hugging Face directory, hub id, or .gguf file; null: see role")
    revision: str | None = knob(None, "hub revision")
    trust_remote_code: Flag = knob(False, "run Python code that comes with the model")
    tokenizer: str | None = knob(None, "tokenizer directory or hub id; null: the model's own")
    deepspeed: str = knob("actor_zero3.json", "DeepSpeed JSON: a file, or a name in ds_configs/")
    attn: str = knob(
        "auto",
        "auto: rows end to end without padding, by flash-attn if installed, else by PyTorch; any "
        "other: transformers' implementation of that name, over padded rows",
    )
    liger: Literal["auto", "never"] = knob(
        "auto",
        "RMSNorm, RoPE and SwiGLU as liger-kernel's kernels; auto: where installed, on GPUs; all "
        "models of one family must agree, as their classes change",
    )
    gradient_checkpointing: Flag | None = knob(
        None, "recompute activations in backward: less memory; null: where the plan needs it"
    )


@section
class TrainedConfig(ModelConfig):
    """A model that is trained."""

    sleep: Literal["auto", "never", "gradients", "exchange", "always"] = knob(
        "auto",
        "what leaves the GPU outside its own update: nothing; gradient buffers; and, for the host, "
        "the optimizer's states while the other model trains, or always; auto: the plan decides",
    )
    optimizer: Part[OptimizerConfig] = knob(OptimizerConfig, "AdamW and its schedule")


@section
class CriticConfig(TrainedConfig):
    """The critic. `path: null` starts from the reward model if there is one, else the actor."""

    deepspeed: str = knob("critic_zero3.json", "DeepSpeed JSON: a file, or a name in ds_configs/")
    patience: Whole = knob(
        10, "run.task critic ends after so many steps without a rise of explained variance", ge=1
    )
    least_rise: Number = knob(0.01, "of explained variance: less is no rise", ge=0)


@section
class ReferenceConfig(ModelConfig):
    """The frozen reference policy. `path: null` is the actor's initial weights."""

    deepspeed: str = knob("frozen_zero3_cpu.json", "DeepSpeed JSON of the frozen model")


@section
class RewardConfig(ModelConfig):
    """One source of scores; several are added with their weights."""

    name: str = knob("reward", "names the metric rewards/<name>/mean")
    kind: Literal["function", "model", "http"] = knob("function", "where the scores come from")
    function: str | None = knob(
        None, "module:function or file.py:function, TRL's signature; or a name of the library"
    )
    options: Options = knob({}, "further arguments of the function, by name")
    urls: list[str] = knob([], "HTTP endpoints, used in turn; POST {prompts, completions, ...}")
    weight: Number = knob(1.0, "factor in the sum of all rewards")
    timeout_s: Number = knob(60.0, "seconds before an HTTP request is given up", gt=0)
    retries: Whole = knob(5, "further tries after a failed HTTP request, with backoff", ge=0)
    chat_template: Flag = knob(True, "render a chat with the reward tokenizer's own template")
    batch_size: Whole | None = knob(
        None, "rows per forward of a reward model, at most; null: by ppo.score_batch_tokens", ge=1
    )
    max_tokens: Whole | None = knob(
        None,
        "longest text a reward model reads, in its tokens; null: 4096, or its positions if fewer",
        ge=1,
    )
    deepspeed: str = knob("frozen_zero3_cpu.json", "DeepSpeed JSON of the frozen model")

    def __post_init__(self):
        problem = f"only a function has options, not kind={self.kind}"
        refuse_if(self.options and self.kind != "function", "options", problem)


@section
class RolloutConfig:
    """The generation gear."""

    tp: Whole = knob(0, "tensor-parallel size for generation; 0: the smallest that fits", ge=0)
    engine: Literal["auto", "paged", "hf"] = knob(
        "auto",
        "paged: a paged cache, batched continuously; hf: our padded loop over the model's own "
        "forward and cache; auto: paged where the model allows it",
    )
    block_size: Whole = knob(16, "tokens per block of the KV cache", ge=1)
    max_sequences: Whole = knob(256, "sequences decoded at once per TP group", ge=1)
    max_batch_tokens: Whole = knob(
        8192, "prompt tokens per prefill forward; on CPU at most 512", ge=16
    )
    kv_cache_gb: Number = knob(0.0, "KV cache per rank; 0: what is free (CPU: 1)", ge=0)
    shift_bucket_mb: Number = knob(0.0, "staging of a shift; 0: 256 on GPU, 16 on CPU", ge=0)
    weights: Literal["release", "resident"] = knob(
        "release",
        "after generation: give the shards' memory back, or keep and refresh in place; with a "
        "kv_cache_gb the KV cache and the CUDA graphs are kept, too",
    )
    cuda_graphs: Flag = knob(True, "capture decoding in CUDA graphs, on GPUs")


@section
class EvalSourceConfig(SourceConfig):
    """One dataset of held-out prompts."""

    name: str | None = knob(None, "names the figures eval/<name>/*; null: the path's last part")
    rows: Whole = knob(0, "the first so many prompts; 0: all of them", ge=0)
    weight: Number = knob(1.0, "not read: every prompt is evaluated", gt=0)

    @property
    def label(self) -> str:
        """The name in figures."""
        return self.name or PurePath(self.path).stem


@section
class EvalSamplingConfig:
    """How held-out prompts are answered; null: as in training."""

    max_new_tokens: Whole | None = knob(None, "longest response", ge=1)
    temperature: Number | None = knob(None, "divides the logits; 0 is greedy", ge=0)
    top_k: Whole | None = knob(None, "0: off", ge=0)
    top_p: Number | None = knob(None, "1: off", gt=0, le=1)
    stop: list[str] | None = knob(None, "strings that end a response; kept in it")


@section
class EvalConfig:
    """Evaluation on held-out prompts, in the loop; without sources there is none."""

    every: Whole = knob(
        20, "PPO steps between evaluations; one is before the first step, one after the last", ge=1
    )
    sources: Parts[EvalSourceConfig] = knob([], "datasets, each with its own figures")
    sampling: Part[EvalSamplingConfig] = knob(EvalSamplingConfig, "how responses are drawn")
    rewards: Parts[RewardConfig] = knob(
        [], "functions or endpoints that judge the responses; none: the run's own rewards"
    )
    pass_at: list[Whole] = knob([], "k of the figures pass_at_k, as [1, 8]")
    pass_score: Number = knob(
        1.0, "score of a reward, before its weight, from which a response passes"
    )
    samples_per_prompt: Whole | None = knob(
        None, "responses per prompt; null: the largest of pass_at, or 1", ge=1
    )
    best_by: str | None = knob(
        None,
        "figure whose highest checkpoint stays, as eval/test/scores: every evaluation is then "
        "followed by a checkpoint; null: the best by reward stays",
    )

    @property
    def samples(self) -> int:
        """Responses per prompt."""
        return self.samples_per_prompt or max(self.pass_at, default=1)

    def __post_init__(self):
        problem = "must be 1 or more, and no more than the samples of a prompt"
        for k in self.pass_at:
            refuse_if(not 1 <= k <= self.samples, "pass_at", f"{k} {problem}", value=self.pass_at)

    def sampling_of(self, training: SamplingConfig) -> SamplingConfig:
        """What evaluation samples with, in a run that trains with `training`."""
        own = {key: value for key, value in vars(self.sampling).items() if value is not None}
        return replace(training, **own)


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
            wrong, problem = (
                low and high and low > high,
                f"must be at most rollout_{kind}_high = {high}",
            )
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


@section
class ProfileConfig:
    """Traces of whole PPO steps, by torch.profiler."""

    steps: list[Whole] = knob([], "PPO steps to profile, from 1 on; such a step takes longer")


@section
class RunConfig:
    """The run folder and what is written to it."""

    task: Literal["ppo", "critic"] = knob(
        "ppo", "critic: the critic alone, on responses of the policy as it is (gearshift critic)"
    )
    dir: str = knob("runs/latest", "run folder; must be empty or new unless resumed")
    steps: Whole = knob(100, "PPO steps", ge=1)
    seed: Whole = knob(0, "of data order, sampling and initialisation", ge=0)
    resume: str = knob("auto", "auto: continue the run folder's last checkpoint; none; or a path")
    resume_changed: list[str] = knob([], "keys whose changed values a resumed run accepts")
    save_every: Whole = knob(0, "PPO steps between checkpoints; 0: only at the end", ge=0)
    save_last: Flag = knob(True, "save the last step, too")
    save_minutes: Number = knob(0.0, "also after so many minutes without a checkpoint", ge=0)
    save_by: str | None = knob(
        None, "save and end before: 08:00, 2026-11-23 08:00, or slurm-10 (min before its limit)"
    )
    async_save: Flag = knob(
        True, "write checkpoints while the run goes on, from a copy on the host"
    )
    keep_checkpoints: Whole = knob(
        2, "the last ones that stay, besides the best by reward, or by eval.best_by", ge=1
    )
    export: Flag = knob(True, "write Hugging Face directories of actor and critic at the end")
    sample_every: Whole = knob(5, "PPO steps between sample tables; 0: never", ge=0)
    samples: Whole = knob(4, "rows of a sample table", ge=1)
    trackers: list[str] = knob([], "any of tensorboard, wandb, trackio")
    tracker_project: str = knob("gearshift", "project name for wandb and trackio")
    ignore_plan: Flag = knob(False, "start even where the memory plan says that it cannot fit")
    profile: Part[ProfileConfig] = knob(ProfileConfig, "where the time of a step goes")
    threads: Whole = knob(0, "CPU threads per rank; 0: cores / ranks on this node", ge=0, le=4096)
    start_timeout_s: Number = knob(
        120.0, "seconds that ranks wait for each other at the start; those missing are named", gt=0
    )
    hang_timeout_s: Number = knob(
        1200.0,
        "seconds a rank may stand still before it is named and the run ended; 0: forever",
        ge=0,
    )

    def __post_init__(self):
        never = [step for step in self.profile.steps if not 1 <= step <= self.steps]
        problem, fix = f"the run has steps 1 to {self.steps}", "name any of those, as [3]"
        refuse_if(never, "profile.steps", problem, fix, self.profile.steps)


@section
class Config:
    """A whole run."""

    run: Part[RunConfig] = knob(RunConfig, "the run folder")
    actor: Part[TrainedConfig] = knob(TrainedConfig, "the policy")
    critic: Part[CriticConfig] = knob(CriticConfig, "the value model (estimator gae)")
    reference: Part[ReferenceConfig] = knob(ReferenceConfig, "the frozen reference policy")
    rewards: Parts[RewardConfig] = knob([], "sources of scores")
    data: Part[DataConfig] = knob(DataConfig, "prompts")
    pretrain: Part[PretrainConfig] = knob(PretrainConfig, "text for PPO-ptx")
    sampling: Part[SamplingConfig] = knob(SamplingConfig, "how responses are drawn")
    rollout: Part[RolloutConfig] = knob(RolloutConfig, "the generation gear")
    ppo: Part[PPOConfig] = knob(PPOConfig, "the algorithm")
    eval: Part[EvalConfig] = knob(EvalConfig, "held-out prompts")
    guards: Part[GuardConfig] = knob(GuardConfig, "what is watched, and what follows")
