"""Attention of training and scoring: all live tokens of some sequences in one row, [1, N].

Where each sequence ends is known to whoever runs the model, and said by `reading`.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.engine.attention.sequences import Sequences, attend, register
from gearshift.kernels.paged_attention import Rules

NAME = "gearshift_packed"
LAYER_TYPES = ("full_attention", "sliding_attention")
OUTER = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")  # the last product of a plain MLP

# Of a thread: streamed forwards of several rows take turns (streaming/lockstep.py).
_current: ContextVar[Sequences | None] = ContextVar("sequences", default=None)


@contextmanager
def reading(sequences: Sequences | None) -> Iterator[None]:
    """Attention layers attend inside each of `sequences`; None: the rows are padded."""
    token = _current.set(sequences)
    try:
        yield
    finally:
        _current.reset(token)


def recompute_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch.utils.checkpoint: a layer is computed again, in the thread that runs
    backward, over the same sequences."""
    return nullcontext(), reading(_current.get())


def unpackable(module: nn.Module) -> str | None:
    """Why rows of this model must be padded; None where they can lie end to end."""
    name = type(module).__name__
    if not isinstance(module, PreTrainedModel):
        return f"{name} is not a transformers model"
    if why := getattr(module, "padded_because", None):
        return why
    config = module.config.get_text_config()
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if getattr(config, "use_bidirectional_attention", False):
        return f"{name} attends in both directions"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if unknown or getattr(module, "_is_stateful", False):
        kinds = ", ".join(unknown) or "a state"
        return f"{name} has layers other than full or windowed attention ({kinds})"
    if not getattr(module, "_supports_attention_backend", False):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    if not accepts(trunk(module), "position_ids"):
        return f"{name} numbers the tokens of a row by itself"
    return None


def trunk(module: Any) -> Any:
    """The model without its head, whatever its class says it is called (Llama 4)."""
    base = module.base_model
    return getattr(module, "model", base) if base is module else base


def accepts(module: Any, argument: str) -> bool:
    """Whether the module's forward names this argument. One that is not told the positions of its
    tokens (position_ids) counts columns."""
    return argument in inspect.signature(type(module).forward).parameters


def rope_entries(text: Any) -> list[dict[str, Any]]:
    """The rope parameters of a text model's layers: one dict, or one per layer type."""
    parameters = getattr(text, "rope_parameters", None) or {}
    return [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]


def by_layer(text: Any) -> list[Any]:
    """A text model's configuration, or those of its layers where they have sizes of their own
    (Gemma 4), which transformers then gives of a layer only."""
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def moving_rope(text: Any) -> str | None:
    """The rope type of a text model whose frequencies change with the longest row it reads."""
    types = {entry.get("rope_type") for entry in rope_entries(text)}
    return next((kind for kind in ("dynamic", "longrope") if kind in types), None)


def adopt(module: nn.Module) -> None:
    """The module reads rows end to end from now on. It must not be `unpackable`."""
    for config in _configs(module):
        config._attn_implementation_internal = NAME
    layers = getattr(trunk(module), "layers", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    mlp: Any = getattr(last, "mlp", None)
    plain = any(hasattr(mlp, name) for name in OUTER) and not hasattr(mlp, "router")
    if plain and _select not in mlp._forward_pre_hooks.values():  # a base may be shared
        mlp.register_forward_pre_hook(_select)
        mlp.register_forward_hook(_spread)


def _read_of(inputs: tuple) -> Tensor | None:
    """Places of the tokens that somebody reads of an MLP with these inputs; None: all."""
    sequences = _current.get()
    return sequences.read if sequences is not None and len(inputs) == 1 else None


def _select(mlp: nn.Module, inputs: tuple) -> tuple | None:
    """The last layer's MLP computes the tokens alone that somebody reads: the prompts' are not."""
    read = _read_of(inputs)
    return None if read is None else (inputs[0].flatten(0, -2).index_select(0, read)[None],)


def _spread(mlp: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
    """Its results, at the places of their tokens; 0 for the others."""
    read = _read_of(inputs)
    if read is None:
        return None
    whole = output.new_zeros(sum(_current.get().lengths), output.shape[-1])  # type: ignore[union-attr]
    return whole.index_copy(0, read, output[0])[None]


def packs(module: nn.Module) -> bool:
    """Whether the module reads rows end to end."""
    return module.config._attn_implementation == NAME  # type: ignore[union-attr]


def padded(module: nn.Module) -> AbstractContextManager:
    """The module reads padded rows, as one that packs does not."""
    return implementation(module, padded_name(module)) if packs(module) else nullcontext()


def release(module: nn.Module, why: str) -> None:
    """Undoes `adopt`, for good: the module is `unpackable` from now on, for the reason given."""
    module.padded_because = why  # type: ignore[assignment]
    for config in _configs(module):
        config._attn_implementation_internal = padded_name(module)


def padded_name(module: nn.Module) -> str:
    """transformers' implementation for padded rows: SDPA, which has no cap on scores."""
    capped = getattr(module.config.get_text_config(), "attn_logit_softcapping", None)  # type: ignore[union-attr,operator]
    return "sdpa" if getattr(module, "_supports_sdpa", False) and not capped else "eager"


@contextmanager
def implementation(module: nn.Module, name: str) -> Iterator[None]:
    """All layers take the attention function `name`, then again their own."""
    before = [(config, config._attn_implementation_internal) for config in _configs(module)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


def _configs(module: nn.Module) -> list[Any]:
    found = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    return list(found.values())


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Rules, others: dict
) -> Tensor:
    sequences = _current.get()
    assert sequences is not None, "a packed model was given padded rows"
    return attend(query, key, value, sequences, rules)


register(NAME, _attend)
