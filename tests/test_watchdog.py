"""A rank that freezes, hangs or dies: the run ends in time, and the message names it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gearshift.engine import progress
from tests.launch_ranks import free_port

SCRIPT = Path(__file__).with_name("ranks_watchdog.py")
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
    assert "for 3 s; it was in rewards, at ranks_watchdog.py:" in output
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


def test_progress_tells_the_phase_and_the_innermost_call_first():
    progress.enter("values")
    phase, phases, _ = progress.current()
    progress.beat()
    assert phase == "values" and progress.current() == ("values", phases, 1)
    progress.enter("rewards")
    assert progress.current() == ("rewards", phases + 1, 0)
    assert re.search(r"^progress.py:\d+ main_thread_at < test_watchdog", progress.main_thread_at())
