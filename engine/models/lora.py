"""Low-rank adapters of a role: where they start, on which layers they sit, and their directories.

A directory of peft holds adapter_config.json and adapter_model.safetensors. The layers are peft's,
put into the Hugging Face module itself (inject_adapter_in_model): its class, its paths and its
forward stay, so heads, packing and the gearbox see the model that they know; peft's own PeftModel
would wrap it. Weights that train whole beside the adapters (a critic's value head, modules_to_save)
keep their places, too, where peft would train copies.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gearshift.engine.config.errors import ConfigError, refuse_if, said
from gearshift.engine.config.schema import LoraConfig, TrainedConfig
from gearshift.engine.gearbox.adapters import (
    STARTED,
    TRAINED,
    adapted_layers,
    add_magnitude,
    row_norms,
)
from gearshift.engine.gearbox.quantised import BLOCK, Linear4bit
from gearshift.engine.models.files import ADAPTER_CONFIG, is_adapter
from gearshift.engine.models.load import dtype_of, partitioner
from gearshift.engine.zero.layers import decoder_layers
from gearshift.engine.zero.layout import gathered, whole_shape, write_whole

logger = logging.getLogger("gearshift")

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a tensor's name in a directory of peft
MAGNITUDE = "lora_magnitude_vector"
KINDS = ("lora_A", "lora_B", MAGNITUDE)  # an adapter's, by their places in a layer of peft
_ROUTERS = ("gate", "router", "shared_expert_gate")  # they choose experts; nobody adapts them
# Of adapter_config.json: what would compute something else than LoRA or DoRA.
_OTHER_KINDS = (
    "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication",
    "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config",
    "monteclora_config", "kasa_config",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapters of one role. folder: of peft, that they start from; None: they start at zero.

    task: as peft calls what the model does. keeps_start: their first state stays beside them,
    frozen, for the reference.
    """

    settings: LoraConfig
    base: str
    revision: str | None
    task: str
    folder: Path | None = None
    keeps_start: bool = False

    @property
    def whole(self) -> list[str]:
        """Modules that train whole."""
        own = ["score"] if self.task != "CAUSAL_LM" else []
        named = self.settings.modules_to_save
        if self.folder is not None and not named:
            named = read_config(self.folder).get("modules_to_save") or []
            if own:  # peft notes both names of heads, of which a model has one
                named = [name for name in named if name != "classifier"]
        return own + [name for name in named if name not in own]

    def swap(self, module: nn.Module, trained_in: torch.dtype | None = None) -> None:
        """Puts layers that `pack` quantises in the place of those that are to be in 4 bit.

        trained_in: a narrower dtype than the module's, that a run has quantised from. Raises
        ConfigError.
        """
        check_bitsandbytes(self)
        for name, layer in quantisable(module, self).items():
            packed = Linear4bit(layer.weight, layer.bias, rounds=trained_in)  # type: ignore[arg-type]
            module.set_submodule(name, packed)


def adapts(section: TrainedConfig) -> bool:
    """Whether a role is to have adapters: new ones, or those that its path holds."""
    return bool(section.lora.r or is_adapter(section.path))


def is_dora(section: Any) -> bool:
    """Whether the adapters of a role are to have magnitudes, or have them where its path holds
    them."""
    if is_adapter(section.path):
        return bool(read_config(Path(section.path).expanduser()).get("use_dora"))
    return section.lora.dora


