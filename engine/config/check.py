"""What several sections of a configuration must agree on, checked before any model loads."""

import difflib
import re

from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.schema import Config, PPOConfig

ROLES = ("actor", "critic", "reference")
# Keys of ppo that are null without a critic; and those of its updates, which joint ones have not.
CRITICS_UPDATES = ("critic_epochs", "critic_minibatch_size")
CRITICS_OWN = ("lam_critic", "lam_length_alpha", *CRITICS_UPDATES)
TRACKERS = ("tensorboard", "wandb", "trackio")  # each the name of its package


def check(config: Config, world_size: int = 1) -> list[str]:
    """Raises ConfigError for what cannot run; returns warnings about what can but should not.

    world_size: ranks of the run; what is counted over all ranks must divide by it.
    """
    _check_present(config)
    _check_names(config)
    _check_ppo(config.ppo, config.run.task)
    by, names = config.ppo.dynamic_sampling_by, [reward.name for reward in config.rewards]
    problem, fix = "no such reward", f"the rewards are {', '.join(names)}"
    refuse_if(by is not None and by not in names, "ppo.dynamic_sampling_by", problem, fix, by)
    _check_eval(config)
    problem = f"needed because ppo.ptx_coef={config.ppo.ptx_coef}"
    wrong = config.ppo.ptx_coef and not config.pretrain.sources
    refuse_if(wrong, "pretrain.sources", problem, "give texts, or ppo.ptx_coef=0", "[]")
    _check_world(config, world_size)
    _check_lora(config)
    _check_stragglers(config)
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
    for section in ("data", "pretrain", "eval"):
        for index, source in enumerate(getattr(config, section).sources):
            key = f"{section}.sources.{index}.path"
            refuse_if(not source.path, key, "give a file, folder or hub id")
            key = f"{section}.sources.{index}.weight_key"
            problem = "rows of data.sources alone have it"
            wrong = section != "data" and source.weight_key is not None
            refuse_if(wrong, key, problem, "leave it out, or null", source.weight_key)
    for key, rewards in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
        for index, reward in enumerate(rewards):
            needed = {"function": "function", "http": "urls", "model": "path"}[reward.kind]
            problem = f"needed because {key}.{index}.kind={reward.kind}"
            refuse_if(not getattr(reward, needed), f"{key}.{index}.{needed}", problem)


def _check_names(config: Config) -> None:
    named = {
        "rewards": [reward.name for reward in config.rewards],
        "eval.rewards": [reward.name for reward in config.eval.rewards],
        "eval.sources": [source.label for source in config.eval.sources],
    }
    for section, names in named.items():
        for index, name in enumerate(names):
            key, fix = f"{section}.{index}.name", "each needs a name of its own"
            refuse_if(name in names[:index], key, "used before", fix, name)
            # That of a reward names a file, ds_<name>.json, beside those of the roles.
            wrong = name in ROLES or not re.fullmatch(r"[\w.-]+", name)
            problem = f"must be letters, digits, '_', '.' or '-', and none of {', '.join(ROLES)}"
            refuse_if(wrong, key, problem, value=name)
    for name in config.run.trackers:
        problem = f"expected any of {', '.join(TRACKERS)}"
        refuse_if(name not in TRACKERS, "run.trackers", problem, value=name)


def _check_ppo(ppo: PPOConfig, task: str) -> None:
    wrong = task == "critic" and ppo.estimator != "gae"
    problem = f"trains a critic, which ppo.estimator={ppo.estimator} has not"
    refuse_if(wrong, "run.task", problem, "use gae, or run.task ppo", task)
    if ppo.estimator != "gae":
        problem = f"needs a critic, which ppo.estimator={ppo.estimator} has not"
        steps, cut = ppo.critic_warmup_steps, ppo.bootstrap_truncated
        refuse_if(steps, "ppo.critic_warmup_steps", problem, "use gae, or 0", steps)
        refuse_if(cut, "ppo.bootstrap_truncated", problem, "use gae, or false", "true")
        refuse_if(ppo.update == "joint", "ppo.update", problem, "use gae, or separate", "joint")
        for key in CRITICS_OWN:
            value = getattr(ppo, key)
            refuse_if(value is not None, f"ppo.{key}", problem, "use gae, or null", value)
    for key in CRITICS_UPDATES:
        given, problem = getattr(ppo, key), "ppo.update=joint trains both on the same minibatches"
        wrong = ppo.update == "joint" and given is not None
        refuse_if(wrong, f"ppo.{key}", problem, "use separate, or null", given)
    if ppo.policy_loss in ("cispo", "sapo", "dis"):
        problem = f"ppo.policy_loss={ppo.policy_loss} has none"
        wrong = ppo.dual_clip is not None
        refuse_if(wrong, "ppo.dual_clip", problem, "use ppo, or null", ppo.dual_clip)
    wrong = ppo.policy_loss == "dr_grpo" and ppo.loss_aggregation != "seq_mean_token_mean"
    problem = "ppo.policy_loss=dr_grpo divides by rows x sampling.max_new_tokens"
    fix = "leave it out, or use policy_loss ppo"
    refuse_if(wrong, "ppo.loss_aggregation", problem, fix, ppo.loss_aggregation)
    # The gradient of log pi - log ref is the score function, whose expectation is zero.
    wrong = ppo.kl_in == "loss" and ppo.kl_coef > 0 and ppo.kl_estimator == "k1"
    problem = "has no gradient on average in a loss"
    refuse_if(wrong, "ppo.kl_estimator", problem, "use k2 or k3", "k1")


