"""Every knob, once: its type, default, bounds and help, filled from YAML and overrides by load.py.

The text of a knob is its help and its line in docs/config.md. Bounds that concern one field are in
`knob`; those that concern several are in `__post_init__`.
"""

from typing import Literal

from gearshift.engine.config.errors import refuse_if
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
    warmup: Number = knob(0.03, "share of all optimizer steps spent warming up", ge=0, le=1)

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
class LoraConfig:
    """Low-rank adapters (Hu et al. 2022) on a frozen model, through the package `peft`."""

    r: Whole = knob(0, "rank; 0: no adapters, every weight trains", ge=0)
    alpha: Number = knob(32.0, "the product B A is scaled by alpha / r", gt=0)
    rslora: Flag = knob(False, "scale by alpha / sqrt(r) instead (Kalajdzievski 2023)")
    targets: list[str] | Literal["auto"] = knob(
        "auto", "names of linear layers, as [q_proj, v_proj]; auto: all inside the decoder layers"
    )
    init: Literal["default", "gaussian"] = knob(
        "default", "of A: uniform as PyTorch's linear layers, or normal of spread 1 / r; B is 0"
    )
    dropout: Number = knob(
        0.0, "of an adapter's input in updates; above 0 the ratio is not 1 before them", ge=0, lt=1
    )
    modules_to_save: list[str] = knob([], "modules that train whole, as [embed_tokens, lm_head]")
    base: str | None = knob(
        None, "model under the adapter directory that `path` is; null: the one it names"
    )
    generate: Literal["auto", "merged", "unmerged"] = knob(
        "auto",
        "weights of generation: a copy with the adapters added, or the frozen weights and the "
        "adapters beside them (tensor-parallel size 1); auto: merged where the plan has room",
    )


@section
class TrainedConfig(ModelConfig):
    """A model that is trained."""

    lora: Part[LoraConfig] = knob(LoraConfig, "low-rank adapters; docs/lora.md")

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


@section
class ReferenceConfig(ModelConfig):
    """The frozen reference policy. `path: null` is the actor's initial weights."""

    deepspeed: str = knob("frozen_zero3_cpu.json", "DeepSpeed JSON of the frozen model")


@section
class RewardConfig(ModelConfig):
    """One source of scores; several are added with their weights."""

    name: str = knob("reward", "names the metric rewards/<name>/mean")
    kind: Literal["function", "model", "http"] = knob("function", "where the scores come from")
    function: str | None = knob(None, "module:function or file.py:function, TRL's signature")
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


@section
class SourceConfig:
    """One dataset."""

    path: str = knob("", "json, jsonl, csv or parquet file, directory of them, or hub id")
    split: str = knob("train", "split of a hub dataset")
    config: str | None = knob(None, "configuration of a hub dataset")
    prompt_key: str = knob(
        "prompt",
        "column of the prompt: a string or a list of messages. A last turn of the assistant is "
        "continued in a column `prompt`; in any other it is the answer, which is dropped",
    )
    weight: Number = knob(1.0, "share of the prompts drawn from this dataset", gt=0)


@section
class DataConfig:
    """Prompts."""

    sources: Parts[SourceConfig] = knob([], "datasets, mixed by their weights")
    max_prompt_tokens: Whole = knob(512, "longest prompt, after the chat template", ge=1)
    overlong: Literal["drop", "error"] = knob(
        "drop", "what to do with longer prompts, and with those of no tokens"
    )
    chat_template: Literal["auto", "always", "never"] = knob(
        "auto", "auto: templates messages only; always: wraps a string as one user message"
    )
    chat_template_kwargs: Options = knob(
        {}, "further variables of the template, as enable_thinking"
    )
    bad_rows: Literal["refuse", "drop"] = knob(
        "refuse", "rows that are no prompt, or that the chat template refuses; drop is said"
    )
    system_prompt: str | None = knob(None, "put before every chat that has no system message")
    shuffle: Flag = knob(True, "a new order every epoch, from the run's seed")


@section
class PretrainConfig:
    """The pretraining stream of PPO-ptx (Ouyang et al. 2022)."""

    sources: Parts[SourceConfig] = knob([], "text datasets; `prompt_key` names the text column")
    max_tokens: Whole = knob(512, "tokens per row; documents are packed end to end", ge=2)
    rows: Whole = knob(8, "rows per optimizer step, over all ranks", ge=1)


