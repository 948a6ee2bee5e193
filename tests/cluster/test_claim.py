"""One run at a time in a folder, which every rank must see."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from gearshift.engine.cluster import claim, distributed

HOLD = """
import sys, time
from pathlib import Path
from gearshift.engine.cluster import claim
claim._LEASE_S = float(sys.argv[2])
claim.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """holder(lease): another process that holds tmp_path / "run"."""
    started = []

    def hold(lease: float = 30.0) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(lease)]
        started.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True))
        assert started[0].stdout.readline() == "held\n"
        return started[0]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def released():
    yield
    claim.release()


def test_a_second_start_says_who_holds_the_folder(tmp_path, holder):
    other = holder()
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"run.dir='.*run': is in use by pid") as refused:
        claim.take(tmp_path / "run")
    assert time.monotonic() - begun < 15
    who = rf"pid {other.pid} on {distributed.host()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d; end"
    assert re.search(who, str(refused.value))


def test_a_run_that_was_killed_holds_nothing(tmp_path, holder):
    other = holder()
    other.kill()
    other.wait()
    begun = time.monotonic()
    assert claim.take(tmp_path / "run") is False
    assert time.monotonic() - begun < 5


def test_a_run_that_stood_still_and_was_replaced_ends_when_it_goes_on(
    tmp_path, holder, monkeypatch
):
    other = holder(lease=6.0)
    other.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(claim, "_LEASE_S", 6.0)
    assert claim.take(tmp_path / "run") is False
    other.send_signal(signal.SIGCONT)
    assert other.wait(30) == 1
    assert "another run took the run folder over" in other.stderr.read()


def test_what_was_made_for_nothing_is_gone(tmp_path):
    assert claim.take(tmp_path / "a" / "run") is True
    claim.release()
    assert os.listdir(tmp_path) == []
    claim.take(tmp_path / "a" / "run")
    (tmp_path / "a" / "run" / "metrics.jsonl").touch()
    claim.release()
    assert os.listdir(tmp_path / "a" / "run") == ["metrics.jsonl"]


def test_a_folder_that_a_host_does_not_see_is_refused(tmp_path, monkeypatch):
    answers = [lambda mine: [mine, None], lambda mine: [("n0", True), ("n1", False)]]
    monkeypatch.setattr(distributed, "all_gather_objects", lambda mine: answers.pop(0)(mine))
    told = "n1 does not see what n0 writes there; use a folder of a file system that all hosts"
    with pytest.raises(ValueError, match=told):
        claim.take(tmp_path / "run")
