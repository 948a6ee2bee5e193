"""From a configuration to the roles that play it: what fits together is checked, then loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import Config, CriticConfig, ModelConfig, RewardConfig
from gearshift.engine.frozen import Reference, RewardModel
from gearshift.engine.models.files import CheckpointFiles
from gearshift.engine.models.load import load_config, load_model, load_tokenizer, location, room_for
from gearshift.engine.models.shapes import kv_bytes_per_token, kv_shape, positions
from gearshift.engine.plan.inputs import critic_start
from gearshift.engine.ppo import Roles
from gearshift.engine.rewards.text import check_system_turn, same_tokenizer
from gearshift.engine.rewards.total import RewardSum
from gearshift.engine.roles import Actor, Critic
from gearshift.engine.streaming.store import Store
from gearshift.engine.zero.optim import check_optimizer


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What is known before any weight is read."""

    config: Config
    tokenizer: Any
    hf_config: Any  # the actor's
    deepspeed: dict[str, dict]  # by role; a reward's by its name
    rewards: RewardSum
    reward_tokenizers: dict[str, Any]  # of the reward models, by name

    @property
    def max_context(self) -> int:
        """Tokens of prompt and response together that the actor can read."""
        return positions(self.hf_config) or 2**31


def draw_up(config: Config) -> Blueprint:
    """Reads configurations and tokenizers only; raises ValueError for whatever cannot work."""
    deepspeed = {"actor": ds_config.load(config.actor.deepspeed)}
    if config.ppo.estimator == "gae":
        deepspeed["critic"] = ds_config.load(config.critic.deepspeed)
    if needs_reference(config):
        deepspeed["reference"] = ds_config.load(config.reference.deepspeed, frozen=True)
    rewards = RewardSum(config.rewards, config.guards)
    for reward in rewards.model_configs:
        deepspeed[reward.name] = ds_config.load(reward.deepspeed, frozen=True)
    for settings in deepspeed.values():
        ds_config.check_nvme(settings)
    for role in {"actor", "critic"} & set(deepspeed):
        with _errors_of(role):
            check_optimizer(getattr(config, role).optimizer, deepspeed[role])
    named = _named_models(config)
    for key, model in named.items():
        with _errors_of(key):
            _check_files(model)
    with _errors_of("actor"):
        hf_config = load_config(config.actor, "policy")
    blueprint = Blueprint(
        config=config,
        tokenizer=_tokenizer("actor", config.actor),
        hf_config=hf_config,
        deepspeed=deepspeed,
        rewards=rewards,
        reward_tokenizers={
            model.name: _tokenizer(key, model)
            for key, model in named.items()
            if isinstance(model, RewardConfig)
        },
    )
    _check_vocabulary(blueprint)
    _check_context(blueprint)
    _check_cache(blueprint)
    _fit_rewards(blueprint)
    return blueprint


def needs_reference(config: Config) -> bool:
    return config.ppo.kl_coef > 0


def build(blueprint: Blueprint, steps: int, pretrain: Any | None) -> Roles:
    """Loads every model. steps: optimizer steps of the whole run, for the schedules."""
    config, ds = blueprint.config, blueprint.deepspeed
    stores = _stores(blueprint)
    scorers = {
        reward.name: RewardModel(
            load_model(reward, "reward", ds[reward.name], store=stores[reward.name]),
            blueprint.reward_tokenizers[reward.name],
            reward.batch_size,
            ds[reward.name],
        )
        for reward in blueprint.rewards.model_configs
    }
    blueprint.rewards.join(scorers)
    reference = None
    if "reference" in ds:
        source, store = _reference_source(config), stores["reference"]
        model = load_model(source, "policy", ds["reference"], store=store)
        reference = Reference(model, config.ppo, config.sampling.temperature, ds["reference"])
    critic = None
    if "critic" in ds:
        source, from_reward = critic_source(blueprint)
        model = load_model(source, "critic", ds["critic"], fresh_head=not from_reward)
        critic = Critic(model, config, ds["critic"], steps)
    model = load_model(config.actor, "policy", ds["actor"])
    actor = Actor(model, blueprint.tokenizer, config, ds["actor"], steps)
    return Roles(
        actor=actor,
        critic=critic,
        reference=reference,
        rewards=blueprint.rewards,
        pretrain=pretrain,
    )


def _stores(blueprint: Blueprint) -> dict[str, Store | None]:
    """Room for the weights of every frozen model, before any is read; see models.room_for."""
    ds = blueprint.deepspeed
    stores = {
        reward.name: room_for(reward, "reward", ds[reward.name])
        for reward in blueprint.rewards.model_configs
    }
    if "reference" in ds:
        source = _reference_source(blueprint.config)
        stores["reference"] = room_for(source, "policy", ds["reference"])
    return stores


def critic_source(blueprint: Blueprint) -> tuple[CriticConfig, bool]:
    """Where the critic starts, and whether that checkpoint has a score head to keep.

    critic.path; else the first reward model that reads the actor's tokens; else the actor's trunk.
    """
    config = blueprint.config
    own, source, from_reward = config.critic, config.critic.path, False
    revision = own.revision
    if source is not None:
        head = load_config(own, "critic").architectures or [""]
        from_reward = head[0].endswith(("ForSequenceClassification", "ForTokenClassification"))
    else:
        tokenizer, others = blueprint.tokenizer, blueprint.reward_tokenizers
        start = critic_start(config, lambda reward: same_tokenizer(tokenizer, others[reward.name]))
        from_reward = isinstance(start, RewardConfig)
        source, revision = start.path, start.revision
    values = vars(own) | {"path": source, "revision": revision}
    return CriticConfig(**values), from_reward


