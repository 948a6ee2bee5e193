"""`gearshift bench checkpoint`: its figures, and what it leaves behind."""

import json
import subprocess
import sys

import pytest

from gearshift.launch.bench import checkpoint as bench_checkpoint
from tests.tiny import job as tiny_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    return tiny_job.write(folder)


def bench(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gearshift.launch.cli", "bench", "checkpoint", *map(str, arguments)],
        env=tiny_job.environment(COLUMNS="120"),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_bytes_and_seconds(job, tmp_path):
    done = bench(
        "--config", job, "--saves", 2, "--json", tmp_path / "x", "--run.dir", tmp_path / "r"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "x").read_text())
    per_parameter, count = found["bytes_per_parameter"], found["parameters"]
    assert found["bytes"] == pytest.approx(per_parameter * count)
    states = 12 * count  # fp32 master and two moments; the rest are headers, JSON, generators
    assert states < found["bytes"] < states + 60_000
    for name in ("step_s", "write_s", "copy_s", "step_beside_s"):
        assert found[name] > 0
    assert "bytes per trained parameter" in done.stdout
    assert not (tmp_path / "r").exists()


def test_a_folder_that_exists_is_left_alone(job, tmp_path):
    with pytest.raises(ValueError, match="exists; name a new folder on the disk to measure"):
        bench_checkpoint.measure(str(job), ["--run.dir", str(tmp_path)], 1)
    assert tmp_path.exists()
