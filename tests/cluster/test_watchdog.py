"""A rank that freezes, hangs or dies: the run ends in time, and the message names it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from gearshift.engine.cluster import distributed, progress, watchdog
from tests.tiny.on_ranks import free_port

SCRIPT = Path(__file__).with_name("watchdog_on_ranks.py")
PATIENCE_S = 90  # two Python processes on a busy machine; the timeout under test is 3 s


def run(folder: Path, culprit: int, fault: str) -> list[tuple[int, str]]:
    """(exit status, output) of two ranks started without a launcher: nobody else ends them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(culprit), fault],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    finally:
        left = [rank.pid for rank in ranks if psutil.pid_exists(rank.pid)]
        for rank in ranks:
            rank.kill()
    assert not left, "orphans"
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.mark.parametrize("culprit", (0, 1))
def test_a_frozen_rank_is_named_and_killed(tmp_path, culprit):
    ranks = run(tmp_path, culprit, "freeze")
    status, output = ranks[1 - culprit]
    assert status == 1
    found = re.search(r"fault \(rank (\d)\): rank (\d) \(pid \d+ on \S+\) did not answer", output)
    assert found.groups() == (str(1 - culprit), str(culprit))
    assert "for 3 s; it was in rewards, at watchdog_on_ranks.py:" in output
    assert "raise run.hang_timeout_s" in output
    assert ranks[culprit][0] == -9  # SIGSTOP makes it deaf to anything else
    stacks = (tmp_path / "logs" / f"rank_{1 - culprit:05d}.txt").read_text()
    assert "global_sum" in stacks


def test_a_rank_that_hangs_in_python_is_named_with_its_stack(tmp_path):
    ranks = run(tmp_path, 1, "hang")
    assert [status for status, _ in ranks] == [1, 1]
    line = r"rank 1 \(.*\) made no progress for 3 s; it was in rewards, at .* reward_that_never"
    assert all(re.search(line, output) for _, output in ranks)
    assert "slow\n" in ranks[1][1]  # slow work before it did not count
    assert "reward_that_never_answers" in (tmp_path / "logs" / "rank_00001.txt").read_text()


@pytest.mark.parametrize("culprit", (0, 1))
def test_a_rank_that_is_killed_is_named_by_the_others(tmp_path, culprit):
    ranks = run(tmp_path, culprit, "die")
    assert [ranks[culprit][0], ranks[1 - culprit][0]] == [-9, 1]
    assert re.search(rf"rank {culprit} \(.*\) died; it was in \w+", ranks[1 - culprit][1])


def test_a_rank_that_told_its_own_error_is_not_blamed(tmp_path):
    ranks = run(tmp_path, 1, "own error")
    assert [status for status, _ in ranks] == [1, 2]
    assert "fault (rank 0): nobody" in ranks[0][1]


def test_a_healthy_run_ends_in_silence(tmp_path):
    assert run(tmp_path, 1, "nothing") == [(0, ""), (0, "")]
    assert not (tmp_path / "logs").exists()


def alone(**more: str) -> dict[str, str]:
    """The environment of a run of one rank."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "1"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")}
    return inherited | place | {"RANK": "0", "LOCAL_RANK": "0"} | more


def await_file(path: Path, patience_s: float = PATIENCE_S) -> bool:
    end = time.monotonic() + patience_s
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path.exists()


def test_a_job_that_was_suspended_goes_on(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "0", "work"]
    rank = subprocess.Popen(command, env=alone())
    try:
        assert await_file(tmp_path / "started")
        rank.send_signal(signal.SIGSTOP)
        time.sleep(5)  # the timeout is 3 s
        rank.send_signal(signal.SIGCONT)
        assert rank.wait(PATIENCE_S) == 0
    finally:
        rank.kill()


@pytest.mark.parametrize("launched", (False, True))
def test_a_shell_may_end_before_its_run_and_a_launcher_may_not(tmp_path, launched):
    shell = '"$@" & while [ ! -e "$3/started" ]; do sleep 0.1; done'
    command = [sys.executable, str(SCRIPT), str(tmp_path), "0", "work"]
    environment = alone(LOCAL_WORLD_SIZE="1") if launched else alone()
    subprocess.run(["sh", "-c", shell, "sh", *command], env=environment, timeout=PATIENCE_S)
    assert (tmp_path / "started").exists()
    assert await_file(tmp_path / "done", 8) is not launched


@pytest.mark.parametrize("elsewhere", (False, True))
def test_a_process_number_means_nothing_in_another_container(elsewhere):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, space = watchdog.machine()
    space = "pid:[1]" if elsewhere else space
    beat = watchdog.Beat(1, host, space, ended.pid, "rewards", 1, 0, 1, "")
    assert beat.dead() is not elsewhere


def test_progress_tells_the_phase_and_the_innermost_call_first():
    progress.enter("values")
    phase, phases, _ = progress.current()
    progress.beat()
    assert phase == "values" and progress.current() == ("values", phases, 1)
    progress.enter("rewards")
    assert progress.current() == ("rewards", phases + 1, 0)
    assert re.search(r"^progress.py:\d+ main_thread_at < test_watchdog", progress.main_thread_at())


@pytest.mark.parametrize("lag", (0.0, 0.9))
def test_a_rank_of_another_machine_is_named_whenever_it_died(monkeypatch, lag):
    """Its last word may have come after the others' last reading."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(watchdog.signal, "signal", lambda *_: None)
    monkeypatch.setattr(watchdog.Watchdog, "__init__", lambda self: None)
    dog = watchdog.Watchdog()
    dog.interval, dog._blaming, dog._read_at = 0.2, threading.Event(), 0.0
    dog._seen = {1: watchdog._Seen(far_beat(announced=7), 0.0, 0.0)}
    later = watchdog._Seen(far_beat(announced=8), 0.0, 0.0)
    reading = threading.Timer(lag * dog.interval, dog._seen.update, [{1: later}])
    reading.start()
    found = dog.blame()
    reading.join()
    assert found.startswith("rank 1 (pid 77 on elsewhere) is gone; it was in rewards")


def far_beat(announced: int) -> watchdog.Beat:
    return watchdog.Beat(1, "elsewhere", "", 77, "rewards", 1, 0, announced, "")
