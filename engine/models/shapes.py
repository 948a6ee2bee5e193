"""The sizes of a model, without its weights.

A module is made on the meta device from its configuration, so every family that transformers knows
has exact parameter counts. `shape:NAME` is a published architecture that needs no download.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gearshift.engine.attention.packed import by_layer
from gearshift.engine.config.errors import ConfigError, choices, said
from gearshift.engine.config.schema import ModelConfig
from gearshift.engine.gearbox.quantised import BYTES
from gearshift.engine.streaming.units import cut, most_at_once

PREFIX = "shape:"

# config.json of the published models: family, layers, hidden, heads, KV heads, MLP, vocabulary.
_PUBLISHED: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "qwen2.5-0.5b": ("qwen2", 24, 896, 14, 2, 4864, 151936),
    "qwen2.5-1.5b": ("qwen2", 28, 1536, 12, 2, 8960, 151936),
    "qwen2.5-7b": ("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-14b": ("qwen2", 48, 5120, 40, 8, 13824, 152064),
    "qwen2.5-32b": ("qwen2", 64, 5120, 40, 8, 27648, 152064),
    "qwen3-0.6b": ("qwen3", 28, 1024, 16, 8, 3072, 151936),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 12288, 151936),
    "llama3-8b": ("llama", 32, 4096, 32, 8, 14336, 128256),
    "smollm2-135m": ("llama", 30, 576, 9, 3, 1536, 49152),
    "llama3-70b": ("llama", 80, 8192, 64, 8, 28672, 128256),
}
_TIED = (
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen3-0.6b",
    "smollm2-135m",
)  # word embeddings serve as the head


def published(name: str, *, layers: int = 0, vocabulary: int = 0) -> Any:
    """The transformers configuration of a published architecture; other numbers than 0 are taken in
    place of its own."""
    from transformers import AutoConfig

    if name not in _PUBLISHED:
        raise ConfigError("path", "unknown", choices(name, _PUBLISHED), value=f"{PREFIX}{name}")
    family, own_layers, hidden, heads, kv_heads, mlp, own_vocabulary = _PUBLISHED[name]
    return AutoConfig.for_model(
        family,
        num_hidden_layers=layers or own_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary or own_vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=name in _TIED,
    )


def read_config(model: ModelConfig, role: str) -> Any:
    """The configuration a model's path names; role as in models.load_config."""
    from gearshift.engine.models.load import load_config

    path = str(model.path)
    if path.startswith(PREFIX):
        config = published(path.removeprefix(PREFIX))
        config.num_labels = 2 if role == "policy" else 1
        return config
    return load_config(model, role)


@dataclass(frozen=True)
class Shape:
    """One model of one role.

    numels: elements of each parameter, tied ones once, those of adapters included. trained: of
    those that a role which is trained trains. head: of the projection to the vocabulary, 0 without
    one. adapted: of the weights that adapters are added to, 0 where all trains. magnitudes: of
    those that DoRA trains. packed: of each weight that is kept in 4 bit.
    """

    numels: tuple[int, ...]
    trained: tuple[int, ...]
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    head: int
    embedding: int
    tied: bool = False  # the embedding is the head
    units: tuple[int, ...] = ()  # elements of what comes together when streamed, in order
    kept: tuple[bool, ...] = ()  # units that stay to the end of a pass
    experts: int = 0  # elements of all experts
    active: float = 1.0  # share of the experts that a token meets
    adapted: int = 0
    magnitudes: int = 0
    packed: tuple[int, ...] = ()
    head_trains: bool = True

    @property
    def total(self) -> int:
        return sum(self.numels)

    @property
    def updated(self) -> int:
        """Elements that training changes."""
        return sum(self.trained)

    def weight_bytes(self, size: int) -> float:
        """Of all, whole, at `size` bytes an element that is not kept in 4 bit."""
        packed = sum(self.packed)
        return size * (self.total - packed) + BYTES * packed

    @property
    def whole(self) -> bool:
        """Whether all of it trains."""
        return self.updated == self.total

    @cached_property
    def body(self) -> float:
        """Elements that multiply every token: no embeddings, no head, only the active experts."""
        tables = self.embedding + (0 if self.tied else self.head)
        return self.total - tables - self.experts * (1 - self.active)

    def shard(self, world: int) -> int:
        """Elements of a rank's ZeRO-3 partition: each parameter is padded to the ranks."""
        return sum(math.ceil(n / world) for n in self.numels)

    def updated_shard(self, world: int) -> int:
        """Of those that training changes."""
        return sum(math.ceil(n / world) for n in self.trained)

    @property
    def most_streamed(self) -> int:
        """Elements on the device at once while the model is streamed."""
        return most_at_once(self.units, self.kept)

    def kv_bytes_per_token(self, tp: int, size: int) -> int:
        """Of one TP rank; a head that cannot be cut is on several ranks."""
        return kv_bytes_per_token(self.layers, (self.kv_heads, self.head_dim), tp, size)