def stored_name(name: str) -> str:
    """What a directory of peft calls a parameter of a module, behind PREFIX."""
    return name.replace(f".{TRAINED}", "").replace(f"{MAGNITUDE}.weight", MAGNITUDE)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; raises ConfigError where its adapters are not of the kind that is known
    here."""
    file = folder / ADAPTER_CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ConfigError("path", f"not JSON: {said(error)}", value=repr(str(file))) from None
    other = next((key for key in _OTHER_KINDS if found.get(key)), None)
    if found.get("bias", "none") != "none":
        other = "bias"
    which = f"{other}={found.get(other)}" if other else kind
    refuse_if(
        kind != "LORA" or other,
        "path",
        f"its adapters are neither plain LoRA nor DoRA ({which})",
        "merge it into its base by peft first, and give the merged model",
        repr(str(folder)),
    )
    for key, kind in (("r", int), ("lora_alpha", (int, float))):
        value = found.get(key)
        usable = isinstance(value, kind) and not isinstance(value, bool) and value > 0
        problem = f"{key} is {value!r} in {ADAPTER_CONFIG}; it must be a number above 0"
        refuse_if(not usable, "path", problem, value=repr(str(folder)))
    return found


def base_of(folder: Path, settings: LoraConfig) -> str:
    """The model under the adapters of a directory: the one it names, or that of lora.base."""
    named = settings.base or read_config(folder).get("base_model_name_or_path")
    problem = f"{folder / ADAPTER_CONFIG} names no base model"
    fix = "name it here, or there as base_model_name_or_path"
    refuse_if(not named, "lora.base", problem, fix, "null")
    return str(named)


def check_bitsandbytes(lora: Lora | None) -> None:
    """Raises ConfigError where weights are to be in 4 bit and what packs them is not installed."""
    missing = lora and lora.settings.load_in_4bit and find_spec("bitsandbytes") is None
    problem, fix = "needs the package bitsandbytes", "install it: pip install '.[qlora]'"
    refuse_if(missing, "lora.load_in_4bit", problem, fix, "true")


def quantisable(module: nn.Module, lora: Lora) -> dict[str, nn.Module]:
    """The layers that are kept in 4 bit, by their paths: all that `targets: auto` would adapt, but
    those that train whole. Raises ConfigError where bitsandbytes cannot quantise one."""
    if not lora.settings.load_in_4bit:
        return {}
    linear = {id(layer) for layer in _linear_layers(module)}
    paths = [name for name, part in module.named_modules() if id(part) in linear]
    trained = [p for p, _ in module.named_modules() if _ends(p, *lora.whole)]
    found = {}
    for name in paths:
        if _ends(name, *_ROUTERS) or any(f"{name}.".startswith(f"{path}.") for path in trained):
            continue
        layer = module.get_submodule(name)
        width, key = int(layer.weight.shape[-1]), "lora.load_in_4bit"
        problem = f"{name} has rows of {width}, which are no multiple of the blocks of {BLOCK}"
        transposed = isinstance(layer, Conv1D)
        problem = f"{name} has a transposed weight (Conv1D)" if transposed else problem
        fix = "leave it out, or choose another family"
        refuse_if(transposed or width % BLOCK, key, problem, fix, "true")
        found[name] = layer
    return found


def adapt(module: PreTrainedModel, lora: Lora, ds_config: dict, seed: int) -> None:
    """Gives a loaded module its adapters, partitioned where ZeRO-3 is asked."""
    inject(module, lora)
    fill(module, lora, partitioner(ds_config, dtype_of(ds_config)), seed)


def inject(module: nn.Module, lora: Lora) -> None:
    """Puts the adapters' layers into the module, without values, and freezes all else.

    The module's own weights may be partitioned or on meta. Raises ConfigError.
    """
    config = _peft_config(module, lora)
    peft = _peft()
    dora, config.use_dora = config.use_dora, False  # else it would read weights that are not here
    try:
        peft.inject_adapter_in_model(config, module, TRAINED, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError("lora.targets", said(error), value=lora.settings.targets) from None
    config.use_dora = dora
    inside = {id(layer) for layer in _linear_layers(module)}
    for name, layer in adapted_layers(module):
        if id(layer.base_layer) not in inside:
            problem = f"{name} is no linear layer inside the decoder layers"
            raise ConfigError("lora.targets", problem, "leave it out")
        if dora:
            old = not hasattr(layer, "lora_variant")
            refuse_if(old, "lora.dora", "needs peft 0.19 or newer", "install that", "true")
            add_magnitude(layer, TRAINED)
        if lora.keeps_start:
            _add_start(layer)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name)
    for name in lora.whole:
        for parameter in _whole_module(module, name):
            parameter.requires_grad_(True)
    config.modules_to_save = lora.whole or None
    if lora.settings.targets == "auto" and lora.folder is None:
        _tell_experts(module, lora)


def fill(module: nn.Module, lora: Lora, partition: Callable, seed: int) -> None:
    """Gives injected adapters their values, in the dtype of the model, and partitions them.

    They are drawn alike on every rank, whatever the number of ranks. One weight of the model is
    whole at a time. A collective under ZeRO-3.
    """
    generator = torch.Generator().manual_seed(seed)
    stored = _stored(module, lora) if lora.folder else {}
    for name, layer in adapted_layers(module):
        held = layer.base_layer
        dtype = held.state.dtype if isinstance(held, Linear4bit) else held.weight.dtype
        values = [stored.get(stored_name(f"{name}.{kind}.weight")) for kind in KINDS]
        if not stored:
            r, width = layer.lora_A[TRAINED].weight.shape
            a = _drawn(r, width, lora.settings.init, generator)
            b = torch.zeros(layer.lora_B[TRAINED].weight.shape)
            values = [a, b, _lengths(layer) if layer.lora_magnitude_vector else None]
        for kind, value in zip(KINDS, values, strict=True):
            for adapter, holder in getattr(layer, kind).items():
                assert value is not None
                made = nn.Parameter(value.to(dtype, copy=True), requires_grad=adapter == TRAINED)
                partition(made)
                holder.weight = made


@torch.no_grad()
def _lengths(layer: Any) -> Tensor:
    """[out]: of the rows of a layer's weight, which may be cut over ranks."""
    weight = layer.base_layer.weight
    with gathered(weight):
        rows = len(layer.lora_B[TRAINED].weight)
        a, b = weight.new_zeros(1, weight.numel() // rows), weight.new_zeros(rows, 1)
        return row_norms(weight, a, b, 0.0, layer.fan_in_fan_out)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        problem = "adapters need the package peft"
        raise ConfigError("lora", problem, "install it: pip install '.[lora]'") from None
    return peft


def _peft_config(module: nn.Module, lora: Lora) -> Any:
    """peft's LoraConfig, which also becomes adapter_config.json."""
    peft, settings = _peft(), lora.settings
    if lora.folder is not None:
        stored = read_config(lora.folder)
        known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
        kept = {key: value for key, value in stored.items() if key in known}
        kept |= {"modules_to_save": None, "lora_dropout": settings.dropout}
        kept |= {"inference_mode": False, "init_lora_weights": True}
        refuse_if(
            settings.r not in (0, stored["r"]),
            "lora.r",
            f"the adapters in path have rank {stored['r']}",
            "leave it out",
            settings.r,
        )
    else:
        kept = {
            "r": settings.r,
            "lora_alpha": settings.alpha,
            "use_rslora": settings.rslora,
            "use_dora": settings.dora,
            "lora_dropout": settings.dropout,
            "target_modules": _targets(module, settings.targets),
            "fan_in_fan_out": any(isinstance(part, Conv1D) for part in _linear_layers(module)),
        }
    kept |= {"base_model_name_or_path": lora.base, "revision": lora.revision}
    by_row = type(module).__name__.endswith("ForSequenceClassification")  # see load.auto_class
    return peft.LoraConfig(**kept | {"task_type": "SEQ_CLS" if by_row else lora.task})


def _linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Inside the decoder layers."""
    for layer in decoder_layers(module):
        yield from (part for part in layer.modules() if isinstance(part, (nn.Linear, Conv1D)))


def _targets(module: nn.Module, wanted: list[str] | str) -> list[str]:
    """Names as peft matches them, by their ends; whole paths where those would match more."""
    names = {id(part): name for name, part in module.named_modules()}
    linear = [names[id(layer)] for layer in _linear_layers(module)]
    if wanted == "auto":
        chosen = [name for name in linear if not _ends(name, *_ROUTERS)]
    else:
        chosen = [name for name in linear if _ends(name, *wanted)]
        for target in wanted:
            known = sorted({name.split(".")[-1] for name in linear})
            refuse_if(
                not any(_ends(name, target) for name in chosen),
                "lora.targets",
                f"no linear layer inside the decoder layers has the name {target}",
                f"there are {', '.join(known)}",
                wanted,
            )
    problem = "the model has no linear layers to adapt" if wanted else "names no layer"
    refuse_if(not chosen, "lora.targets", problem, "" if wanted else "use auto, or names", wanted)
    ends = sorted({name.split(".")[-1] for name in chosen})
    matched = {name for name in names.values() if _ends(name, *ends)}
    return ends if matched == set(chosen) else sorted(chosen)


def _ends(name: str, *targets: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _whole_module(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of the modules of this name."""
    found = [part for path, part in module.named_modules() if _ends(path, name)]
    parameters = [p for part in found for p in part.parameters()]
    key = "lora.modules_to_save"
    missing = not name or not parameters  # the empty name is the whole model's
    refuse_if(missing, key, f"the model has no weights in a module {name}", value=repr(name))
    both = any(hasattr(layer, "lora_A") for part in found for layer in part.modules())
    refuse_if(both, key, "it has adapters", "leave it out here or in lora.targets", repr(name))
    twice = [p for p in module.named_parameters(remove_duplicate=False) if p[1] is parameters[0]]
    refuse_if(len(twice) > 1, key, "its weights are those of another module, too", value=repr(name))
    return parameters


def _add_start(layer: Any) -> None:
    """A second, frozen adapter of the same shape."""
    for kind in (layer.lora_A, layer.lora_B):
        rows, columns = kind[TRAINED].weight.shape
        kind[STARTED] = nn.Linear(columns, rows, bias=False, device="meta")
    if layer.lora_magnitude_vector:
        add_magnitude(layer, STARTED)
    layer.lora_dropout[STARTED] = nn.Identity()
    layer.scaling[STARTED] = layer.scaling[TRAINED]


def _drawn(r: int, width: int, init: str, generator: torch.Generator) -> Tensor:
    """[r, width] float32: A at the start."""
    if init == "gaussian":
        return torch.randn(r, width, generator=generator) / r
    bound = 1 / math.sqrt(width)  # Kaiming-uniform with a = sqrt(5), as nn.Linear
    return torch.empty(r, width).uniform_(-bound, bound, generator=generator)


def _stored(module: nn.Module, lora: Lora) -> dict[str, Tensor]:
    """The tensors of a directory of peft by their names in the module, which must be those of its
    adapters; modules that train whole are filled on the way."""
    assert lora.folder is not None
    file = lora.folder / WEIGHTS
    refuse_if(not file.is_file(), "path", f"no {WEIGHTS}", value=repr(str(lora.folder)))
    try:
        with safe_open(file, "pt") as opened:
            found = {key.removeprefix(PREFIX): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        problem = f"{WEIGHTS} is cut off or broken ({error})"
        raise ConfigError("path", problem, value=repr(str(lora.folder))) from None
    wanted = {
        stored_name(f"{name}.{kind}.weight"): tuple(getattr(layer, kind)[TRAINED].weight.shape)
        for name, layer in adapted_layers(module)
        for kind in KINDS
        if getattr(layer, kind)
    }
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            wanted[name] = tuple(whole_shape(parameter))
    differ = [k for k in wanted.keys() | found.keys() if _shape(found, k) != wanted.get(k)]
    if differ:
        name = sorted(differ)[0]
        raise ConfigError(
            "path",
            f"{name} is {_shape(found, name) or 'absent'} in {WEIGHTS} and "
            f"{wanted.get(name) or 'absent'} in a model of {lora.base}",
            "give the base that it was trained on in lora.base",
            repr(str(lora.folder)),
        )
    for name, parameter in module.named_parameters():
        if name in found:
            write_whole(parameter, found[name])
    return found


def _shape(found: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(found[name].shape) if name in found else None


def _tell_experts(module: nn.Module, lora: Lora) -> None:
    """Experts whose weights are stacked in one tensor are no linear layers."""
    stacked = [name for name, p in module.named_parameters() if len(whole_shape(p)) == 3]
    if stacked:
        ends = sorted({name.rsplit(".", 1)[-1] for name in stacked})
        logger.warning(
            "%s: lora.targets=auto leaves out its experts, whose weights are stacked (%s in %d "
            "modules)",
            lora.base,
            ", ".join(ends),
            len({name.rsplit(".", 1)[0] for name in stacked}),
        )
