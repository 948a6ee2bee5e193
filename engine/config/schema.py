"""Every knob, once: its type, default, bounds and help, filled from YAML and overrides by load.py.

The text of a knob is its help and its line in docs/config.md. Bounds that concern one field are in
`knob`; those that concern several are in `__post_init__`.
"""

from dataclasses import replace
from pathlib import PurePath
from typing import Literal

from gearshift.engine.config.algorithm import PPOConfig
from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.guards import GuardConfig
from gearshift.engine.config.keys import Flag, Number, Options, Part, Parts, Whole, knob, section
from gearshift.engine.config.prompts import DataConfig, PretrainConfig, SamplingConfig, SourceConfig


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

    path: str | None = knob(
        None, "Hugging Face directory, hub id, or .gguf file; null: as the section says"
    )
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
    dora: Flag = knob(
        False, "DoRA (Liu et al. 2024): the length of each row of a weight trains beside B A"
    )
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
    load_in_4bit: Flag = knob(
        False,
        "QLoRA: linear layers inside the decoder layers are kept in 4 bit (NF4), through the "
        "package bitsandbytes; ZeRO 0 to 2",
    )
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
        "never: all stays on the GPU; gradients: gradient buffers are freed outside this role's "
        "own update; exchange: its optimizer's states are on the host, too, while the other role "
        "trains; always: in every phase but its own update; auto: the plan chooses",
    )
    optimizer: Part[OptimizerConfig] = knob(OptimizerConfig, "AdamW and its schedule")


@section
class CriticConfig(TrainedConfig):
    """The critic."""

    deepspeed: str = knob("critic_zero3.json", "DeepSpeed JSON: a file, or a name in ds_configs/")
    share_base: Flag = knob(
        False, "with adapters: on the actor's base, which is in memory once; docs/lora.md"
    )
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
    urls: list[str] = knob([], "HTTP endpoints, used in turn; docs/run.md has their protocol")
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

    tp: Whole = knob(
        0,
        "tensor-parallel size for generation; 0: the smallest whose shards fill at most half of "
        "the free memory",
        ge=0,
    )
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
    defer_stragglers: Number = knob(
        0.0,
        "share of a step's responses generated beside it; a step takes the first that end, and the "
        "others go on in the next (docs/hybrid.md); 0: every step waits for its longest",
        ge=0,
        lt=1,
    )


@section
class EvalSourceConfig(SourceConfig):
    """One dataset of held-out prompts."""

    name: str | None = knob(None, "names the figures eval/<name>/*; null: the path's last part")
    rows: Whole = knob(0, "the first so many prompts; 0: all of them", ge=0)
    weight: Number = knob(1.0, "not read: every prompt is evaluated", gt=0)
    weight_key: str | None = knob(None, "null: for data.sources alone")

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
        """What evaluation samples with, in a run that trains with `training`. Held-out prompts have
        no longest responses of their own."""
        own = {key: value for key, value in vars(self.sampling).items() if value is not None}
        longest = own.get("max_new_tokens", training.max_new_tokens)
        least = min(training.min_new_tokens, longest)
        return replace(training, limit_key=None, min_new_tokens=least, **own)


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
    actor: Part[TrainedConfig] = knob(TrainedConfig, "the policy; its path is required")
    critic: Part[CriticConfig] = knob(
        CriticConfig,
        "the value model of the estimator gae; without a path it starts from the first reward "
        "model that is a decoder with the actor's tokenizer, else from the actor",
    )
    reference: Part[ReferenceConfig] = knob(
        ReferenceConfig, "the frozen reference policy; without a path the actor's initial weights"
    )
    rewards: Parts[RewardConfig] = knob([], "sources of scores")
    data: Part[DataConfig] = knob(DataConfig, "prompts")
    pretrain: Part[PretrainConfig] = knob(PretrainConfig, "text for PPO-ptx")
    sampling: Part[SamplingConfig] = knob(SamplingConfig, "how responses are drawn")
    rollout: Part[RolloutConfig] = knob(RolloutConfig, "the generation gear")
    ppo: Part[PPOConfig] = knob(PPOConfig, "the algorithm")
    eval: Part[EvalConfig] = knob(EvalConfig, "held-out prompts")
    guards: Part[GuardConfig] = knob(GuardConfig, "what is watched, and what follows")
