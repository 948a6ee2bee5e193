"""A rank of a real job is stopped or killed: the job ends, names it, and the next start resumes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import job as tiny_job
from tests.tiny.on_ranks import free_port

PATIENCE_S = 240  # two ranks on a busy machine
LAUNCHER = Path(sys.executable).with_name("deepspeed")


def start(job: Path, log: Path, *overrides: object) -> subprocess.Popen:
    command = [str(LAUNCHER), "--num_accelerators", "2", "--master_port", free_port()]
    command += [str(tiny_job.TRAIN), "--config", str(job), *map(str, overrides)]
    return subprocess.Popen(
        command,
        env=tiny_job.environment(),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def await_steps(run: Path, count: int, patience_s: float = PATIENCE_S) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + patience_s
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "the run does not get ahead"
        time.sleep(0.1)


def rank_process(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    named = [child for child in children if "train.py" in " ".join(child.cmdline())]
    return next(child for child in named if child.environ().get("RANK") == str(rank))


@pytest.mark.parametrize(
    "what, how",
    (
        ("did not answer", signal.SIGSTOP),
        pytest.param("died", signal.SIGKILL, marks=pytest.mark.slow),
    ),
)
def test_the_job_ends_names_the_rank_and_resumes(tmp_path, what, how):
    job, log, run = tiny_job.write(tmp_path), tmp_path / "log", tmp_path / "run"
    long = ("--run.steps", 5000, "--run.save_every", 1, "--run.hang_timeout_s", 6)
    launcher = start(job, log, *long, "--run.export", "false")
    ranks = []
    try:
        await_steps(run, 2)
        ranks = [rank_process(launcher, rank) for rank in range(2)]
        ranks[1].send_signal(how)
        status = launcher.wait(PATIENCE_S)
    finally:
        left = [rank for rank in ranks if rank.is_running()]
        for process in (launcher, *left):
            process.kill()
    told = log.read_text()
    assert status != 0 and not left, "orphans"
    named = rf"fault \(rank 0\): rank 1 \(pid {ranks[1].pid} on \S+\) {what}.*it was in \w+, at \w+"
    assert re.search(named, told), told[-3000:]
    steps = len((run / "metrics.jsonl").read_text().splitlines())

    again = start(job, log, "--run.steps", steps + 1, "--run.export", "false")
    assert again.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    assert "resumed from" in log.read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 2))
