"""A Hugging Face directory, hub id or GGUF file -> a module for a role.

Under ZeRO-3 a checkpoint goes straight into the partitions: the module is built on the meta device,
then each small module in turn gets its tensors from the memory-mapped safetensors files and is
partitioned before the next one is read. No rank ever holds a whole model.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification

from gearshift.engine.attention import packed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.config.assets import resolve
from gearshift.engine.config.deepspeed import offloaded
from gearshift.engine.config.errors import ConfigError, refuse_if, said
from gearshift.engine.config.schema import ModelConfig
from gearshift.engine.gearbox.quantised import Linear4bit, packed_layers
from gearshift.engine.models.files import LM_HEADS, CheckpointFiles, in_order, is_adapter
from gearshift.engine.models.fused import fuse
from gearshift.engine.models.gguf import as_directory
from gearshift.engine.models.heads import has_score
from gearshift.engine.models.share import share
from gearshift.engine.streaming.store import Store, partitioning, place, room_of
from gearshift.engine.zero import layout

logger = logging.getLogger("gearshift")
_HOST = torch.device("cpu")

FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
AUTO_CLASSES = {
    "policy": AutoModelForCausalLM,
    "critic": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}
OVERRIDDEN = {  # of generation_config.json
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens",
}  # fmt: skip
# What transformers dequantises without a GPU and a package of its own.
DEQUANTISERS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def auto_class(role: str, hf_config: Any) -> Any:
    """The class that builds a role's module: AUTO_CLASSES, but for critics of families such as
    Gemma 3, which only classify sequences, and GPT-2, whose head for tokens is no linear `score`.
    The `score` of their sequence classifiers is the same head."""
    family = type(hf_config)
    own = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(family, object)
    by_token = "AutoModelForToken" in str(getattr(hf_config, "auto_map", None)) or issubclass(
        own, GenericForTokenClassification
    )
    if role == "critic" and not by_token and family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return AUTO_CLASSES["reward"]
    return AUTO_CLASSES[role]


def location(config: ModelConfig) -> str:
    """The directory or hub id of a model; a GGUF file is dequantised into a cached directory."""
    refuse_if(not config.path, "path", "give a directory, hub id or .gguf file", value="''")
    path = resolve(str(config.path))
    if path.endswith(".gguf"):
        return str(as_directory(Path(path)))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").exists():
            made = f"it is a checkpoint: gearshift export {path} makes models of it"
            fix = made if (Path(path) / "state.json").exists() else ""
            fix = "actor, critic and rewards take adapters" if is_adapter(path) else fix
            raise ConfigError("path", "the directory has no config.json", fix, repr(path))
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError("path", "no such directory", value=repr(path))
    return path


def load_config(config: ModelConfig, role: str) -> Any:
    """The configuration of the model, or of the text model in one that also sees or hears.

    One label for critic and reward, dropout 0, no KV cache. ConfigError for quantised weights.
    """
    labels = {} if role == "policy" else {"num_labels": 1}
    where = location(config)
    try:
        loaded = AutoConfig.from_pretrained(
            where,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **labels,
        )
    except Exception as error:  # of a config.json with wrong values, any
        reason = said(error)
        alone = "without a network give a directory; `gearshift plan` also takes shape:NAME"
        fix = alone if "connect to" in reason else ""
        fix = "trust_remote_code: true runs it" if "contains custom code" in reason else fix
        raise ConfigError("path", reason, fix, value=repr(config.path)) from None
    _refuse_quantised(config, getattr(loaded, "quantization_config", None))
    try:
        text = loaded.get_text_config()
    except ValueError as error:  # of a model that reads two kinds of text
        raise ConfigError("path", said(error), value=repr(config.path)) from None
    if text is not loaded and not loaded.is_encoder_decoder:
        tied = getattr(loaded, "tie_word_embeddings", text.tie_word_embeddings)
        loaded, text.tie_word_embeddings = text, tied  # of the whole: its head is the text's
        if labels:
            loaded.num_labels = 1
    for name in ("hidden_size", "num_hidden_layers"):
        try:
            lacks = getattr(loaded, name, None) is None
        except RuntimeError:  # transformers' word for layers of unlike shapes
            problem = f"its layers differ in {name}, which is not supported"
            raise ConfigError("path", problem, value=repr(config.path)) from None
        problem = (
            f"its configuration ({type(loaded).__name__}) has no {name}: it is no decoder of text"
        )
        refuse_if(lacks, "path", problem, value=repr(config.path))
    for name, value in vars(loaded).items():
        if "drop" in name and isinstance(value, float):
            setattr(loaded, name, 0.0)
    return loaded


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer as it is on disk."""
    source = config.tokenizer or location(config)
    folder, patterns = Path(source), ("*token*", "*vocab*", "*.model")
    fix = "name the directory or hub id of one"
    if folder.is_dir() and not any(list(folder.glob(pattern)) for pattern in patterns):
        raise ConfigError("tokenizer", "no tokenizer is there", fix, value=repr(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        tokenizer("a")
        return tokenizer
    except Exception as error:  # of a damaged tokenizer.json, any
        reason = said(error)
        raise ConfigError("tokenizer", reason, fix, value=repr(source)) from None


def room_for(config: ModelConfig, role: str, ds_config: dict) -> Store | None:
    """Takes the room for a frozen model's weights where its JSON keeps them off the device; reads
    none of them. Raises ConfigError where there is not enough on a disk."""
    if not offloaded(ds_config, "param"):
        return None
    dtype = dtype_of(ds_config)
    module = _build(config, load_config(config, role), role, dtype)
    return place(ds_config, room_of(module.parameters(), dtype))


def load_model(
    config: ModelConfig,
    role: str,
    ds_config: dict,
    *,
    fresh_head: bool = False,
    store: Store | None = None,
    base: PreTrainedModel | None = None,
    swap: Callable[[nn.Module], None] | None = None,
    device: torch.device = _HOST,
) -> PreTrainedModel:
    """The module of `role` ("policy", "critic" or "reward"), partitioned where ZeRO-3 is asked.

    store: of room_for; takes each partition of a frozen model as soon as it is made. base: a loaded
    model of the same files; its decoder becomes this one's, in the same memory. swap: else puts
    layers that are packed as soon as they are read in the place of others (lora.Lora.swap).
    device: where weights are read to without a store; the host's are mapped, not read.

    A critic is a classifier with one label, see auto_class: its head's weight is the score head of
    the checkpoint, or zero (V = 0 at the start) with `fresh_head`.
    Raises ConfigError when tensors are missing, left over or of other shapes than the configuration
    says; warns of another head that is left out.
    """
    hf_config = load_config(config, role)
    dtype = dtype_of(ds_config)
    if store:
        ds_config = partitioning(ds_config)
    module = _build(config, hf_config, role, dtype)
    files = CheckpointFiles(location(config), config.revision)
    bias = ("score.bias",) if fresh_head or role == "critic" else ()  # reward models have none
    fresh = ("score.weight", *bias) if fresh_head else bias
    if base is not None:
        share(module, base, layout.sharer(ds_config, dtype))
    names = files.match(module, fresh)
    if names is None:
        problem = "its tensors are renamed by transformers' loader, which shares no base"
        refuse_if(base is not None, "path", problem, value=repr(config.path))
        made = replace(config, attn=module.config._attn_implementation)
        module = _load_with_transformers(made, hf_config, role, ds_config, dtype, fresh, files)
        if swap:
            swap(module)
        for _, layer in packed_layers(module):
            layer.pack()
        if store:
            for parameter in module.parameters():
                store.take(parameter)
    else:
        used = {source for source in names.values() if source is not None}
        if base is None:
            _tell(config, role, files.left_out(module, used))
            if swap:
                swap(module)
        read = files.reader(names, dtype, _HOST if store else device)
        _fill(module, read, store.take if store else partitioner(ds_config, dtype))
        _fill_buffers(module, files, names)
    module.name_or_path = str(files.directory)
    if role == "policy":
        module.generation_config = _generation_config(config, files.directory, module)
    return prepare(module, config, role)


def prepare(module: PreTrainedModel, config: ModelConfig, role: str) -> PreTrainedModel:
    """The module as the engine runs it: no dropout, no cache, rows end to end and layers fused
    where they can be."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    fuse(module, config.liger)
    if config.attn == "auto":
        _pack(module, role, config.path)
    if config.gradient_checkpointing:
        module.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": packed.recompute_contexts}
        )
    module.config.use_cache = False
    return module.eval()


def _pack(module: PreTrainedModel, role: str, path: str | None) -> None:
    """Rows lie end to end wherever the model allows it."""
    pools = role == "reward" and not has_score(module)
    name = type(module).__name__
    why = f"{name} pools its tokens by itself" if pools else packed.unpackable(module)
    if why is None:
        packed.adopt(module)
    else:
        logger.warning("%s: its rows are padded, sorted by length: %s", path, why)


def attention_implementation(wanted: str, hf_config: Any, dtype: torch.dtype) -> str:
    """`wanted`, or for "auto" the first installed of flash-attn 2 and 3, else SDPA.

    flash-attn takes no float32. Without it, attention with soft-capped scores (Gemma 2) is eager:
    SDPA has no cap, and some versions of transformers drop it without a word. Raises ConfigError
    where either is wanted nevertheless.
    """
    capped = getattr(hf_config, "attn_logit_softcapping", None)
    if wanted == "sdpa" and capped:
        raise ConfigError(
            "attn",
            f"{hf_config.model_type} caps its attention scores, which SDPA cannot",
            "use auto, eager or flash_attention_2",
            value="'sdpa'",
        )
    half = dtype in (torch.bfloat16, torch.float16)
    if wanted in FLASH_ATTENTION and not half:
        raise ConfigError(
            "attn",
            f"flash-attn takes no {dtype}",
            "use auto or sdpa, or bf16 in the DeepSpeed JSON",
            value=repr(wanted),
        )
    if wanted != "auto":
        return wanted
    from transformers import utils

    if torch.cuda.is_available() and half:
        for version in (2, 3):
            installed = getattr(utils, f"is_flash_attn_{version}_available", lambda: False)
            if installed():
                return f"flash_attention_{version}"
    return "eager" if capped else "sdpa"


def dtype_of(ds_config: dict) -> torch.dtype:
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def _refuse_quantised(config: ModelConfig, quantised: dict[str, Any] | None) -> None:
    """Its numbers are none without their scales, and training would round every update away."""
    if not quantised:
        return
    method = str(quantised.get("quant_method"))
    fix = "give the checkpoint that it was made from"
    if name := DEQUANTISERS.get(method):
        fix = (
            f'write it dequantised and copy its tokenizer: python -c "import transformers as t; '
            f"t.AutoModelForCausalLM.from_pretrained('{config.path}', dtype='auto', "
            f"quantization_config=t.{name}(dequantize=True)).save_pretrained('OUT')\""
        )
    problem = f"its weights are quantised (quantization_config.quant_method={method})"
    raise ConfigError("path", problem, fix, value=repr(config.path))


def _tell(config: ModelConfig, role: str, names: list[str]) -> None:
    """Warns of stored tensors that are left out; a critic of a language model has no use for its
    head."""
    names = [name for name in names if role == "policy" or not name.startswith(LM_HEADS)]
    if names:
        parts = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))[:3]
        _say(f"{config.path}: {len(names)} of its tensors are left out ({', '.join(parts)})")


@lru_cache  # actor and reference read the same
def _say(text: str) -> None:
    logger.warning(text)


def _generation_config(config: ModelConfig, directory: Path, module: nn.Module) -> GenerationConfig:
    """transformers' defaults with the end ids of generation_config.json; sampling is the run's."""
    made = GenerationConfig.from_model_config(module.config)
    if not (directory / "generation_config.json").exists():
        return made
    try:
        stored = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # as above
        reason = f"generation_config.json: {said(error)}"
        raise ConfigError("path", reason, value=repr(config.path)) from None
    made.eos_token_id = ends = stored.eos_token_id
    each = ends if isinstance(ends, list) else [0 if ends is None else ends]
    wrong = any(type(end) is not int for end in each)
    problem = f"generation_config.json: eos_token_id={ends!r} is neither an id nor a list of them"
    refuse_if(wrong, "path", problem, value=repr(config.path))
    told = [
        f"{name}={value}" for name, value in stored.to_diff_dict().items() if name in OVERRIDDEN
    ]
    if told:
        _say(
            f"{config.path}: generation_config.json asks for {', '.join(told)}; this run samples "
            "as its own settings say"
        )
    return made


def _build(config: ModelConfig, hf_config: Any, role: str, dtype: torch.dtype) -> PreTrainedModel:
    auto = auto_class(role, hf_config)
    attention = attention_implementation(config.attn, hf_config, dtype)
    arguments = {"trust_remote_code": config.trust_remote_code, "attn_implementation": attention}
    try:
        with init_empty_weights(include_buffers=False):
            module = auto.from_config(hf_config, **arguments)
    except Exception as error:  # of sizes that make no model, any
        reason = said(error)
        lacking = "ttention" in reason and isinstance(error, ValueError | ImportError)
        if lacking and config.attn == "auto" and attention != "eager":
            return _build(replace(config, attn="eager"), hf_config, role, dtype)
        if lacking:
            raise ConfigError("attn", reason, value=config.attn) from None
        problem = f"no {auto.__name__} of it: {reason}"
        raise ConfigError("path", problem, value=repr(config.path)) from None
    module.tie_weights()
    if role == "critic" and not has_score(module):
        raise ConfigError(
            "path",
            f"{type(module).__name__} has no linear `score` head, which a critic needs",
            "choose a decoder family such as Llama or Qwen",
            value=repr(config.path),
        )
    return module


def _fill(
    module: nn.Module,
    read: Callable[[str, Tensor], Tensor],
    partition: Callable[[nn.Parameter], None],
) -> None:
    """Reads what of `module` is on meta, one small module at a time, partitioning each."""
    made: dict[int, nn.Parameter] = {}  # tied weights share one parameter
    values = in_order(read, [(name, p) for name, p in module.named_parameters() if p.is_meta])
    for path, part in module.named_modules():
        hollow = dict(part.named_parameters(recurse=False))
        for name, parameter in hollow.items():
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                name_read, value = next(values)
                assert name_read == f"{path}.{name}".removeprefix("."), "not in the modules' order"
                made[id(parameter)] = nn.Parameter(value)
                partition(made[id(parameter)])
                beat()
            setattr(part, name, made[id(parameter)])
        if isinstance(part, Linear4bit):
            made.pop(id(hollow["weight"]), None)  # else all in 16 bit would be there to the end
            part.pack()


def _fill_buffers(module: nn.Module, files: CheckpointFiles, names: dict[str, str | None]) -> None:
    for name, buffer in module.named_buffers():
        source = names.get(name)
        if source is not None:
            buffer.copy_(files.read(source))


def partitioner(ds_config: dict, dtype: torch.dtype) -> Callable[[nn.Parameter], None]:
    """A function that turns one full parameter into this rank's ZeRO-3 partition, or leaves it."""
    if ds_config["zero_optimization"]["stage"] != 3:
        return lambda parameter: None
    from deepspeed import zero

    swapper = None

    def partition(parameter: nn.Parameter) -> None:
        nonlocal swapper
        holder = nn.ParameterList([parameter])
        made = zero.Init(
            module=holder, config_dict_or_path=ds_config, dtype=dtype, param_swapper=swapper
        )
        swapper = made.param_swapper

    return partition


def _load_with_transformers(
    config: ModelConfig,
    hf_config: Any,
    role: str,
    ds_config: dict,
    dtype: torch.dtype,
    fresh: tuple[str, ...],
    files: CheckpointFiles,
) -> PreTrainedModel:
    """For checkpoints whose tensors must be renamed or fused: transformers' own loader."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    head = files.head if role != "policy" else None
    zero3 = ds_config["zero_optimization"]["stage"] == 3
    keep = HfDeepSpeedConfig(ds_config) if zero3 else None  # transformers holds it weakly
    module, info = auto_class(role, hf_config).from_pretrained(
        location(config),
        config=hf_config,
        dtype=dtype,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn,
        output_loading_info=True,
        **({"key_mapping": {rf"^{re.escape(head)}\.": "score."}} if head else {}),
    )
    del keep
    unset_hf_deepspeed_config()
    loaded = dict(module.named_parameters())
    for name in fresh:
        if name in loaded and (name in info["missing_keys"] or "score.weight" in fresh):
            layout.partition(loaded[name]).zero_()
    missing = sorted(set(info["missing_keys"]) - set(fresh))
    headless = missing == ["score.weight"]
    problem = "it has no score head: it is no reward model"
    refuse_if(headless, "path", problem, value=repr(config.path))
    wrong = missing + [str(key) for key in info["mismatched_keys"]]
    problem = f"missing or misshapen tensors: {wrong[:3]}"
    fix = "if its files have them, transformers loses them under ZeRO-3: use a stage 2 JSON"
    refuse_if(wrong, "path", problem, fix if zero3 else "", repr(config.path))
    _tell(config, role, files.left_out(module, files.names - set(info["unexpected_keys"])))
    logger.warning(
        "%s: its tensors are renamed by transformers, so its loader read them (whole on rank 0)",
        config.path,
    )
    return module
