"""`gearshift launch` before anything is started: the hostfile, and hosts that cannot take part."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from gearshift.launch import cli
from gearshift.launch.commands import launch
from tests.tiny import job as tiny_job

# Answers as the host that its name says; n3 is n1 under another name.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
case $1 in
  unknown) echo "ssh: Could not resolve hostname unknown" >&2; exit 255 ;;
  refused) echo "warning" >&2; echo "root@refused: Permission denied (publickey)." >&2; exit 255 ;;
  bare) exit 4 ;;
  elsewhere) exit 3 ;;
  n3) echo boot-n1 ;;
  *) echo "boot-$1" ;;
esac
"""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in launch.demo._SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(lines of the hostfile, message)"""
    for name, text in (("ssh", SSH), ("pdsh", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = tiny_job.write(tmp_path)
    capsys.readouterr()

    def run(lines: str | None, message: str, *words: str) -> None:
        if lines is not None:
            (tmp_path / "hosts").write_text(lines)
        words = ("--hostfile", str(tmp_path / "hosts"), "--config", str(job), *words)
        assert cli.main(["launch", *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith("gearshift: error: ") and told.count("\n") == 1, told
        assert message in told
        assert not (tmp_path / "run").exists()

    return run


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "hosts': no such file"),
        ("# nobody\n\n", "hosts: names no host; write one host a line, as: node1 slots=8"),
        ("n1 slots=1\nn2\n", "hosts, line 2='n2': not a host and its slots; write one host a"),
        ("n1 slots=0\n", "line 1='n1 slots=0': not a host and its slots"),
        ("n1 slots=1\n\nn1 slots=2 # again\n", "hosts, line 3: n1 is in line 1 already; drop one"),
        ("n1 slots=1\nunknown slots=1\n", "host unknown: ssh says: ssh: Could not resolve"),
        ("refused slots=1\n", "ssh says: root@refused: Permission denied (publickey).; see `ssh"),
        (
            "n1 slots=1\nbare slots=1\n",
            "is not there; put it on a file system that all hosts share",
        ),
        ("elsewhere slots=1\n", "is not there; put it on a file system that all hosts share"),
        ("n1 slots=1\nn2 slots=1\nn3 slots=1\n", "host n3: is the same machine as n1; name it on"),
    ],
)
def test_hosts(refused, lines, message):
    refused(lines, message)


def test_settings(refused):
    refused("n1 slots=1\n", "ppo.kl_coeff: no such key", "--ppo.kl_coeff", "1")
    refused("n1 slots=1\n", "--min-hosts=2: there are 1", "--min-hosts", "2")


def test_words_for_the_shell_of_another_host():
    """deepspeed quotes those with a space itself."""
    words = ["--run.dir", "runs/a", "--run.trackers", "[wandb]", "--data.system_prompt", "be kind"]
    assert launch.Attempt._quoted(words) == [*words[:3], "'[wandb]'", *words[4:]]


def test_what_ranks_get_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.machines, "meeting_point", lambda host: ("10.0.0.1", 29511))
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    for secret in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(secret, "hidden")
    hosts = {"n1": 2, "n2": 1}
    attempt = launch.Attempt(hosts, 0, ["--config", "a.yaml"], tmp_path, launch.demo.Request())
    lines = (attempt.logs / "environment").read_text().splitlines()
    assert {"NCCL_DEBUG=WARN", "GEARSHIFT_HOSTS=n1:2,n2:1"} <= set(lines)
    assert f"GEARSHIFT_LAUNCH={attempt.name}" in lines and "hidden" not in "".join(lines)
    assert (attempt.logs / "hostfile").read_text() == "n1 slots=2\nn2 slots=1\n"
    assert attempt.job[-3:] == [str(tiny_job.TRAIN), "--config", "a.yaml"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder, text in (("home", "MY_TOKEN=/a\nNCCL_DEBUG=INFO\n"), (".", "MY_TOKEN=/b=$c\n")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".deepspeed_env").write_text(text)
    attempt = launch.Attempt(hosts, 0, [], tmp_path / "three", launch.demo.Request())
    lines = (attempt.logs / "environment").read_text().splitlines()
    assert {"MY_TOKEN=/b=$c", "NCCL_DEBUG=INFO"} <= set(lines)  # DeepSpeed's own files prevail
    assert (attempt.logs / "environment").stat().st_mode & 0o77 == 0
    assert "MY_TOKEN" not in launch.machines.exports()  # nor is it on a command line of ours
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\n")
    with pytest.raises(ValueError, match="line 2 'export B=2': deepspeed cannot read it"):
        launch.Attempt(hosts, 0, [], tmp_path / "four", launch.demo.Request())
    (tmp_path / ".deepspeed_env").unlink()
    (tmp_path / "home/.deepspeed_env").unlink()
    monkeypatch.setenv("NCCL_DEBUG", "$(id)")
    with pytest.raises(ValueError, match="NCCL_DEBUG='.*: ssh cannot pass it"):
        launch.Attempt(hosts, 0, [], tmp_path / "two", launch.demo.Request())


JOB = """
import json, pathlib, sys, time
logs = next(word for word in sys.argv if "each_rank_log" in word).split("=")[1]
run = pathlib.Path(logs).parents[1]
pathlib.Path(logs, "x_rank0.log").write_text("step 1\\n")
pathlib.Path(logs, "x_rank1.log").write_text("noise\\ngearshift: error (rank 1 on n1): mine\\n")
what = (run.parent / "do").read_text().split()
if what[0] == "wait":
    while not (run / "stop").exists():
        time.sleep(0.1)
