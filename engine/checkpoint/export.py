"""A role's weights as a Hugging Face directory: safetensors, configuration, tokenizer."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.gearbox.adapters import TRAINED, adapters, plain_name, plain_parameters
from gearshift.engine.gearbox.module import meta_twin
from gearshift.engine.gearbox.quantised import packed_layers
from gearshift.engine.models.lora import PREFIX, WEIGHTS, stored_name
from gearshift.engine.zero.layout import gathered


def export_role(model: nn.Module, tokenizer: Any, directory: Path) -> list[Path]:
    """Writes `model` as `export` does, and the adapters that it may have to a directory of peft
    beside it, as actor_adapter. Returns what it wrote. A collective."""
    export(model, tokenizer, directory)
    if not adapters(model):
        return [directory]
    beside = directory.with_name(f"{directory.name}_adapter")
    export_adapter(model, tokenizer, beside)
    return [directory, beside]


def export(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Writes `model`, a transformers module inside an engine of any ZeRO stage. A collective.

    Weights in 4 bit are dequantised: the adapters were trained beside those. Adapters are added to
    the weights, in float32 and rounded once to the model's dtype. What its
    source says of generation goes with it. Rank 0 holds the whole model in host memory while it
    writes; the others hold one tensor.
    """
    weights = whole_weights(model)
    if distributed.is_main():
        plain = meta_twin(model) if adapters(model) else model
        use_cache, plain.config.use_cache = plain.config.use_cache, True
        plain.save_pretrained(directory, state_dict=weights, max_shard_size="5GB")
        plain.config.use_cache = use_cache
        tokenizer.save_pretrained(directory)
        generation = Path(model.name_or_path) / "generation_config.json"
        if generation.exists() and model.can_generate():
            shutil.copyfile(generation, directory / generation.name)
    distributed.barrier()


@torch.no_grad()
def export_adapter(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Writes the adapters of `model`, and what trains whole beside them. A collective."""
    kept: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter):
                if distributed.is_main():
                    kept[PREFIX + stored_name(name)] = _on_host(parameter)
            beat()
    if distributed.is_main():
        config: Any = copy.deepcopy(model.peft_config[TRAINED])  # type: ignore[index,union-attr]
        config.inference_mode = True
        directory.mkdir(parents=True, exist_ok=True)
        save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    distributed.barrier()


def _on_host(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer on rank 0's host memory, adapters added; empty on other
    ranks."""
    kept: dict[str, torch.Tensor] = {}
    adapted = {id(adapter.weight): adapter for adapter in adapters(model)}
    packed = {id(layer.weight): layer for _, layer in packed_layers(model)}
    for name, parameter in plain_parameters(model).items():
        adapter = adapted.get(id(parameter))
        with gathered(parameter, *(adapter.parts if adapter else ())):
            if distributed.is_main():
                layer = packed.get(id(parameter))
                value = layer.whole().to(model.dtype) if layer else parameter
                kept[name] = _on_host(value)
                if adapter:
                    adapter.add_to(kept[name], [_on_host(part) for part in adapter.parts])
        beat()
    if distributed.is_main():
        tied = plain_parameters(model, tied=True)
        for name, value in model.state_dict().items():
            plain = plain_name(name)
            if plain and plain not in tied:
                kept[plain] = value.to("cpu", copy=True)
    return kept
