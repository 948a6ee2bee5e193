"""What several sections of a configuration must agree on, checked before any model loads."""

import re

from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.schema import Config, PPOConfig

ROLES = ("actor", "critic", "reference")
TRACKERS = ("tensorboard", "wandb", "trackio")  # each the name of its package


def check(config: Config, world_size: int = 1) -> list[str]:
    """Raises ConfigError for what cannot run; returns warnings about what can but should not.

    world_size: ranks of the run; what is counted over all ranks must divide by it.
    """
    _check_present(config)
    _check_names(config)
    _check_ppo(config.ppo)
    problem = f"needed because ppo.ptx_coef={config.ppo.ptx_coef}"
    wrong = config.ppo.ptx_coef and not config.pretrain.sources
    refuse_if(wrong, "pretrain.sources", problem, "give texts, or ppo.ptx_coef=0", "[]")
    _check_world(config, world_size)
    _check_lora(config)
    problem, fix = "greedy responses teach PPO nothing", "use a value above 0, as 1"
    refuse_if(config.sampling.temperature == 0, "sampling.temperature", problem, fix, 0)
    return _warnings(config)


def _check_present(config: Config) -> None:
    folder = config.run.dir
    wrong = not folder.strip() or not folder.isprintable()
    refuse_if(wrong, "run.dir", "is no name of a folder", "as runs/mine", repr(folder))
    problem = "give a Hugging Face directory, hub id or .gguf file"
    refuse_if(config.actor.path is None, "actor.path", problem, value="null")
    problem = "at least one is needed, as --rewards.0.function my_rewards.py:score"
    refuse_if(not config.rewards, "rewards", problem, value="[]")
    problem = "at least one is needed, as --data.sources.0.path prompts.jsonl"
    refuse_if(not config.data.sources, "data.sources", problem, value="[]")
    for section in ("data", "pretrain"):
        for index, source in enumerate(getattr(config, section).sources):
            key = f"{section}.sources.{index}.path"
            refuse_if(not source.path, key, "give a file, folder or hub id")
    for index, reward in enumerate(config.rewards):
        needed = {"function": "function", "http": "urls", "model": "path"}[reward.kind]
        problem = f"needed because rewards.{index}.kind={reward.kind}"
        refuse_if(not getattr(reward, needed), f"rewards.{index}.{needed}", problem)


def _check_names(config: Config) -> None:
    names = [reward.name for reward in config.rewards]
    for index, name in enumerate(names):
        key, fix = f"rewards.{index}.name", "each reward needs a name of its own"
        refuse_if(name in names[:index], key, "used before", fix, name)
        # It names a file, ds_<name>.json, beside those of the roles.
        wrong = name in ROLES or not re.fullmatch(r"[\w.-]+", name)
        problem = f"must be letters, digits, '_', '.' or '-', and none of {', '.join(ROLES)}"
        refuse_if(wrong, key, problem, value=name)
    for name in config.run.trackers:
        problem = f"expected any of {', '.join(TRACKERS)}"
        refuse_if(name not in TRACKERS, "run.trackers", problem, value=name)


def _check_ppo(ppo: PPOConfig) -> None:
    if ppo.estimator != "gae":
        problem = f"needs a critic, which ppo.estimator={ppo.estimator} has not"
        steps, cut = ppo.critic_warmup_steps, ppo.bootstrap_truncated
        refuse_if(steps, "ppo.critic_warmup_steps", problem, "use gae, or 0", steps)
        refuse_if(cut, "ppo.bootstrap_truncated", problem, "use gae, or false", "true")
        refuse_if(ppo.update == "joint", "ppo.update", problem, "use gae, or separate", "joint")
    # The gradient of log pi - log ref is the score function, whose expectation is zero.
    wrong = ppo.kl_in == "loss" and ppo.kl_coef and ppo.kl_estimator == "k1"
    problem = "has no gradient on average in a loss"
    refuse_if(wrong, "ppo.kl_estimator", problem, "use k2 or k3", "k1")


def _check_lora(config: Config) -> None:
    tp, lora = config.rollout.tp, config.actor.lora
    problem, fix = f"its adapters are not cut for rollout.tp={tp}", "use merged, or rollout.tp: 1"
    wrong = lora.generate == "unmerged" and tp > 1
    refuse_if(wrong, "actor.lora.generate", problem, fix, "unmerged")


def _check_world(config: Config, world_size: int) -> None:
    counts = {
        "ppo.prompts_per_step": config.ppo.prompts_per_step,
        "ppo.minibatch_size": config.ppo.minibatch_size,
    }
    if config.ppo.ptx_coef:
        counts["pretrain.rows"] = config.pretrain.rows
    problem = f"must be a multiple of the {world_size} ranks"
    for key, count in counts.items():
        refuse_if(count % world_size, key, problem, value=count)


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
    if dropout := config.actor.lora.dropout:
        found.append(f"actor.lora.dropout={dropout}: updates do not start at a ratio of 1")
    if config.data.system_prompt is not None and config.data.chat_template == "never":
        found.append("data.system_prompt: has no effect with data.chat_template=never")
    if not any(reward.weight for reward in config.rewards):
        found.append("rewards: every weight is 0, so every score is 0")
    return found