def _check_eval(config: Config) -> None:
    evaluation, judges = config.eval, config.eval.rewards or config.rewards
    figures = ["scores", "response_length/mean", "response/finished_fraction"]
    for reward in judges:
        ends = ["mean", *(f"pass_at_{k}" for k in evaluation.pass_at)]
        figures += [f"rewards/{reward.name}/{end}" for end in ends]
    for index, reward in enumerate(evaluation.rewards):
        problem = "reward models are loaded for the run's own rewards only"
        fix = "use function or http, or leave eval.rewards out"
        refuse_if(reward.kind == "model", f"eval.rewards.{index}.kind", problem, fix, "model")
    best = evaluation.best_by
    if best is None:
        return
    refuse_if(not evaluation.sources, "eval.best_by", "needs eval.sources", value=best)
    known = [f"eval/{source.label}/{end}" for source in evaluation.sources for end in figures]
    near = difflib.get_close_matches(best, known, n=1) or known[:1]
    refuse_if(best not in known, "eval.best_by", "no such figure", f"as {near[0]}", best)


def _check_lora(config: Config) -> None:
    tp, lora = config.rollout.tp, config.actor.lora
    problem, fix = f"its adapters are not cut for rollout.tp={tp}", "use merged, or rollout.tp: 1"
    wrong = lora.generate == "unmerged" and tp > 1
    refuse_if(wrong, "actor.lora.generate", problem, fix, "unmerged")
    problem = f"needs a critic, which ppo.estimator={config.ppo.estimator} has not"
    wrong = config.critic.share_base and config.ppo.estimator != "gae"
    refuse_if(wrong, "critic.share_base", problem, "use gae, or false", "true")


def _check_stragglers(config: Config) -> None:
    ppo, key, share = config.ppo, "rollout.defer_stragglers", config.rollout.defer_stragglers
    if not share:
        return
    problem = f"ppo.estimator={ppo.estimator} compares responses of one step"
    refuse_if(ppo.estimator in ("rloo", "grpo"), key, problem, "use 0, or gae", share)
    problem = "ppo.dynamic_sampling replaces prompts of one step"
    refuse_if(ppo.dynamic_sampling, key, problem, "use one of the two", share)
    problem = "older tokens are another policy's, which ppo.old_logprobs=rollout does not look for"
    refuse_if(ppo.old_logprobs == "rollout", key, problem, "use ppo.old_logprobs: train", share)
    problem = "tokens of earlier policies need importance weights"
    refuse_if(not ppo.corrections, key, problem, "set ppo.rollout_is_cap, as 2.0", share)


def _check_world(config: Config, world_size: int) -> None:
    counts = {
        "ppo.prompts_per_step": config.ppo.prompts_per_step,
        "ppo.minibatch_size": config.ppo.minibatch_size,
        "ppo.critic_minibatch_size": config.ppo.passes("critic")[1],
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
    if config.eval.sampling_of(sampling).temperature == 0 and config.eval.samples > 1:
        found.append(
            "eval.sampling.temperature=0: the samples of a prompt are all alike, so pass_at and "
            "samples_per_prompt only take time"
        )
    if sampling.suppress_tokens or sampling.min_new_tokens:
        found.append(
            f"sampling.suppress_tokens={sampling.suppress_tokens}, sampling.min_new_tokens="
            f"{sampling.min_new_tokens}: what may not be drawn is left out of the sampled policy, "
            "but ratios and KL are of the full one"
        )
    if config.pretrain.sources and not ppo.ptx_coef:
        found.append("pretrain.sources: not read, because ppo.ptx_coef=0")
    if ppo.vf_coef != 1 and ppo.update == "separate":
        found.append(f"ppo.vf_coef={ppo.vf_coef}: has no effect with ppo.update=separate")
    if ppo.policy_loss == "gspo" and max(ppo.clip_low, ppo.clip_high) >= 0.05:
        found.append(
            f"ppo.clip_low={ppo.clip_low}, ppo.clip_high={ppo.clip_high}: a sequence's mean ratio "
            "hardly leaves that range; gspo was published with 3e-4 and 4e-4"
        )
    if ppo.corrections and ppo.old_logprobs == "rollout":
        keys = ", ".join(f"ppo.{key}" for key in ppo.corrections)
        found.append(f"{keys}: no effect with ppo.old_logprobs=rollout, where no weight differs")
    if dropout := config.actor.lora.dropout:
        found.append(f"actor.lora.dropout={dropout}: updates do not start at a ratio of 1")
    if config.data.system_prompt is not None and config.data.chat_template == "never":
        found.append("data.system_prompt: has no effect with data.chat_template=never")
    if not any(reward.weight for reward in config.rewards):
        found.append("rewards: every weight is 0, so every score is 0")
    return found
