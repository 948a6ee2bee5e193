"""Who plays in a run: each model, what it is loaded from, and whether it is trained.

The plan and the loader read one cast, so that the critic that is planned is the one that runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import MODEL_FOR_MASKED_LM_MAPPING

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import Config, LoraConfig
from gearshift.engine.models.files import CheckpointFiles, is_adapter
from gearshift.engine.models.load import load_tokenizer, location
from gearshift.engine.models.lora import Lora, adapts, base_of, is_dora
from gearshift.engine.models.shapes import PREFIX, read_config
from gearshift.engine.rewards.text import same_tokenizer

# Of zero_optimization: by them DeepSpeed makes other forms of a role's weights.
_OF_EACH = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
)
_SCORED = ("ForSequenceClassification", "ForTokenClassification")  # classes with a score head


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of a run; what it names is read when first asked for, and kept.

    name: actor, critic, reference, or a reward's own. key: of its section, as rewards.1.
    section: as the user wrote it. keeps_start: the adapters that it starts from stay beside the
    trained ones, for the reference. still: it trains in other runs, not in this one. origins: whose
    weights it may start from where its section has no path; the first that can serve is taken, and
    the last always can. base: the part on whose frozen weights, in the same memory, its adapters
    are to be.
    """

    name: str
    key: str
    kind: Literal["policy", "critic", "reward"]
    section: Any  # a TrainedConfig, ReferenceConfig or RewardConfig
    trained: bool = False
    keeps_start: bool = False
    still: bool = False
    origins: tuple["Part", ...] = field(default=(), repr=False)
    base: "Part | None" = field(default=None, repr=False)

    @property
    def named(self) -> bool:
        """Whether the user gave its path."""
        return self.section.path is not None

    @property
    def adapter(self) -> Path | None:
        """The directory of peft that the user gave as its path."""
        return Path(self.section.path).expanduser() if self._has_adapter else None

    @property
    def _has_adapter(self) -> bool:
        return (self.trained or self.kind == "reward") and is_adapter(self.section.path)

    @property
    def _lora(self) -> LoraConfig:
        """Of a reward model, whose adapters are made already, the defaults."""
        return getattr(self.section, "lora", None) or LoraConfig()  # type: ignore[call-arg]

    @cached_property
    def source(self) -> Any:
        """Its section, with the path and the revision that its model is loaded from: under
        adapters, the base's."""
        if self.start is not self:
            own = self.start.source
            return replace(self.section, path=own.path, revision=own.revision)
        if self.adapter is None:
            return self.section
        with self.errors():
            base = base_of(self.adapter, self._lora)
        tokenizer = self.section.tokenizer
        if tokenizer is None and (self.adapter / "tokenizer_config.json").exists():
            tokenizer = str(self.adapter)
        return replace(self.section, path=base, tokenizer=tokenizer)

    @cached_property
    def lora(self) -> Lora | None:
        """Its adapters; None where it trains whole, or is a whole model."""
        own = self._has_adapter or (self.trained and self._lora.r)
        packs = self._lora.load_in_4bit
        with self.errors():
            problem = "quantises what is frozen, and without adapters nothing is"
            refuse_if(packs and not own, "lora.load_in_4bit", problem, "set lora.r", "true")
            if not own:
                return None
            refuse_if(
                packs and self.settings["zero_optimization"]["stage"] == 3,
                "deepspeed",
                "ZeRO-3 does not cut weights in 4 bit (lora.load_in_4bit)",
                "use a stage 2 file, as trained_zero2_bf16.json: each rank then holds all of them",
                self.section.deepspeed,
            )
            dora, problem = is_dora(self.section), "DoRA's norms would be taken for every token"
            wrong = dora and self._lora.generate == "unmerged" and self.kind == "policy"
            refuse_if(wrong, "lora.generate", problem, "use merged", "unmerged")
            problem = "DoRA reads weights that are whole"
            refuse_if(dora and packs, "lora.load_in_4bit", problem, "use one of the two", "true")
            return Lora(
                settings=self._lora,
                base=str(self.source.path),
                revision=self.source.revision,
                task="CAUSAL_LM" if self.kind == "policy" else "TOKEN_CLS",
                folder=self.adapter,
                keeps_start=self.keeps_start,
            )

    @property
    def start(self) -> "Part":
        """Whose weights it starts from: its own, or those of another part."""
        return self._start[0]

    @property
    def fresh_head(self) -> bool:
        """Whether a critic's head starts at zero, because its source has no score to keep; that of
        a reward model on a base is among its adapters."""
        if self.kind == "reward":
            return self._has_adapter
        if self.kind != "critic" or self.start is not self:
            return self.kind == "critic" and self.start.kind != "reward"
        scored = (self.hf_config.architectures or [""])[0].endswith(_SCORED)
        return (
            not scored and CheckpointFiles(location(self.source), self.source.revision).head is None
        )

    @property
    def assumption(self) -> str | None:
        """What is taken for granted where a tokenizer that decides on the start is not there."""
        start, assumed = self._start
        if not assumed:
            return None
        return (
            f"{self.key}.path=null: assumed to start from {start.section.path}: tokenizers that "
            f"cannot be read here were judged by their models' families ({', '.join(assumed)}); "
            "the run compares them"
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its DeepSpeed JSON, validated; of a reward model on the actor's base, the actor's."""
        if self.base and not self.trained:
            return ds_config.frozen_on(self.base.settings)
        return ds_config.load(self.section.deepspeed, frozen=not self.trained)

    @cached_property
    def hf_config(self) -> Any:
        """Its transformers configuration."""
        with self.errors():
            if self.source.path is None:
                raise ConfigError(
                    "path",
                    "give a Hugging Face directory, hub id or shape, as shape:qwen2.5-7b",
                    value="null",
                )
            return read_config(self.source, self.kind)

    @cached_property
    def tokenizer(self) -> Any:
        """Its own, or that of its source."""
        with self.errors():
            return load_tokenizer(self.source)

    def under(self, deepspeed: str) -> "Part":
        """The same part by another DeepSpeed JSON."""
        return replace(self, section=replace(self.section, deepspeed=deepspeed))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Loaders name the field of a model's section; this adds which section. A path that is not
        the directory of adapters is that of their base."""
        try:
            yield
        except ConfigError as error:
            if error.key == "path" and self.adapter and str(self.adapter) not in str(error.value):
                error = ConfigError("lora.base", error.problem, error.fix, error.value)
            if error.key == "lora.base" and not self.trained:  # which has no such key
                error = ConfigError("path", error.problem, error.fix, repr(self.section.path))
            own = hasattr(self.section, error.key.split(".")[0])
            section = self.start.key if error.key == "path" else self.key  # whose path it is
            raise (error.under(section) if own else error) from None

    @cached_property
    def _start(self) -> tuple["Part", list[str]]:
        """(whose weights it starts from, what was assumed of others)."""
        if self.named or not self.origins:
            return self, []
        *others, last = self.origins
        assumed: list[str] = []
        for other in others:
            if is_decoder(other.hf_config) and _same_tokens(last, other, assumed):
                return other, assumed
        return last, assumed

    @cached_property
    def _readable_tokenizer(self) -> Any | None:
        """None where it cannot be read, as of a published architecture."""
        if self.section.tokenizer is None and str(self.section.path).startswith(PREFIX):
            return None
        try:
            return self.tokenizer
        except ValueError:
            return None


def cast(config: Config) -> dict[str, Part]:
    """The parts of a run by name: actor, critic, reference, and the reward models as written.

    The critic starts from the first reward model that is a decoder, reads the actor's tokens and is
    not adapters on the actor's base, else from the actor; the reference from the actor. A reference
    that the actor itself plays is no part: see `within_actor`.
    """
    played = within_actor(config)
    actor = replace(_actor(config), keeps_start=played == "start")
    rewards = [
        Part(
            name=reward.name,
            key=f"rewards.{i}",
            kind="reward",
            section=reward,
            base=actor if is_adapter(reward.path) else None,
        )
        for i, reward in enumerate(config.rewards)
        if reward.kind == "model"
    ]
    critic = Part(
        name="critic",
        key="critic",
        kind="critic",
        section=config.critic,
        trained=True,
        origins=(*(part for part in rewards if not part.base), actor),
        base=actor if config.critic.share_base else None,
    )
    reference = Part(
        name="reference",
        key="reference",
        kind="policy",
        section=config.reference,
        origins=(actor,),
    )
    parts = [actor]
    parts += [critic] if config.ppo.estimator == "gae" else []
    parts += [reference] if config.ppo.kl_coef > 0 and not played else []
    return {part.name: part for part in [*parts, *rewards]}


def within_actor(config: Config) -> Literal["base", "start"] | None:
    """What of an actor with adapters is the reference: its base, with the adapters off, or a frozen
    copy of the adapters that it started from. None: the reference is a model of its own.
    """
    actor, reference = _actor(config), config.reference
    # What trains whole leaves no base behind.
    if config.ppo.kl_coef == 0 or actor.lora is None or actor.lora.whole:
        return None
    if reference.path in (None, actor.section.path):
        return "start" if actor.adapter else "base"
    same = (reference.path, reference.revision) == (actor.source.path, actor.source.revision)
    return "base" if same else None


def check_bases(parts: dict[str, Part]) -> None:
    """Raises ConfigError where a part cannot be on the actor's frozen model, as it is to be."""
    for part in parts.values():
        if part.base:
            _check_base(part, parts["actor"])


def _check_base(part: Part, actor: Part) -> None:
    """Raises ConfigError where a part cannot be adapters on the actor's frozen model in memory."""
    key, value, off = "critic.share_base", "true", "or use false"
    if part.kind == "reward":
        key, value = f"{part.key}.path", repr(part.section.path)
        off = "or merge it into its base by peft and give the result"
    for one in (actor, part):
        problem = f"{one.key} has no adapters, so all of its weights train"
        refuse_if(one.lora is None, key, problem, f"give {one.key}.lora.r, {off}", value)
        assert one.lora is not None
        whole = [name for name in one.lora.whole if name != "score"]
        problem = f"{whole} of {one.key} are whole modules beside its adapters (modules_to_save)"
        refuse_if(whole, key, problem, f"leave them out, {off}", value)
        for name, of_each in one.settings["zero_optimization"].items():
            copies = name in _OF_EACH and of_each not in (False, 1)
            problem = f"zero_optimization.{name}={of_each} in {one.key}.deepspeed makes a copy"
            refuse_if(copies, key, problem, f"remove it, {off}", value)
    ours, theirs = ((one.source.path, one.source.revision) for one in (actor, part))
    problem = f"{part.key} is on {_at(*theirs)}, the actor on {_at(*ours)}"
    refuse_if(ours != theirs, key, problem, f"give both the same path, {off}", value)
    packs = [one.lora is not None and one.lora.settings.load_in_4bit for one in (actor, part)]
    problem = f"lora.load_in_4bit is {packs[1]} of {part.key} and {packs[0]} of the actor"
    fix = f"give both the same, {off}"
    refuse_if(part.trained and packs[0] != packs[1], key, problem, fix, value)
    kept, own = _kept(actor.settings), _kept(part.settings) if part.trained else {}
    for name, found in own.items():
        problem = f"{name} is {found} in {part.key}.deepspeed and {kept[name]} in actor.deepspeed"
        refuse_if(found != kept[name], key, problem, f"give both the same, {off}", value)
    on_disk = ds_config.offloaded(actor.settings, "param") == "nvme"
    problem = "DeepSpeed keeps each role's weights on a disk by itself"
    refuse_if(on_disk, key, problem, f"set offload_param.device to cpu or none, {off}", value)


def _kept(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a DeepSpeed JSON decides where weights lie, and as what."""
    return {
        "zero_optimization.stage": settings["zero_optimization"]["stage"],
        "zero_optimization.offload_param.device": ds_config.offloaded(settings, "param"),
        "bf16.enabled": bool(settings.get("bf16", {}).get("enabled")),
    }


def _at(path: str, revision: str | None) -> str:
    return f"{path}@{revision}" if revision else path


def _actor(config: Config) -> Part:
    still = config.run.task == "critic" and not adapts(config.actor)  # adapters are few
    return Part(
        name="actor", key="actor", kind="policy", section=config.actor, trained=True, still=still
    )


def is_decoder(hf_config: Any) -> bool:
    """Whether a token attends only to those before it.

    Told by the family's classes: one that fills in masked words looks both ways, and so does an
    encoder before a decoder.
    """
    masked = type(hf_config) in MODEL_FOR_MASKED_LM_MAPPING
    own_code = "AutoModelForMaskedLM" in str(getattr(hf_config, "auto_map", None))
    return not (masked or own_code or hf_config.is_encoder_decoder)


def _same_tokens(actor: Part, other: Part, assumed: list[str]) -> bool:
    """Whether two models read the same tokens; a guess by their families is told in `assumed`."""
    ours, theirs = actor._readable_tokenizer, other._readable_tokenizer
    if ours is not None and theirs is not None:
        return same_tokenizer(ours, theirs)
    same = actor.hf_config.model_type == other.hf_config.model_type
    assumed.append(f"{other.name}'s is {'the' if same else 'not the'} actor's")
    return same
