"""ZeRO-3 by decoder layer: one fetch and one release for all that a layer holds."""

from functools import partial
from typing import Any

import torch
from torch import nn


def fetch_by_layer(module: nn.Module, ds_config: dict, *trunks: nn.Module) -> None:
    """Tells DeepSpeed to gather whole layers; before deepspeed.initialize.

    By parameter its Python takes longer than a GPU's products: 28 layers, forward and backward at
    one CPU rank: 770 ms of its own without this, 370 with.
    trunks: of a module that is trained, the parts whose forward runs the layers, each once: its
    trunk, and the model with its head, which may call what is inside the trunk (OPT). A forward
    raises ValueError where a layer runs again, as DeepSpeed would reduce its gradients too early.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        return
    from deepspeed.utils import set_z3_leaf_module

    ran: set[nn.Module] = set()
    for trunk in trunks:
        trunk.register_forward_pre_hook(lambda *_: ran.clear())
    for layer in decoder_layers(module):
        set_z3_leaf_module(layer, True)
        if trunks:
            layer.register_forward_pre_hook(partial(_run_once, ran))
        layer.register_forward_pre_hook(_ask_for_gradient)
        layer.register_forward_hook(_as_tuple)


def _run_once(ran: set[nn.Module], layer: nn.Module, inputs: tuple) -> None:
    computed_again = torch._C._current_graph_task_id() >= 0  # inside a backward pass
    if layer in ran and not computed_again:
        raise ValueError(
            f"{type(layer).__name__} runs several times in a forward, which ZeRO-3 does not train; "
            "use a DeepSpeed JSON of stage 2"
        )
    ran.add(layer)


def _as_tuple(layer: nn.Module, inputs: tuple, output: Any) -> Any:
    """DeepSpeed learns that a layer's gradients are there by a hook that PyTorch leaves out, with a
    warning at most, where the output is a list (OpenAI GPT): they would be dropped."""
    return tuple(output) if isinstance(output, list) else output


def _ask_for_gradient(layer: nn.Module, inputs: tuple) -> None:
    """Where nothing before a layer trains, its input asks for a gradient that nobody reads.

    DeepSpeed (seen in 0.19.8) reduces a layer's gradients when that of its input is there, and
    gathered weights are given back then; without one it does both before they are made.
    """
    if torch.is_grad_enabled() and inputs and not inputs[0].requires_grad:
        inputs[0].requires_grad_()


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists: decoder layers, not the experts inside them."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in decoder_layers(child)]


def place_buffers(engine: Any) -> None:
    """Moves the module's buffers to the engine's device.

    DeepSpeed moves nothing of a module whose parameters were cut before it saw them.
    """
    for part in engine.module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(engine.device)
