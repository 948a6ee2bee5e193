"""Measurements: `gearshift bench PART [arguments]`.

`gearshift bench PART --help` has the arguments of a part.
"""

import argparse
import importlib

from gearshift.launch.cli import parsed

# Each is a module with the interface of a command, imported when it is asked for. One that takes
# `--section.key value` sets a default for `args.overrides`.
PARTS = {
    "step": ("gearshift.launch.bench.step", "time and memory of one PPO step, by phase"),
    "train": ("gearshift.launch.bench.train", "forward and backward of one role, by token"),
    "generation": ("gearshift.launch.bench.generation", "tokens per second of the rollout engine"),
    "mismatch": ("gearshift.launch.mismatch", "log-probs of generation and training, by layer"),
    "checkpoint": ("gearshift.launch.bench.checkpoint", "seconds and bytes of a checkpoint"),
    "shift": ("gearshift.launch.bench.shift", "bytes and seconds of a change of gear"),
    "kernels": ("gearshift.launch.bench.ops.run", "the fused kernels against plain PyTorch"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, PARTS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in PARTS.items()]
    parser.epilog = "\n".join(
        ["parts:", *lines, "", "gearshift bench PART --help explains a part."]
    )
    parser.add_argument("part", metavar="PART", choices=PARTS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the part")


def main(args: argparse.Namespace) -> int:
    """Runs one part; returns its exit status."""
    module = importlib.import_module(PARTS[args.part][0])
    return module.main(parsed(module, f"gearshift bench {args.part}", args.arguments))
