"""From a configuration to the roles that play it: what fits together is checked, then loaded."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import Config, LoraConfig
from gearshift.engine.gearbox.adapters import STARTED
from gearshift.engine.models import lora
from gearshift.engine.models.cast import Part, cast, check_bases, within_actor
from gearshift.engine.models.files import CheckpointFiles, is_adapter
from gearshift.engine.models.load import load_model, location, room_for
from gearshift.engine.models.shapes import PREFIX, kv_bytes_per_token, kv_shape
from gearshift.engine.rewards.text import check_system_turn, same_tokenizer
from gearshift.engine.rewards.total import RewardSum
from gearshift.engine.roles import Actor, ActorsStart, Critic, Reference, RewardModel, Roles
from gearshift.engine.rollout.context import moves, positions
from gearshift.engine.streaming.store import Store
from gearshift.engine.zero.optim import check_optimizer, hold_still

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What is known before any weight is read."""

    config: Config
    cast: dict[str, Part]
    rewards: RewardSum
    eval_rewards: RewardSum  # the same ones, unless evaluation has its own

    @property
    def tokenizer(self) -> Any:
        """The actor's."""
        return self.cast["actor"].tokenizer

    @property
    def deepspeed(self) -> dict[str, dict]:
        """Settings by role; a reward's by its name."""
        return {name: part.settings for name, part in self.cast.items()}


def draw_up(config: Config) -> Blueprint:
    """Reads configurations and tokenizers only; raises ValueError for whatever cannot work.

    Each fact about the models is checked here alone, the cheapest first; config/check.py has those
    of the configuration by itself. What comes later relies on them.
    """
    parts = cast(config)
    everyone, actor = list(parts.values()), parts["actor"]
    trained = [part for part in everyone if part.trained]
    named = [part for part in everyone if part.named]
    judges = [part for part in everyone if part.kind == "reward"]
    readers = [part for part in everyone if part.kind != "reward"]  # of the actor's token ids
    for part in everyone:
        ds_config.check_nvme(part.settings)
    for part in trained:
        refuse_if(
            ds_config.offloaded(part.settings, "optimizer") == "nvme",
            f"{part.key}.deepspeed",
            "zero_optimization.offload_optimizer.device=nvme: checkpoints do not read an optimizer "
            "that is on a disk",
            "use cpu",
        )
        with part.errors():
            check_optimizer(part.section.optimizer, part.settings)
    rewards = eval_rewards = RewardSum(config.rewards, config.guards)
    if config.eval.rewards:
        eval_rewards = RewardSum(config.eval.rewards, config.guards)
    _check_liger(everyone)
    for part in named:
        _check_files(part)
    _check_adapters(config, actor)
    check_bases(parts)
    for part in trained:
        with part.errors():
            lora.check_bitsandbytes(part.lora)
    for part in readers:
        _check_context(config, part)
    _check_cache(config, actor)
    _check_suppressed(config, actor)
    for part in (actor, *judges):
        _ = part.tokenizer  # it can be read
    for part in readers:
        _check_vocabulary(part, actor)
        if part.named:
            _check_tokens(part, actor)
    for part in judges:
        if same_tokenizer(actor.tokenizer, part.tokenizer):  # it reads the ids that were sampled
            _check_vocabulary(part, actor)
        with part.errors():
            rewards.fit(part.name, positions(part.hf_config))
            if config.data.system_prompt is not None and part.section.chat_template:
                check_system_turn(actor.tokenizer, part.tokenizer)
    return Blueprint(config=config, cast=parts, rewards=rewards, eval_rewards=eval_rewards)


def slower_than_need_be(blueprint: Blueprint, world_size: int) -> list[str]:
    """A line for each trained role whose DeepSpeed JSON costs time that another would not."""
    if world_size > 1:
        return []
    slow = [
        part
        for part in blueprint.cast.values()
        if part.trained
        and part.settings["zero_optimization"]["stage"] == 3
        and ds_config.offloaded(part.settings, "param") is None
    ]
    return [
        f"{part.key}.deepspeed={part.section.deepspeed}: at one rank ZeRO-3 partitions nothing, "
        "and its work per parameter can take longer than the GPU's (docs/benchmarks.md); a stage "
        "1 file, such as trained_zero1_bf16_split.json, trains faster"
        for part in slow
    ]


def told(blueprint: Blueprint) -> list[str]:
    """A line on who plays the reference and on each who is on the actor's base, where those are no
    models of their own, and one for each key of lora that was set in vain."""
    said = {
        "base": "reference: the actor with its adapters off, at no memory of its own",
        "start": "reference: the actor with a frozen copy of the adapters that it starts from",
    }
    played = within_actor(blueprint.config)
    idle = [
        line for role in ("actor", "critic") for line in _idle_lora_keys(blueprint.config, role)
    ]
    on_base = [
        f"{part.key}: adapters on the actor's base" + ", under actor.deepspeed" * (not part.trained)
        for part in blueprint.cast.values()
        if part.base
    ]
    return idle + ([said[played]] if played else []) + on_base