@section
class SamplingConfig:
    """How responses are drawn. PPO's log-probs are of this temperature."""

    max_new_tokens: Whole = knob(512, "longest response; ends it with finished=False", ge=1)
    temperature: Number = knob(1.0, "divides the logits; 0 is greedy, for evaluation only", ge=0)
    top_k: Whole = knob(0, "0: off. Training wants 0: a truncated policy biases the ratio", ge=0)
    top_p: Number = knob(1.0, "1: off. Training wants 1, as above", gt=0, le=1)
    stop: list[str] = knob([], "strings that end a response; kept in it")


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
    estimator: Literal["gae", "rloo", "grpo", "reinforce_pp"] = knob(
        "gae", "advantages: gae needs a critic, the others do not"
    )
    gamma: Number = knob(1.0, "discount; 1 makes the KL term exact", gt=0, le=1)
    lam: Number = knob(0.95, "lambda of GAE", ge=0, le=1)
    whiten_advantages: Flag = knob(
        True, "zero mean, unit variance over the global rollout (gae, reinforce_pp)"
    )
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

    def __post_init__(self):
        rows, adaptive = self.rows_per_step, self.kl_controller == "adaptive"
        problem = f"must divide prompts_per_step x samples_per_prompt = {rows}"
        refuse_if(rows % self.minibatch_size, "minibatch_size", problem, value=self.minibatch_size)
        problem, fix = "only k1 keeps the optimum when kl_in=reward", "use k1, or kl_in=loss"
        wrong = self.kl_in == "reward" and self.kl_estimator != "k1"
        refuse_if(wrong, "kl_estimator", problem, fix, self.kl_estimator)
        wrong = self.kl_in == "loss" and adaptive
        refuse_if(wrong, "kl_controller", "needs kl_in=reward", value="adaptive")
        wrong = self.estimator in ("rloo", "grpo") and self.samples_per_prompt < 2
        problem = f"estimator={self.estimator} compares several"
        refuse_if(wrong, "samples_per_prompt", problem, value=1)
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
    def optimizer_steps_per_step(self) -> int:
        return self.epochs * (self.rows_per_step // self.minibatch_size)


# Not `off`, which YAML reads as false.
Action = Literal["ignore", "warn", "stop"]


@section
class RunConfig:
    """The run folder and what is written to it."""

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
    keep_checkpoints: Whole = knob(2, "the last ones that stay, besides the best by reward", ge=1)
    export: Flag = knob(True, "write Hugging Face directories of actor and critic at the end")
    sample_every: Whole = knob(5, "PPO steps between sample tables; 0: never", ge=0)
    samples: Whole = knob(4, "rows of a sample table", ge=1)
    trackers: list[str] = knob([], "any of tensorboard, wandb, trackio")
    tracker_project: str = knob("gearshift", "project name for wandb and trackio")
    ignore_plan: Flag = knob(False, "start even where the memory plan says that it cannot fit")
    threads: Whole = knob(0, "CPU threads per rank; 0: cores / ranks on this node", ge=0, le=4096)
    start_timeout_s: Number = knob(
        120.0, "seconds that ranks wait for each other at the start; those missing are named", gt=0
    )
    hang_timeout_s: Number = knob(
        1200.0,
        "seconds a rank may stand still before it is named and the run ended; 0: forever",
        ge=0,
    )


# What a resumed run may change without becoming another run: patterns of keys. All else decides
# what is learned.
RESUME_MAY_CHANGE = (
    "run.*",
    "guards.*",
    "rollout.*",
    "*.attn",
    "*.liger",
    "*.deepspeed",
    "*.gradient_checkpointing",
    "*.sleep",
    "*.batch_size",
    "data.bad_rows",
    "rewards.*.timeout_s",
    "rewards.*.retries",
    "rewards.*.urls",
    "ppo.micro_batch_*",
    "ppo.score_batch_*",
    "ppo.max_logprob_error",
)
# What no run.resume_changed accepts: the order of the prompts and the row ids follow from them.
RESUME_MUST_MATCH = ("run.seed", "ppo.prompts_per_step", "ppo.samples_per_prompt")


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
    guards: Part[GuardConfig] = knob(GuardConfig, "what is watched, and what follows")
