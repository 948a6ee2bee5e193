"""A checkpoint as Hugging Face directories: `gearshift export runs/mine/checkpoints/step_000020`.

Weights are the exact float32 masters, of a split master too, whatever precision trained them; one
process reads the pieces of all ranks. `--dtype bfloat16` rounds them as training saw them.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gearshift.engine.checkpoint import resume
from gearshift.engine.checkpoint.export import export_role
from gearshift.engine.config import load as config_load
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import Config
from gearshift.engine.models import lora
from gearshift.engine.models.cast import Part, cast
from gearshift.engine.models.heads import Policy, ValueModel
from gearshift.engine.models.load import dtype_of, load_model
from gearshift.engine.zero.state import whole
from gearshift.kernels.adamw import join_master

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNPARTITIONED = {"zero_optimization": {"stage": 0}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder step_NNNNNN")
    parser.add_argument("--out", metavar="FOLDER", help="default: CHECKPOINT/../../export")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def main(args: argparse.Namespace) -> int:
    """Writes FOLDER/actor and, where there is one, FOLDER/critic, and beside a role with adapters
    its directory of peft, as FOLDER/actor_adapter.

    Raises ValueError where CHECKPOINT is none, or is damaged.
    """
    checkpoint = Path(args.checkpoint)
    state = read_state(checkpoint)
    out = Path(args.out or checkpoint.resolve().parent.parent / "export")
    refuse_if(
        out.exists() and not out.is_dir(), "--out", "is a file", "name a folder", repr(str(out))
    )
    config = saved_config(state)
    parts = cast(config)  # neither rewards nor what the run fits on are asked for
    for role in state["roles"]:
        model = restored(checkpoint, state, parts[role], config.run.seed).to(DTYPES[args.dtype])
        for made in export_role(model, parts["actor"].tokenizer, out / role):
            print(f"exported {made}")
        del model  # else two would be in memory
    return 0


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises ConfigError where the folder holds no whole checkpoint."""
    found = resume.fault(checkpoint)
    if found:
        raise ConfigError(str(checkpoint), str(found), "name a whole checkpoint")
    return json.loads((checkpoint / "state.json").read_bytes())


def saved_config(state: dict[str, Any]) -> Config:
    """The configuration of the run that saved."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(state["about"]["config"], file)  # JSON is YAML
        file.flush()
        return config_load.load(file.name, []).config


def restored(checkpoint: Path, state: dict[str, Any], part: Part, seed: int) -> nn.Module:
    """The model of a role with the masters that a checkpoint has of it, in float32."""
    model, holder = unpartitioned(part, seed)
    files = sorted(checkpoint.glob(f"{part.name}.rank*.safetensors"))
    stepped = state["roles"][part.name]["optimizer_steps"] > 0
    fill(holder, files, split=stepped and part.section.optimizer.name == "split_adamw")
    return model


def unpartitioned(part: Part, seed: int) -> tuple[nn.Module, nn.Module]:
    """A role's model in float32, as it was before training, and what its engine calls it in."""
    own, fresh = part.lora, part.fresh_head
    swap = partial(own.swap, trained_in=dtype_of(part.settings)) if own else None
    # It trains no more: flash-attn would refuse float32.
    source = replace(part.source, attn="auto", gradient_checkpointing=None)
    with part.errors():
        model = load_model(source, part.kind, UNPARTITIONED, fresh_head=fresh, swap=swap)
        if own:
            lora.adapt(model, own, UNPARTITIONED, seed)
    return model, Policy(model) if part.kind == "policy" else ValueModel(model)


@torch.no_grad()
def fill(holder: nn.Module, files: list[Path], *, split: bool) -> None:
    """Puts the masters in `files` into the parameters of the same names."""
    parameters = dict(holder.named_parameters())
    lows = whole(files, "low") if split else None
    for name, weights in whole(files):
        if lows is not None:
            of, low = next(lows)
            assert of == name
            weights = join_master(weights, low)
        parameters[name].copy_(weights.view(parameters[name].shape))
