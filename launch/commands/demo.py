"""PPO on SmolLM2-135M: fetches the assets, then runs the demo recipe through `deepspeed`.

Further arguments go to the job, as --run.steps 20 --run.seed 1.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from gearshift.engine.config import assets
from gearshift.launch.commands import fetch

ASSETS = ("smollm2", "movie-prompts")
LAUNCH = Path(__file__).resolve().parents[1]
_MOST_RANKS = 2  # what the recipe's batch is made for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: 2, or one per GPU")
    parser.epilog = "Any --section.key VALUE goes to the job."
    parser.set_defaults(overrides=[])


def main(args: argparse.Namespace) -> int:
    """Returns the exit status of the job."""
    for name in ASSETS:
        if fetch.fetch(name, assets.cache_dir()):
            print(f"fetched {name}", flush=True)
    return subprocess.run(command(args.ranks, args.overrides), env=environment()).returncode


def command(ranks: int, overrides: list[str]) -> list[str]:
    """The launch line of the demo."""
    gpus = gpu_count()
    ranks = ranks or min(_MOST_RANKS, gpus or _MOST_RANKS)
    recipe = ["--config", str(LAUNCH / "recipes" / "demo.yaml"), "--rollout.tp", str(ranks)]
    return [*launcher(ranks), str(LAUNCH / "train.py"), *recipe, *overrides]


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def launcher(ranks: int) -> list[str]:
    """`deepspeed` on this machine, on a port that is free; 0 ranks: one per GPU, or one."""
    from gearshift.engine.cluster.rendezvous import free_port

    gpus = gpu_count()
    words = [str(Path(sys.executable).with_name("deepspeed")), "-q"]
    words += ["--master_port", str(free_port())]
    return [*words, "--num_gpus" if gpus else "--num_accelerators", str(ranks or gpus or 1)]


def environment() -> dict[str, str]:
    """DeepSpeed is told that there is no GPU; its launcher would warn of it, twice."""
    import torch

    return ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}) | os.environ