def _idle_lora_keys(config: Config, role: str) -> list[str]:
    section = getattr(config, role)
    plain = LoraConfig()  # type: ignore[call-arg]  # every key has a default
    idle, why = ["base"], f"{role}.path is no directory of adapters"
    if is_adapter(section.path):
        idle = ["alpha", "rslora", "dora", "targets", "init"]
        why = f"those in {role}.path have their own"
    elif not section.lora.r:
        idle, why = [field.name for field in fields(plain)], f"{role}.lora.r=0: every weight trains"
    values = {key: getattr(section.lora, key) for key in idle}
    changed = {key: value for key, value in values.items() if value != getattr(plain, key)}
    return [f"{role}.lora.{key}={value}: has no effect; {why}" for key, value in changed.items()]


def bases(blueprint: Blueprint) -> dict[str, str]:
    """By role a fingerprint of the frozen model under its adapters, or of one that is held still,
    which no checkpoint holds."""
    return {
        name: CheckpointFiles(location(part.source), part.source.revision).fingerprint
        for name, part in blueprint.cast.items()
        if part.trained and (part.lora or part.still)
    }


def build(blueprint: Blueprint, steps: int, pretrain: Any | None) -> Roles:
    """Loads every model. steps: PPO steps of the whole run, for the schedules."""
    config, parts = blueprint.config, blueprint.cast
    # The actor's schedule ends at its end: it takes no step while the critic warms up.
    acting = max(0, steps - config.ppo.critic_warmup_steps) * config.ppo.updates("actor")
    # Room for the weights of every frozen model, before any is read.
    stores = {
        name: room_for(part.source, part.kind, part.settings)
        for name, part in parts.items()
        if not part.trained and not part.base
    }
    own = parts["actor"]
    lm = _load(config, own) if any(part.base for part in parts.values()) else None
    scorers = {
        name: _made(
            part,
            RewardModel,
            _load(config, part, stores.get(name), lm),
            part.tokenizer,
            config.ppo,
            part.source.batch_size,
            part.settings,
        )
        for name, part in parts.items()
        if part.kind == "reward"
    }
    blueprint.rewards.join(scorers)
    reference: Reference | ActorsStart | None = None
    critic = None
    if part := parts.get("reference"):
        model, temperature = _load(config, part, stores["reference"]), config.sampling.temperature
        reference = _made(part, Reference, model, config.ppo, temperature, part.settings)
    if part := parts.get("critic"):
        updates = steps * config.ppo.updates("critic")
        model = _load(config, part, base=lm)
        critic = _made(part, Critic, model, config, part.settings, updates)
    lm = _load(config, own) if lm is None else lm
    actor = _made(own, Actor, lm, own.tokenizer, config, own.settings, acting)
    if played := within_actor(config):
        reference = ActorsStart(actor, adapter=STARTED if played == "start" else None)
    return Roles(
        actor=actor,
        critic=critic,
        reference=reference,
        rewards=blueprint.rewards,
        pretrain=pretrain,
    )


def _made(part: Part, role: Callable[..., T], *given: Any) -> T:
    """A role from its model; a mistake that shows only now names the part's section."""
    with part.errors():
        return role(*given)


