"""A role's weights as a Hugging Face directory: safetensors, configuration, tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.zero.layout import gathered


def export(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Writes `model`, a transformers module inside an engine of any ZeRO stage. A collective.

    What its source says of generation goes with it. Rank 0 holds the whole model in host memory
    while it writes; the others hold one tensor.
    """
    weights = whole_weights(model)
    if distributed.is_main():
        use_cache, model.config.use_cache = model.config.use_cache, True
        model.save_pretrained(directory, state_dict=weights, max_shard_size="5GB")
        model.config.use_cache = use_cache
        tokenizer.save_pretrained(directory)
        generation = Path(model.name_or_path) / "generation_config.json"
        if generation.exists() and model.can_generate():
            shutil.copyfile(generation, directory / generation.name)
    distributed.barrier()


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer on rank 0's host memory; empty on other ranks."""
    kept: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        with gathered(parameter):
            if distributed.is_main():
                kept[name] = parameter.detach().to("cpu", copy=True)
        beat()
    if distributed.is_main():
        for name, value in model.state_dict().items():
            if name not in kept and name not in _tied(model):
                kept[name] = value.to("cpu", copy=True)
    return kept


def _tied(model: nn.Module) -> set[str]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return set(named) - set(dict(model.named_parameters()))
