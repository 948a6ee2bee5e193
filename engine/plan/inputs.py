"""What a plan reads for each role: the model's configuration and its DeepSpeed settings."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import Config, ModelConfig, RewardConfig
from gearshift.engine.models.load import load_tokenizer
from gearshift.engine.models.shapes import PREFIX, read_config
from gearshift.engine.rewards.text import same_tokenizer


def read(config: Config) -> tuple[dict[str, Any], dict[str, dict]]:
    """(transformers configurations, DeepSpeed settings) by role, a reward model's by its name.

    Raises ValueError that names the key of a path or a JSON that cannot be read.
    """
    if config.actor.path is None:
        raise ValueError(
            "actor.path=null: give a Hugging Face directory, hub id or shape, as shape:qwen2.5-7b"
        )
    models = _models(config)
    hf_configs, settings = {}, {}
    for name, (source, kind) in models.items():
        settings[name] = ds_config.load(source.deepspeed, frozen=name not in ("actor", "critic"))
        hf_configs[name] = _read(name, source, kind)
    return hf_configs, settings


def critic_start(config: Config, reads: Callable[[RewardConfig], bool]) -> ModelConfig:
    """The model that a critic without a path starts from: the first reward model that is a decoder
    and reads the actor's tokens, else the actor.

    reads: whether a reward model has the actor's tokenizer. Of planning and loading alike.
    """
    for reward in config.rewards:
        if reward.kind == "model":
            architectures = _read(reward.name, reward, "reward").architectures or [""]
            if "Bert" not in architectures[0] and reads(reward):
                return reward
    return config.actor


def assumption(config: Config) -> str | None:
    """What a plan takes for granted where a tokenizer that decides on the critic is not there."""
    return _planned_critic(config)[1]


def _planned_critic(config: Config) -> tuple[ModelConfig, str | None]:
    """(the critic, what was assumed about it)."""
    judged = any(reward.kind == "model" for reward in config.rewards)
    if config.ppo.estimator != "gae" or config.critic.path is not None or not judged:
        return _starting(config.critic, config.actor), None
    tokenizer, assumed = _tokenizer(config.actor), []

    def reads(reward: RewardConfig) -> bool:
        other = _tokenizer(reward)
        if tokenizer is not None and other is not None:
            return same_tokenizer(tokenizer, other)
        ours, theirs = _read("actor", config.actor, "policy"), _read(reward.name, reward, "reward")
        same = ours.model_type == theirs.model_type
        assumed.append(f"{reward.name}'s is {'the' if same else 'not the'} actor's")
        return same

    start = critic_start(config, reads)
    critic = _starting(config.critic, start)
    if not assumed:
        return critic, None
    return critic, (
        f"critic.path=null: assumed to start from {start.path}: tokenizers that cannot be read "
        f"here were judged by their models' families ({', '.join(assumed)}); the run compares them"
    )


def _read(name: str, model: ModelConfig, kind: str) -> Any:
    try:
        return read_config(model, kind)
    except ConfigError as error:
        raise error.under(name) from None
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def _tokenizer(model: ModelConfig) -> Any | None:
    """None where it cannot be read, as of a published architecture."""
    if model.tokenizer is None and str(model.path).startswith(PREFIX):
        return None
    try:
        return load_tokenizer(model)
    except ValueError:
        return None


def _models(config: Config) -> dict[str, tuple[ModelConfig, str]]:
    models: dict[str, tuple[ModelConfig, str]] = {"actor": (config.actor, "policy")}
    if config.ppo.estimator == "gae":
        models["critic"] = (_planned_critic(config)[0], "critic")
    if config.ppo.kl_coef > 0:
        models["reference"] = (_starting(config.reference, config.actor), "policy")
    rewards = [reward for reward in config.rewards if reward.kind == "model"]
    return models | {reward.name: (reward, "reward") for reward in rewards}


def _starting(model: ModelConfig, other: ModelConfig) -> ModelConfig:
    """`model`, with the other's path where it has none."""
    if model.path is not None:
        return model
    return replace(model, path=other.path, revision=other.revision)