if what[1] != "nothing":
    (run / "outcome.json").write_text(json.dumps({"outcome": what[1]}))
if what[0] == "remote":
    print(f"pdsh@n0: n1: ssh exited with exit code {what[2]}", flush=True)
    time.sleep(60)
sys.exit(int(what[2]))
"""


@pytest.fixture
def attempt(tmp_path, monkeypatch, capfd):
    """attempt(what, request): (status, what was shown) of a job that does as it is told."""
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.setattr(launch, "_GRACE_S", 0.5)
    monkeypatch.setattr(
        launch.demo, "launcher", lambda ranks: [sys.executable, tmp_path / "job.py"]
    )
    monkeypatch.setattr(launch.demo, "environment", lambda: dict(os.environ))

    def run(what: str, request: launch.demo.Request) -> tuple[int, list[str]]:
        (tmp_path / "do").write_text(what)
        status = launch.Attempt({}, 0, [], tmp_path / "run", request).run()
        return status, capfd.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("go finished 0", 0, "finished"),
        ("go stopped 0", 3, "saved and stopped"),  # run.save_by
        ("go nothing 0", 1, "failed"),  # whatever the launcher says
        ("go nothing 1", 1, "failed"),
        ("go nothing 247", 1, "failed"),
        ("go nothing 2", 2, "not started"),
        ("remote nothing 1", 1, "failed"),
        ("remote nothing 2", 2, "not started"),
    ],
)
def test_the_status_is_what_the_run_says(attempt, what, status, said):
    found, lines = attempt(what, launch.demo.Request())
    assert found == status
    assert lines[:2] == ["step 1", "gearshift: error (rank 1 on n1): mine"] or "remote" in what
    assert lines[-1].startswith(f"launch: {said}; a log of each rank is in ")


def test_a_signal_is_passed_on_and_waited_for(attempt):
    request = launch.demo.Request()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert attempt("wait stopped 1", request)[0] == 3
    assert request.asked == 1


@pytest.mark.slow
def test_one_machine_needs_no_hostfile(tmp_path, monkeypatch, capfd):
    job = tiny_job.write(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["launch", "--ranks", "2", "--config", str(job)]) == 0
    told = capfd.readouterr().out
    assert "step 2/2" in told and "launch: finished; a log of each rank is in" in told
    logs = sorted(path.name[-9:] for path in Path(tmp_path, "run", "logs").rglob("*_rank*"))
    assert logs == ["rank0.log", "rank1.log"]