def _load(
    config: Config,
    part: Part,
    store: Store | None = None,
    base: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """base: the actor's model, for those parts that are on it."""
    base = base if part.base else None
    source = part.source
    if part.trained:  # recomputing may have been left to the plan
        recompute = getattr(config, part.name).gradient_checkpointing
        source = replace(source, gradient_checkpointing=recompute)
    own = part.lora
    with part.errors():
        model = load_model(
            source,
            part.kind,
            part.settings,
            fresh_head=part.fresh_head,
            store=store,
            base=base,
            swap=own.swap if own else None,
            device=distributed.device(),  # else DeepSpeed would bring it there, by one thread
        )
        if own:
            lora.adapt(model, own, part.settings, config.run.seed)
    if part.still:
        hold_still(model)
    distributed.barrier()  # a host may have to download what another has
    return model


def _check_liger(parts: list[Part]) -> None:
    """Raises ConfigError where models of one family disagree: fusing one changes its classes."""
    first: dict[str, Part] = {}
    for part in parts:
        before = first.setdefault(part.hf_config.model_type, part)
        refuse_if(
            part.section.liger != before.section.liger,
            f"{part.key}.liger",
            f"{before.key}, of the same family, has {before.section.liger}",
            "give both the same",
            part.section.liger,
        )


def _check_files(part: Part) -> None:
    """Raises ConfigError for a path without a model, before any other model is loaded."""
    with part.errors():
        where = location(part.source)
        if where.startswith(PREFIX):
            fix = "give a Hugging Face directory, hub id or .gguf file"
            raise ConfigError("path", "a shape has no weights", fix, value=where)
        if Path(where).is_dir():
            CheckpointFiles(where)


def _check_adapters(config: Config, actor: Part) -> None:
    """Raises ConfigError where nobody can play the reference: what the actor started from is
    adapters and whole modules, which are no checkpoint together; or it is other adapters."""
    path = config.reference.path
    other = config.ppo.kl_coef and path not in (None, config.actor.path) and is_adapter(path)
    problem = "holds adapters, which a reference of its own does not read"
    fix = "merge them by peft and name the result"
    refuse_if(other, "reference.path", problem, fix, repr(path))
    mixed = actor.lora and actor.lora.folder and actor.lora.whole
    refuse_if(
        mixed and config.ppo.kl_coef and config.reference.path in (None, config.actor.path),
        "reference.path",
        "the actor starts from adapters and modules that train whole, which must be merged to "
        "be a reference",
        "merge them by peft and name the result",
        "null",
    )


def _check_vocabulary(part: Part, actor: Part) -> None:
    """Every model that reads the actor's token ids must have an embedding for each of them.

    Also for those that its vocabulary is padded with: nothing keeps a policy from sampling one. Its
    tokenizer may have more, which no row of a dataset may hold, but none that every text has.
    """
    key, tokens = f"{part.start.key}.path", len(actor.tokenizer)
    rows, found = actor.hf_config.vocab_size, part.hf_config.vocab_size
    marks = (getattr(actor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    used = max([rows, *(1 + mark for mark in marks if mark is not None)])
    refuse_if(
        found < min(tokens, used),
        key,
        f"its vocabulary of {found} is smaller than the actor's tokenizer ({tokens} tokens)",
        "use a model with the same tokenizer",
    )
    refuse_if(
        found < rows,
        key,
        f"its vocabulary of {found} is smaller than that of the actor, which may sample any of "
        f"{rows} ids",
        f"pad it by model.resize_token_embeddings({rows}) of transformers",
        value=repr(part.source.path),
    )


def _check_tokens(part: Part, actor: Part) -> None:
    """Raises ConfigError where an id of the actor's means another token to this model."""
    directory = Path(location(part.source))
    bare = directory.is_dir() and not (directory / "tokenizer_config.json").exists()
    if bare and part.section.tokenizer is None:
        return
    theirs = part.tokenizer.get_vocab()
    for token, i in actor.tokenizer.get_vocab().items():
        if theirs.get(token, i) != i:
            raise ConfigError(
                f"{part.key}.path",
                f"its tokenizer has {token!r} at {theirs[token]}, the actor's at {i}",
                "use a model with the actor's tokenizer",
                value=repr(part.section.path),
            )


def _longest_response(config: Config, *, training: bool = False) -> tuple[str, int]:
    """The section that allows it, and its tokens. training: not what only evaluation samples."""
    found = {"sampling": config.sampling.max_new_tokens}
    if config.eval.sources and not training:
        found["eval.sampling"] = config.eval.sampling_of(config.sampling).max_new_tokens
    section = max(found, key=found.__getitem__)  # the first of equals
    return section, found[section]


def _check_context(config: Config, part: Part) -> None:
    """Raises ConfigError where the longest prompt and response are more than a model reads."""
    limit, prompt = positions(part.hf_config), config.data.max_prompt_tokens
    sampling, response = _longest_response(config, training=part.name != "actor")
    if limit is not None and prompt + response > limit:
        both = f"data.max_prompt_tokens={prompt} + {sampling}.max_new_tokens={response}"
        why = ", where its rotary frequencies change" if moves(part.hf_config) else ""
        problem = f"{both} exceed the {part.name}'s context of {limit}{why}"
        other = f", or give another {part.key}.path" if part.name == "critic" else ""
        raise ConfigError("", problem, f"lower either{other}")


def _check_suppressed(config: Config, actor: Part) -> None:
    """Raises ConfigError for a token id that the actor does not have."""
    rows = actor.hf_config.get_text_config().vocab_size
    foreign = [i for i in config.sampling.suppress_tokens if not 0 <= i < rows]
    problem = f"the actor has token ids from 0 to {rows - 1}"
    refuse_if(foreign, "sampling.suppress_tokens", problem, value=foreign)
    none_left = len(set(config.sampling.suppress_tokens)) == rows
    refuse_if(none_left, "sampling.suppress_tokens", "names every token that the actor has")


def _check_cache(config: Config, actor: Part) -> None:
    """Raises ConfigError where a cache of the size asked for cannot hold one longest sequence."""
    rollout, text = config.rollout, actor.hf_config.get_text_config()
    if not rollout.kv_cache_gb or rollout.engine == "hf":
        return
    tp = rollout.tp or distributed.ranks_per_node()
    size = 2 if actor.settings.get("bf16", {}).get("enabled") else 4
    sampling, response = _longest_response(config)
    longest = config.data.max_prompt_tokens + response
    layers = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    per_token = kv_bytes_per_token(layers, kv_shape(text), tp, size)
    # Two blocks more: one partly filled, and the cache's dummy.
    least = (longest + 2 * rollout.block_size) * per_token / 1e9
    if rollout.kv_cache_gb < least:
        raise ConfigError(
            "rollout.kv_cache_gb",
            f"one sequence of {longest} tokens needs {least:.3g}",
            f"raise it, or lower {sampling}.max_new_tokens or data.max_prompt_tokens",
            value=f"{rollout.kv_cache_gb:.3g}",
        )