def kv_shape(text: Any) -> tuple[int, int]:
    """(key-value heads, elements of one) of a text configuration of transformers, of the layer that
    has most."""

    def of(layer: Any) -> tuple[int, int]:
        heads = layer.num_attention_heads
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        return kv_heads, getattr(layer, "head_dim", None) or layer.hidden_size // heads

    return max(map(of, by_layer(text)), key=math.prod)


def _most(text: Any, *names: str) -> int:
    """The largest of some sizes, which a family has by one name or another, or by layer; 0 without
    one. Gemma 3n has a list of them."""
    found = [getattr(layer, name, None) or 0 for layer in by_layer(text) for name in names]
    return max(max(size) if isinstance(size, list) else size for size in found)


def kv_bytes_per_token(layers: int, kv_shape: tuple[int, int], tp: int, size: int) -> int:
    """Keys and values of one TP rank. size: bytes of an element."""
    kv_heads, head_dim = kv_shape
    return 2 * layers * math.ceil(kv_heads / tp) * head_dim * size


def shape_of(hf_config: Any, role: str, adapters: Any = None, *, still: bool = False) -> Shape:
    """role: "policy", "critic" or "reward". adapters: a lora.Lora. still: as of cast.Part. Raises
    ConfigError where transformers has no such model of this family."""
    from accelerate import init_empty_weights

    from gearshift.engine.gearbox.adapters import adapters as adapters_of
    from gearshift.engine.models import lora
    from gearshift.engine.models.load import auto_class
    from gearshift.engine.zero.optim import hold_still

    auto, family = auto_class(role, hf_config), hf_config.model_type
    try:
        with init_empty_weights(include_buffers=True):
            module = auto.from_config(hf_config)
    except Exception as error:  # of sizes that make no model, any
        reason = said(error)
        way_out = ", or ppo.estimator=rloo, which has no critic" if role == "critic" else ""
        problem = f"no {auto.__name__} of {family}: {reason}"
        key = "actor.path" if role == "policy" else role
        raise ConfigError(key, problem, f"choose another family{way_out}") from None
    module.tie_weights()
    text = hf_config.get_text_config()
    head = module.get_output_embeddings() if role == "policy" else None
    embedding = module.get_input_embeddings().weight
    experts = _most(text, "num_local_experts", "num_experts")
    chosen = _most(text, "num_experts_per_tok") or experts
    units = cut(module)
    packed: tuple[int, ...] = ()
    if adapters:
        layers = lora.quantisable(module, adapters).values()
        packed = tuple(layer.weight.numel() for layer in layers)
        lora.inject(module, adapters)
    if still:
        hold_still(module)
    named = list(module.named_parameters())
    kv_heads, head_dim = kv_shape(text)
    return Shape(
        numels=tuple(p.numel() for _, p in named),
        trained=tuple(p.numel() for _, p in named if p.requires_grad),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        mlp=_most(text, "intermediate_size") or 4 * text.hidden_size,
        heads=_most(text, "num_attention_heads"),
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=text.vocab_size,
        head=head.weight.numel() if head is not None else 0,
        embedding=embedding.numel(),
        tied=head is not None and head.weight is embedding,
        units=tuple(sum(p.numel() for p in unit.parameters) for unit in units),
        kept=tuple(unit.kept for unit in units),
        experts=sum(p.numel() for n, p in named if ".experts." in n),
        active=chosen / experts if experts else 1.0,
        adapted=sum(adapter.weight.numel() for adapter in adapters_of(module)),
        magnitudes=sum(a.m.numel() for a in adapters_of(module) if a.m is not None),
        packed=packed,
        head_trains=head is None or head.weight.requires_grad,
    )
