"""Attention of training and scoring: all live tokens of some sequences in one row, [1, N].

transformers looks its attention function up by name (`AttentionInterface`). Ours has no mask
function, so that transformers builds no mask; where each sequence ends is known to whoever runs the
model, and said by `reading`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gearshift.engine.attention.sequences import UNSAID, Sequences, attend, rules_of

NAME = "gearshift_packed"
LAYER_TYPES = ("full_attention", "sliding_attention")

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
    moving = sorted(_rope_types(config) & {"dynamic", "longrope"})
    if moving:
        return f"the rotary frequencies of {name} depend on a batch's longest row ({moving[0]})"
    return None


def _rope_types(config: Any) -> set[str]:
    """The rope types of all layers; the parameters are one dict, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return {entry.get("rope_type", "default") for entry in [parameters, *nested]}


def adopt(module: nn.Module) -> None:
    """The module reads rows end to end from now on. It must not be `unpackable`."""
    for config in _configs(module):
        config._attn_implementation_internal = NAME


def packs(module: nn.Module) -> bool:
    """Whether the module reads rows end to end."""
    return module.config._attn_implementation == NAME  # type: ignore[union-attr]


def padded(module: nn.Module) -> AbstractContextManager:
    """The module reads padded rows, as one that packs does not."""
    return implementation(module, padded_name(module)) if packs(module) else nullcontext()


def release(module: nn.Module) -> None:
    """Undoes `adopt`."""
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


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = UNSAID,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface function: [1, heads, N, size] -> [1, N, heads, size of values].

    A mask that a model makes by itself is not applied: whoever packs it finds out (models/heads).
    """
    sequences = _current.get()
    assert sequences is not None, "a packed model was given padded rows"
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    rules = rules_of(module, query, scaling, sliding_window, softcap, s_aux)
    return attend(query, key, value, sequences, rules)[None], None


AttentionInterface.register(NAME, attention)
