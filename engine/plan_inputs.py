"""What a plan reads for each role: the model's configuration and its DeepSpeed settings."""

from dataclasses import replace
from typing import Any

from gearshift.engine import ds_config
from gearshift.engine.config import Config, ModelConfig
from gearshift.engine.shapes import read_config


def read(config: Config) -> tuple[dict[str, Any], dict[str, dict]]:
    """(transformers configurations, DeepSpeed settings) by role, a reward model's by its name.

    A critic without a path is taken to start from the first reward model, else from the actor.
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
        try:
            hf_configs[name] = read_config(source, kind)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    return hf_configs, settings


def _models(config: Config) -> dict[str, tuple[ModelConfig, str]]:
    rewards = [reward for reward in config.rewards if reward.kind == "model"]
    models: dict[str, tuple[ModelConfig, str]] = {"actor": (config.actor, "policy")}
    if config.ppo.estimator == "gae":
        start = rewards[0] if rewards else config.actor
        models["critic"] = (_starting(config.critic, start), "critic")
    if config.ppo.kl_coef > 0:
        models["reference"] = (_starting(config.reference, config.actor), "policy")
    return models | {reward.name: (reward, "reward") for reward in rewards}


def _starting(model: ModelConfig, other: ModelConfig) -> ModelConfig:
    """`model`, with the other's path where it has none."""
    if model.path is not None:
        return model
    return replace(model, path=other.path, revision=other.revision)
