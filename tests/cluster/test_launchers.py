"""srun, mpirun and launch/slurm.sbatch on two ranks, with stubs of the commands."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.test_hang import await_steps
from tests.tiny import job as tiny_job
from tests.tiny.on_ranks import free_port

PATIENCE_S = 600  # two ranks on a machine that has other work
ROOT = tiny_job.TRAIN.parents[1]
SLURM = {"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NTASKS": "{tasks}"}
SLURM |= {"SLURM_STEP_TASKS_PER_NODE": "{tasks}"}
MPI = ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")
OMPI = {f"OMPI_COMM_WORLD_{n}": "{tasks}" if "SIZE" in n else "{rank}" for n in MPI}
# Starts what follows its options STUB_TASKS times, passes signals to each, and ends with the worst
# of their statuses; one that fails ends the others: mpirun always, srun where it is told.
STUB = """#!{python}
import os, signal, subprocess, sys, time
words, ends = sys.argv[1:], {always}
while words[0].startswith("-"):
    ends |= words.pop(0) == "--kill-on-bad-exit=1"
tasks = int(os.environ["STUB_TASKS"])
ranks = [
    subprocess.Popen(
        words,
        env=os.environ | {{k: v.format(rank=r, tasks=tasks) for k, v in {variables}.items()}},
    )
    for r in range(tasks)
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [rank.send_signal(number) for rank in ranks])
while any([rank.poll() is None for rank in ranks]):
    if ends and any(rank.returncode for rank in ranks):
        for rank in ranks:
            rank.kill()
    time.sleep(0.1)
sys.exit(max(abs(rank.returncode) for rank in ranks))
"""


@pytest.fixture
def start(tmp_path):
    """start(tasks, words, variables): a job under the stubs; all of it ends with the test."""
    stubs = {
        "srun": STUB.format(python=sys.executable, always=False, variables=SLURM),
        "mpirun": STUB.format(python=sys.executable, always=True, variables=OMPI),
        "scontrol": "#!/bin/sh\necho localhost\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    started: list[psutil.Process] = []

    def run(tasks: int, words: list[str], **variables: str) -> psutil.Popen:
        here = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = tiny_job.environment(PATH=here, STUB_TASKS=str(tasks), **variables)
        environment |= {"MASTER_PORT": free_port()}
        with (tmp_path / "log").open("w") as log:
            started.append(psutil.Popen(words, env=environment, stdout=log, stderr=log, cwd=ROOT))
        return started[-1]

    yield run
    for process in started:
        if process.is_running():
            for each in [*process.children(recursive=True), process]:
                each.kill()


def job(folder: Path) -> Path:
    return tiny_job.write(folder, run={"steps": 5000, "export": False})


def saved_on_two_ranks(folder: Path) -> None:
    done = len((folder / "run" / "metrics.jsonl").read_text().splitlines())
    assert (folder / "run" / "checkpoints" / f"step_{done:06d}").is_dir() and done < 5000
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert len(environment["hosts"]) == 2


@pytest.mark.parametrize("launcher", ("srun", pytest.param("mpirun", marks=pytest.mark.slow)))
def test_a_signal_reaches_the_ranks_and_saves(start, tmp_path, launcher):
    """As `#SBATCH --signal=USR1@300` sends it to the tasks of srun."""
    words = [launcher, sys.executable, str(tiny_job.TRAIN), "--config", str(job(tmp_path))]
    running = start(2, words, MASTER_ADDR="127.0.0.1")
    await_steps(tmp_path / "run", 2, PATIENCE_S)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()[-3000:]
    saved_on_two_ranks(tmp_path)


def test_srun_ends_all_ranks_where_one_dies(start, tmp_path):
    """The rank that is killed is named only where the others outlive it: here all end."""
    words = ["srun", "--kill-on-bad-exit=1", sys.executable, str(tiny_job.TRAIN)]
    running = start(2, [*words, "--config", str(job(tmp_path))], MASTER_ADDR="127.0.0.1")
    await_steps(tmp_path / "run", 1, PATIENCE_S)
    ranks = running.children()
    ranks[1].kill()
    assert running.wait(PATIENCE_S) == signal.SIGKILL
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks)


def test_the_batch_script_passes_the_signal_before_the_limit(start, tmp_path):
    """Slurm sends it to the script alone (B:USR1); another job's ranks on the node get nothing."""
    pretend = "import time; time.sleep(600)"
    path = tmp_path / "launch" / "train.py"
    path.parent.mkdir()
    path.write_text(pretend)
    other = start(1, [sys.executable, "-u", str(path)], SLURM_JOB_ID="76")
    variables = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    variables |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_END_TIME": str(int(time.time()) + 86400)}
    words = ["bash", "launch/slurm.sbatch", str(job(tmp_path))]
    running = start(1, words, **variables)
    await_steps(tmp_path / "run", 2, PATIENCE_S)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()[-3000:]
    saved_on_two_ranks(tmp_path)
    assert other.is_running() and other.status() != psutil.STATUS_ZOMBIE
