"""Every knob, once: frozen dataclasses, filled from YAML and dotted overrides by load.py.

The text of a knob is its help, its line in docs/config.md and its error message's context.
Bounds that concern one field are in `knob`; those that concern several are in `__post_init__`.
"""

from dataclasses import dataclass
from typing import Literal

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.fields import Bounded, knob, section
from gearshift.engine.config.run import GuardConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Bounded):
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    name: Literal["adamw", "split_adamw"] = knob(
        "adamw", "split_adamw: the fp32 master is the bf16 weights and 16 low bits; docs/memory.md"
    )
    moments: Literal["fp32", "bf16"] = knob("fp32", "of split_adamw; bf16 needs betas below 0.99")
    lr: float = knob(1e-6, "peak learning rate", least=0)
    beta1: float = knob(0.9, "decay of the first moment", least=0, most=1)
    beta2: float = knob(0.95, "decay of the second moment", least=0, most=1)
    eps: float = knob(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = knob(0.0, "decoupled weight decay; not applied to vectors", least=0)
    schedule: Literal["linear", "cosine", "constant"] = knob("linear", "decay after warm-up, to 0")
    warmup: float = knob(0.03, "share of all optimizer steps spent warming up", least=0, most=1)

    def __post_init__(self):
        super().__post_init__()
        if self.moments == "fp32":
            return
        if self.name == "adamw":
            raise ConfigError(
                "moments", "only split_adamw has them", "set name to split_adamw", value="bf16"
            )
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta >= 0.99:
                raise ConfigError(
                    name,
                    "bf16 moments do not resolve so slow a decay and freeze",
                    "use 0.95, or moments: fp32",
                    value=beta,
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Bounded):
    """Where a model comes from and how DeepSpeed runs it."""

    path: str | None = knob(None, "Hugging Face directory, hub id, or .gguf file; null: see role")
    revision: str | None = knob(None, "hub revision")
    trust_remote_code: bool = knob(False, "run Python code that comes with the model")
    tokenizer: str | None = knob(None, "tokenizer directory or hub id; null: the model's own")
    deepspeed: str = knob("actor_zero3.json", "DeepSpeed JSON: a file, or a name in ds_configs/")
    attn: str = knob("auto", "attention implementation; auto: flash-attn if installed, else sdpa")
    gradient_checkpointing: bool | None = knob(
        None, "recompute activations in backward: less memory; null: where the plan needs it"
    )


@dataclass(frozen=True, kw_only=True)
class TrainedConfig(ModelConfig):
    """A model that is trained."""

    sleep: Literal["auto", "never", "gradients", "exchange", "always"] = knob(
        "auto",
        "what leaves the GPU outside its own update: nothing; gradient buffers; and, for the host, "
        "the optimizer's states while the other model trains, or always; auto: the plan decides",
    )
    optimizer: OptimizerConfig = section(OptimizerConfig, "AdamW and its schedule")


@dataclass(frozen=True, kw_only=True)
class CriticConfig(TrainedConfig):
    """The critic. `path: null` starts from the reward model if there is one, else the actor."""

    deepspeed: str = knob("critic_zero3.json", "DeepSpeed JSON: a file, or a name in ds_configs/")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(ModelConfig):
    """The frozen reference policy. `path: null` is the actor's initial weights."""

    deepspeed: str = knob("frozen_zero3_cpu.json", "DeepSpeed JSON of the frozen model")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(ModelConfig):
    """One source of scores; several are added with their weights."""

    name: str = knob("reward", "names the metric rewards/<name>/mean")
    kind: Literal["function", "model", "http"] = knob("function", "where the scores come from")
    function: str | None = knob(None, "module:function or file.py:function, TRL's signature")
    urls: list[str] = knob([], "HTTP endpoints, used in turn; POST {prompts, completions, ...}")
    weight: float = knob(1.0, "factor in the sum of all rewards")
    timeout_s: float = knob(60.0, "seconds before an HTTP request is given up", above=0)
    retries: int = knob(5, "further tries after a failed HTTP request, with backoff", least=0)
    chat_template: bool = knob(True, "render a chat with the reward tokenizer's own template")
    batch_size: int = knob(8, "rows per forward of a reward model, per rank", least=1)
    max_tokens: int | None = knob(
        None,
        "longest text a reward model reads, in its tokens; null: 4096, or its positions if fewer",
        least=1,
    )
    deepspeed: str = knob("frozen_zero3_cpu.json", "DeepSpeed JSON of the frozen model")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Bounded):
    """One dataset."""

    path: str = knob("", "json, jsonl, csv or parquet file, directory of them, or hub id")
    split: str = knob("train", "split of a hub dataset")
    config: str | None = knob(None, "configuration of a hub dataset")
    prompt_key: str = knob("prompt", "column of the prompt: a string or a list of messages")
    weight: float = knob(1.0, "share of the prompts drawn from this dataset", above=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Bounded):
    """Prompts."""

    sources: list[SourceConfig] = knob([], "datasets, mixed by their weights")
    max_prompt_tokens: int = knob(512, "longest prompt, after the chat template", least=1)
    overlong: Literal["drop", "error"] = knob(
        "drop", "what to do with longer prompts, and with those of no tokens"
    )
    chat_template: Literal["auto", "always", "never"] = knob(
        "auto", "auto: templates messages only; always: wraps a string as one user message"
    )
    system_prompt: str | None = knob(None, "put before every chat that has no system message")
    shuffle: bool = knob(True, "a new order every epoch, from the run's seed")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Bounded):
    """The pretraining stream of PPO-ptx (Ouyang et al. 2022)."""

    sources: list[SourceConfig] = knob([], "text datasets; `prompt_key` names the text column")
    max_tokens: int = knob(512, "tokens per row; documents are packed end to end", least=2)
    rows: int = knob(8, "rows per optimizer step, over all ranks", least=1)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Bounded):
    """How responses are drawn. PPO's log-probs are of this temperature."""

    max_new_tokens: int = knob(512, "longest response; ends it with finished=False", least=1)
    temperature: float = knob(1.0, "divides the logits; 0 is greedy, for evaluation only", least=0)
    top_k: int = knob(0, "0: off. Training wants 0: a truncated policy biases the ratio", least=0)
    top_p: float = knob(1.0, "1: off. Training wants 1, as above", above=0, most=1)
    stop: list[str] = knob([], "strings that end a response; kept in it")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Bounded):
    """The generation gear."""

    tp: int = knob(0, "tensor-parallel size for generation; 0: the smallest that fits", least=0)
    engine: Literal["auto", "paged", "hf"] = knob(
        "auto",
        "paged: a paged cache, batched continuously; hf: our padded loop over the model's own "
        "forward and cache; auto: paged where the model allows it",
    )
    block_size: int = knob(16, "tokens per block of the KV cache", least=1)
    max_sequences: int = knob(256, "sequences decoded at once per TP group", least=1)
    max_batch_tokens: int = knob(
        8192, "prompt tokens per prefill forward; on CPU at most 512", least=16
    )
    kv_cache_gb: float = knob(0.0, "KV cache per rank; 0: what is free (CPU: 1)", least=0)
    shift_bucket_mb: float = knob(0.0, "staging of a shift; 0: 256 on GPU, 16 on CPU", least=0)
    weights: Literal["release", "resident"] = knob(
        "release",
        "after generation: give the shards' memory back, or keep and refresh in place; with a "
        "kv_cache_gb the KV cache and the CUDA graphs are kept, too",
    )
    cuda_graphs: bool = knob(True, "capture decoding in CUDA graphs, on GPUs")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Bounded):
    """The algorithm (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022)."""

    prompts_per_step: int = knob(64, "prompts per PPO step, over all ranks", least=1)
    samples_per_prompt: int = knob(1, "responses per prompt", least=1)
    minibatch_size: int = knob(64, "responses per optimizer step, over all ranks", least=1)
    micro_batch_size: int = knob(4, "responses per forward and backward, per rank", least=1)
    score_batch_size: int = knob(8, "responses per gradient-free forward, per rank", least=1)
    epochs: int = knob(1, "passes over each rollout", least=1)
    estimator: Literal["gae", "rloo", "grpo", "reinforce_pp"] = knob(
        "gae", "advantages: gae needs a critic, the others do not"
    )
    gamma: float = knob(1.0, "discount; 1 makes the KL term exact", above=0, most=1)
    lam: float = knob(0.95, "lambda of GAE", least=0, most=1)
    whiten_advantages: bool = knob(
        True, "zero mean, unit variance over the global rollout (gae, reinforce_pp)"
    )
    clip_low: float = knob(0.2, "ratio is clipped below 1 - clip_low", above=0, most=1)
    clip_high: float = knob(0.2, "ratio is clipped above 1 + clip_high", above=0)
    dual_clip: float | None = knob(
        None, "bound c > 1 of the loss at A < 0 (Ye et al. 2020)", above=1
    )
    value_clip: float | None = knob(0.2, "critic's clip range; null: plain squared error", above=0)
    update: Literal["separate", "joint"] = knob(
        "separate", "separate: actor's epochs, then critic's; joint: both on every minibatch"
    )
    vf_coef: float = knob(1.0, "factor of the critic's loss in joint updates", above=0)
    entropy_coef: float = knob(0.0, "entropy bonus")
    loss_aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_sum"] = knob(
        "seq_mean_token_mean", "how token losses are weighted; always over the whole optimizer step"
    )
    kl_coef: float = knob(0.05, "weight of the KL to the reference", least=0)
    kl_in: Literal["reward", "loss"] = knob("reward", "where the KL acts; never both")
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k1", "k1 in the reward; k2 or k3 in the loss")
    kl_controller: Literal["fixed", "adaptive"] = knob("fixed", "adaptive: Ziegler et al. 2019")
    kl_target: float = knob(6.0, "adaptive: target KL per response, nats", above=0)
    kl_horizon: int = knob(10000, "adaptive: responses over which the coefficient moves", least=1)
    target_kl: float | None = knob(
        None, "stop a step's epochs above this KL to pi_old, nats", above=0
    )
    critic_warmup_steps: int = knob(0, "first PPO steps that train only the critic", least=0)
    missing_eos: Literal["none", "replace", "subtract"] = knob(
        "none", "treats the score of a response that did not end"
    )
    missing_eos_value: float = knob(
        1.0, "replace: the score is minus this; subtract: less this", least=0
    )
    score_clip: float | None = knob(None, "scores are clipped to +- this", above=0)
    score_shift: float = knob(0.0, "(score - shift) / scale, before clipping")
    score_scale: float = knob(1.0, "(score - shift) / scale, before clipping", above=0)
    bootstrap_truncated: bool = knob(False, "value after a response cut by length: the critic's")
    ptx_coef: float = knob(0.0, "weight of pretraining log-likelihood (PPO-ptx)", least=0)
    old_logprobs: Literal["train", "rollout"] = knob(
        "train", "recomputed by the training path, or trusted from the sampler"
    )
    max_logprob_error: float = knob(0.05, "rollout: refuse a larger mean error, nats", above=0)
    rollout_is_cap: float | None = knob(
        None, "truncated importance weights for rollout/training mismatch; null: off", above=0
    )

    def __post_init__(self):
        super().__post_init__()
        rows = self.prompts_per_step * self.samples_per_prompt
        if rows % self.minibatch_size:
            raise ConfigError(
                "minibatch_size",
                f"must divide prompts_per_step x samples_per_prompt = {rows}",
                value=self.minibatch_size,
            )
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ConfigError(
                "kl_estimator",
                "only k1 keeps the optimum when kl_in=reward",
                "use k1, or kl_in=loss",
                value=self.kl_estimator,
            )
        if self.kl_in == "loss" and self.kl_controller == "adaptive":
            raise ConfigError("kl_controller", "needs kl_in=reward", value="adaptive")
        if self.estimator in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ConfigError(
                "samples_per_prompt", f"estimator={self.estimator} compares several", value=1
            )
        # Ziegler's update multiplies by 1 + error * n / horizon with error in +-0.2.
        if self.kl_controller == "adaptive" and 0.2 * rows >= self.kl_horizon:
            raise ConfigError(
                "kl_horizon",
                f"must exceed 0.2 x {rows} responses a step, or the coefficient turns negative",
                value=self.kl_horizon,
            )

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def optimizer_steps_per_step(self) -> int:
        return self.epochs * (self.rows_per_step // self.minibatch_size)


@dataclass(frozen=True, kw_only=True)
class Config(Bounded):
    """A whole run."""

    run: RunConfig = section(RunConfig, "the run folder")
    actor: TrainedConfig = section(TrainedConfig, "the policy")
    critic: CriticConfig = section(CriticConfig, "the value model (estimator gae)")
    reference: ReferenceConfig = section(ReferenceConfig, "the frozen reference policy")
    rewards: list[RewardConfig] = knob([], "sources of scores")
    data: DataConfig = section(DataConfig, "prompts")
    pretrain: PretrainConfig = section(PretrainConfig, "text for PPO-ptx")
    sampling: SamplingConfig = section(SamplingConfig, "how responses are drawn")
    rollout: RolloutConfig = section(RolloutConfig, "the generation gear")
    ppo: PPOConfig = section(PPOConfig, "the algorithm")
    guards: GuardConfig = section(GuardConfig, "what is watched, and what follows")