def _named_models(config: Config) -> dict[str, ModelConfig]:
    """The models whose path the user gave, by their section's key."""
    models: dict[str, ModelConfig] = {"actor": config.actor}
    if needs_reference(config) and config.reference.path is not None:
        models["reference"] = config.reference
    if config.ppo.estimator == "gae" and config.critic.path is not None:
        models["critic"] = config.critic
    rewards = enumerate(config.rewards)
    return models | {f"rewards.{i}": reward for i, reward in rewards if reward.kind == "model"}


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    """Loaders name the field of a model's section; we add which section."""
    try:
        yield
    except ValueError as error:
        field = str(error).startswith(
            ("path=", "tokenizer=", "optimizer.", "max_tokens=", "chat_template=")
        )
        raise ValueError(f"{key}.{error}" if field else str(error)) from None


def _check_files(model: ModelConfig) -> None:
    """Raises ValueError for a path without a model, before any other model is loaded."""
    where = location(model)
    if Path(where).is_dir():
        CheckpointFiles(where)


def _tokenizer(key: str, model: ModelConfig) -> Any:
    with _errors_of(key):
        return load_tokenizer(model)


def _reference_source(config: Config) -> ModelConfig:
    if config.reference.path is not None:
        return config.reference
    same = {"path": config.actor.path, "revision": config.actor.revision}
    return ModelConfig(**(vars(config.reference) | same))


def _check_vocabulary(blueprint: Blueprint) -> None:
    """Every model that reads the actor's token ids must have an embedding for each of them."""
    config, needed = blueprint.config, len(blueprint.tokenizer)
    readers = {"actor": blueprint.hf_config}
    if "reference" in blueprint.deepspeed:
        readers["reference"] = load_config(_reference_source(config), "policy")
    if "critic" in blueprint.deepspeed:
        readers["critic"] = load_config(critic_source(blueprint)[0], "critic")
    for role, read in readers.items():
        if read.vocab_size < needed:
            raise ValueError(
                f"{role}.path: its vocabulary of {read.vocab_size} is smaller than the actor's "
                f"tokenizer ({needed} tokens); use a model with the same tokenizer"
            )
    for key, model in _named_models(config).items():
        if key in ("reference", "critic"):
            _check_tokens(key, model, blueprint.tokenizer)


def _check_tokens(key: str, model: ModelConfig, actor_tokenizer: Any) -> None:
    """Raises ValueError where an id of the actor's means another token to `model`."""
    directory = Path(location(model))
    bare = directory.is_dir() and not (directory / "tokenizer_config.json").exists()
    if bare and model.tokenizer is None:
        return
    theirs = _tokenizer(key, model).get_vocab()
    for token, i in actor_tokenizer.get_vocab().items():
        if theirs.get(token, i) != i:
            raise ValueError(
                f"{key}.path={model.path!r}: its tokenizer has {token!r} at {theirs[token]}, the "
                f"actor's at {i}; use a model with the actor's tokenizer"
            )


def _check_context(blueprint: Blueprint) -> None:
    config = blueprint.config
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    if longest > blueprint.max_context:
        raise ValueError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + sampling.max_new_tokens="
            f"{config.sampling.max_new_tokens} exceed the actor's context of "
            f"{blueprint.max_context}; lower either"
        )


def _fit_rewards(blueprint: Blueprint) -> None:
    """Raises ValueError for a reward model that cannot read what its configuration gives it."""
    config = blueprint.config
    for key, model in _named_models(config).items():
        if not isinstance(model, RewardConfig):
            continue
        tokenizer = blueprint.reward_tokenizers[model.name]
        with _errors_of(key):
            blueprint.rewards.fit(model.name, positions(load_config(model, "reward")))
            if config.data.system_prompt is not None and model.chat_template:
                check_system_turn(blueprint.tokenizer, tokenizer)


def _check_cache(blueprint: Blueprint) -> None:
    """Raises ValueError where a cache of the size asked for cannot hold one longest sequence."""
    config = blueprint.config
    rollout, text = config.rollout, blueprint.hf_config.get_text_config()
    if not rollout.kv_cache_gb or rollout.engine == "hf":
        return
    tp = rollout.tp or distributed.ranks_per_node()
    size = 2 if blueprint.deepspeed["actor"].get("bf16", {}).get("enabled") else 4
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    layers = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    per_token = kv_bytes_per_token(layers, kv_shape(text), tp, size)
    # Two blocks more: one partly filled, and the cache's dummy.
    least = (longest + 2 * rollout.block_size) * per_token / 1e9
    if rollout.kv_cache_gb < least:
        raise ValueError(
            f"rollout.kv_cache_gb={rollout.kv_cache_gb:.3g}: one sequence of {longest} tokens "
            f"needs {least:.3g}; raise it, or lower sampling.max_new_tokens or "
            "data.max_prompt_tokens"
        )
