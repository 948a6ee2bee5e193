"""Runs an *_on_ranks.py script on real gloo ranks and reads what each rank wrote."""

import atexit
import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from gearshift.engine.cluster import rendezvous
from tests.tiny import job as tiny_job
from tests.tiny import run as tiny_run

TESTS = Path(__file__).resolve().parents[1]


def free_port() -> str:
    return str(rendezvous.free_port())


@cache
def _nursery() -> subprocess.Popen:
    """The process of this test process that forks ranks; see nursery.py."""
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "tiny" / "nursery.py")],
        env=tiny_job.environment(PYTHONPATH=str(TESTS.parent)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.stdin.close)
    return process


def launch(script: str, *arguments: object, ranks: int = 2, timeout: float = 600) -> None:
    """Runs tests/<script> ARGUMENTS on `ranks` ranks; fails with the end of what they printed."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        request = {
            "script": str(TESTS / script),
            "arguments": list(map(str, arguments)),
            "ranks": ranks,
            "environment": tiny_job.environment(PYTHONPATH=str(TESTS.parent)),
            "log": log.name,
            "timeout": timeout,
        }
        nursery = _nursery()
        print(json.dumps(request), file=nursery.stdin, flush=True)
        statuses = json.loads(nursery.stdout.readline())
        assert not any(statuses), f"statuses {statuses}\n{log.read()[-6000:]}"


def lines(script: str, ranks: int, out: Path, *arguments: object) -> list[list[dict]]:
    """Runs tests/<script> OUT ARGUMENTS; returns each rank's JSON lines, OUT/rank<r>.jsonl."""
    launch(script, out, *arguments, ranks=ranks)
    files = [out / f"rank{rank}.jsonl" for rank in range(ranks)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@cache
def outcome(script: str) -> Path:
    """The folder that tests/`script` wrote on two ranks, from the models of `write_models`.

    Made once for all tests of this process.
    """
    folder = Path(tempfile.mkdtemp(prefix="gearshift-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "out").mkdir()
    launch(script, tiny_run.write_models(folder / "models"), folder / "out")
    return folder / "out"
