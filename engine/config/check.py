"""What several sections of a configuration must agree on, checked before any model loads."""

import re

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import Config, RewardConfig
from gearshift.engine.log.trackers import PACKAGES

ROLES = ("actor", "critic", "reference")


def check(config: Config, world_size: int = 1) -> list[str]:
    """Raises ConfigError for what cannot run; returns warnings about what can but should not.

    world_size: ranks of the run; what is counted over all ranks must divide by it.
    """
    _check_present(config)
    for index, reward in enumerate(config.rewards):
        _check_reward(reward, f"rewards.{index}")
    _check_names(config)
    _check_critic(config)
    _check_kl(config)
    _check_pretrain(config)
    _check_world(config, world_size)
    if config.sampling.temperature == 0:
        raise ConfigError(
            "sampling.temperature",
            "greedy responses teach PPO nothing",
            "use a value above 0, as 1",
            value=0,
        )
    return _warnings(config)


def _check_present(config: Config) -> None:
    if config.actor.path is None:
        raise ConfigError(
            "actor.path", "give a Hugging Face directory, hub id or .gguf file", value="null"
        )
    if not config.rewards:
        raise ConfigError(
            "rewards",
            "at least one is needed, as --rewards.0.function my_rewards.py:score",
            value="[]",
        )
    if not config.data.sources:
        raise ConfigError(
            "data.sources",
            "at least one is needed, as --data.sources.0.path prompts.jsonl",
            value="[]",
        )
    for section in ("data", "pretrain"):
        for index, source in enumerate(getattr(config, section).sources):
            if not source.path:
                raise ConfigError(
                    f"{section}.sources.{index}.path", "give a file, folder or hub id"
                )


def _check_reward(reward: RewardConfig, key: str) -> None:
    needed = {"function": "function", "http": "urls", "model": "path"}[reward.kind]
    if not getattr(reward, needed):
        raise ConfigError(f"{key}.{needed}", f"needed because {key}.kind={reward.kind}")


def _check_names(config: Config) -> None:
    names = [reward.name for reward in config.rewards]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(
                f"rewards.{index}.name",
                "used before",
                "each reward needs a name of its own",
                value=name,
            )
        if name in ROLES or not re.fullmatch(r"[\w.-]+", name):
            # It names a file, ds_<name>.json, beside those of the roles.
            raise ConfigError(
                f"rewards.{index}.name",
                f"must be letters, digits, '_', '.' or '-', and none of {', '.join(ROLES)}",
                value=name,
            )
    for name in config.run.trackers:
        if name not in PACKAGES:
            raise ConfigError("run.trackers", f"expected any of {', '.join(PACKAGES)}", value=name)


def _check_critic(config: Config) -> None:
    ppo = config.ppo
    if ppo.estimator == "gae":
        return
    reason = f"needs a critic, which ppo.estimator={ppo.estimator} has not"
    if ppo.critic_warmup_steps:
        raise ConfigError(
            "ppo.critic_warmup_steps", reason, "use gae, or 0", value=ppo.critic_warmup_steps
        )
    if ppo.bootstrap_truncated:
        raise ConfigError("ppo.bootstrap_truncated", reason, "use gae, or false", value="true")
    if ppo.update == "joint":
        raise ConfigError("ppo.update", reason, "use gae, or separate", value="joint")


def _check_kl(config: Config) -> None:
    ppo = config.ppo
    if ppo.kl_in == "loss" and ppo.kl_coef and ppo.kl_estimator == "k1":
        # The gradient of log pi - log ref is the score function, whose expectation is zero.
        raise ConfigError(
            "ppo.kl_estimator", "has no gradient on average in a loss", "use k2 or k3", value="k1"
        )


def _check_pretrain(config: Config) -> None:
    if config.ppo.ptx_coef and not config.pretrain.sources:
        raise ConfigError(
            "pretrain.sources",
            f"needed because ppo.ptx_coef={config.ppo.ptx_coef}",
            "give texts, or ppo.ptx_coef=0",
            value="[]",
        )


def _check_world(config: Config, world_size: int) -> None:
    counts = {
        "ppo.prompts_per_step": config.ppo.prompts_per_step,
        "ppo.minibatch_size": config.ppo.minibatch_size,
    }
    if config.ppo.ptx_coef:
        counts["pretrain.rows"] = config.pretrain.rows
    for key, count in counts.items():
        if count % world_size:
            raise ConfigError(key, f"must be a multiple of the {world_size} ranks", value=count)


def _warnings(config: Config) -> list[str]:
    sampling, ppo = config.sampling, config.ppo
    found = []
    if sampling.top_k or sampling.top_p < 1:
        found.append(
            f"sampling.top_k={sampling.top_k}, sampling.top_p={sampling.top_p}: the sampled "
            "policy is truncated, but ratios and KL are of the full one; 0 and 1 are unbiased"
        )
    if config.pretrain.sources and not ppo.ptx_coef:
        found.append("pretrain.sources: not read, because ppo.ptx_coef=0")
    if ppo.vf_coef != 1 and ppo.update == "separate":
        found.append(f"ppo.vf_coef={ppo.vf_coef}: has no effect with ppo.update=separate")
    if config.data.system_prompt is not None and config.data.chat_template == "never":
        found.append("data.system_prompt: has no effect with data.chat_template=never")
    if not any(reward.weight for reward in config.rewards):
        found.append("rewards: every weight is 0, so every score is 0")
    return found
