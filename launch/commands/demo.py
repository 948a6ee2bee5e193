"""PPO on SmolLM2-135M: fetches the assets, then runs the demo recipe through `deepspeed`.

Further arguments go to the job, as --run.steps 20 --run.seed 1.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from gearshift.engine.config import assets
from gearshift.engine.config import load as config_load
from gearshift.launch.commands import fetch

ASSETS = ("smollm2", "movie-prompts")
LAUNCH = Path(__file__).resolve().parents[1]
RECIPE = LAUNCH / "recipes" / "demo.yaml"
POLL_S = 0.5
_MOST_RANKS = 2  # what the recipe's batch is made for
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: 2, or one per GPU")
    parser.epilog = "Any --section.key VALUE goes to the job."
    parser.set_defaults(overrides=[])


def main(args: argparse.Namespace) -> int:
    """Returns the exit status of the job."""
    for name in ASSETS:
        if fetch.fetch(name, assets.cache_dir()):
            print(f"fetched {name}", flush=True)
    folder = Path(config_load.load(RECIPE, args.overrides).config.run.dir)
    return see_through(command(args.ranks, args.overrides), folder)


def see_through(command: list[str], folder: Path) -> int:
    """Runs a job on this machine; returns its exit status. A signal lets it save and end.

    For that it finds the file `stop` in its folder: the launcher of DeepSpeed, given the signal,
    would kill ranks whose step takes half a minute more.
    """
    request, stop = Request(), folder / "stop"
    # A session of its own: a terminal sends Ctrl-C to the launcher and to every rank, too.
    job = subprocess.Popen(command, env=environment(), start_new_session=True)
    while job.poll() is None and request.asked < 2:
        if request.asked:
            folder.mkdir(parents=True, exist_ok=True)
            stop.touch()
        time.sleep(POLL_S)
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
    stop.unlink(missing_ok=True)
    return job.wait()


class Request:
    """The signals of this process: the first asks the run to save and end, the second ends it.

    name: who says so.
    """

    def __init__(self, name: str = "gearshift") -> None:
        self.asked, self.name = 0, name
        for number in _SIGNALS:
            signal.signal(number, self._hear)

    def sleep(self, seconds: float) -> None:
        """Until then, or until a signal comes."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(POLL_S)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        told = "ending now" if self.asked > 1 else "ending after this step, with a checkpoint"
        os.write(2, f"{self.name}: {signal.Signals(number).name}: {told}\n".encode())


def command(ranks: int, overrides: list[str]) -> list[str]:
    """The launch line of the demo."""
    gpus = gpu_count()
    ranks = ranks or min(_MOST_RANKS, gpus or _MOST_RANKS)
    recipe = ["--config", str(RECIPE), "--rollout.tp", str(ranks)]
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
