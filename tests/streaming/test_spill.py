"""Frozen models on a disk, through the main job: counted, bounded, and disks that fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from gearshift.engine.config import deepspeed as ds_config
from gearshift.launch import train
from tests.tiny import job as tiny_job
from tests.tiny import models as tiny

# As of the second step, the file has lost its content.
BROKEN_DISK = """
import os

calls = 0


def score(prompts, completions, **columns):
    global calls
    calls += 1
    links = [(int(fd), os.readlink(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{fd}")]
    if calls == 2:
        for fd, path in links:
            if "/disk/" in path:
                os.truncate(fd, 0)
    return [float(len(text.split())) for text in completions]
"""


def settings(folder: Path, disk: Path) -> str:
    """A DeepSpeed JSON of a frozen model on `disk`."""
    found = ds_config.load("frozen_zero3_nvme")
    found["zero_optimization"]["offload_param"]["nvme_path"] = str(disk)
    (folder / "disk.json").write_text(json.dumps(found))
    return str(folder / "disk.json")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(**changes): the YAML of a run whose reference is on tmp_path/disk."""
    tiny_job.alone(monkeypatch)
    (tmp_path / "disk").mkdir()

    def write(disk: Path = tmp_path / "disk", **changes: dict) -> Path:
        reference = {"deepspeed": settings(tmp_path, disk)} | changes.pop("reference", {})
        return tiny_job.write(tmp_path, reference=reference, **changes)

    return write


def test_a_step_says_what_streaming_moved(job, tmp_path):
    """Of the reference on disk and a reward model on the host: each weight once."""
    tiny.save_reward(tmp_path / "judge", tiny_job.VOCABULARY)
    judge = {"name": "judge", "kind": "model", "path": str(tmp_path / "judge"), "batch_size": 1}
    path = job()
    overrides = ["--rewards", json.dumps([judge | {"deepspeed": "frozen_zero3_cpu.json"}])]
    overrides += ["--ppo.score_batch_size", "1", "--run.export", "false"]
    assert train.main(["--config", str(path), *overrides]) == 0
    parameters = {
        "reference": 4 * sum(p.numel() for p in _module(tmp_path / "policy")),
        "judge": 4 * sum(p.numel() for p in _module(tmp_path / "judge", reward=True)),
    }
    for step in tiny_job.learned(tmp_path / "run"):
        for role, size in parameters.items():
            assert step[f"stream/{role}_ratio"] == 1.0
            assert step[f"stream/{role}_gb"] == pytest.approx(size / 1e9)


def _module(path: Path, *, reward: bool = False):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    return kind.from_pretrained(path).parameters()


@pytest.mark.parametrize(
    ("disk", "told"),
    [("nowhere", "nowhere: no such folder"), ("/proc/self", "/proc/self: no room for 0.0 GB: ")],
)
def test_a_disk_that_takes_nothing(job, tmp_path, capsys, disk, told):
    path = job(tmp_path / disk)
    capsys.readouterr()
    assert train.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "offload_param.nvme_path=" in error and told in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_disk_without_room_is_told_before_anything_loads(job, tmp_path, capsys, monkeypatch):
    """A reference of more bytes than the disk has; the actor would fit."""
    path = job(reference={"path": str(tmp_path / "large")})
    shutil.copytree(tmp_path / "policy", tmp_path / "large")
    config = AutoConfig.from_pretrained(tmp_path / "large")
    wide = 2**24  # a matrix has 1 GiB in fp32
    layers = shutil.disk_usage(tmp_path).free // (3 * 2**30) + 1
    config.update({"intermediate_size": wide, "num_hidden_layers": layers})
    config.save_pretrained(tmp_path / "large")
    loaded = []
    monkeypatch.setattr("gearshift.engine.assemble.load_model", lambda *a, **k: loaded.append(a))
    capsys.readouterr()
    assert train.main(["--config", str(path), "--run.ignore_plan", "true"]) == 2
    error = capsys.readouterr().err
    assert "GB are free, this rank's part of the model needs" in error
    assert error.count("\n") == 1 and not loaded and not (tmp_path / "run").exists()


def test_a_disk_that_fails_in_a_run_ends_it_with_nothing_lost(job, tmp_path, capsys):
    path = job(run={"save_every": 1})
    (tmp_path / "reward.py").write_text(BROKEN_DISK)
    assert train.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"nvme_path={tmp_path / 'disk'}: reading a frozen model's weights failed" in error
    assert "check the disk" in error
    assert [step["step"] for step in tiny_job.learned(tmp_path / "run")] == [1]
    (tmp_path / "reward.py").write_text(tiny_job.REWARD)
    assert train.main(["--config", str(path)]) == 0  # from the checkpoint of step 1
    assert [step["step"] for step in tiny_job.learned(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_a_reference_larger_than_the_memory_allowed(tmp_path, monkeypatch):
    """Its anonymous memory peaks far below its size, within a limit that memory would break."""
    # glibc moves its own threshold as tensors are freed; heaps then keep holes, in some runs 40 MB.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))
    (tmp_path / "disk").mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    tiny.save_policy(tmp_path / "model", num_hidden_layers=16, **sizes)
    # A process of its own: a forked one would count what its parent imported.
    script = Path(__file__).with_name("spill_on_ranks.py")
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "model")]
    environment = tiny_job.environment(PYTHONPATH=str(script.parents[2]))
    subprocess.run(command, check=True, timeout=300, env=environment)
    found = json.loads((tmp_path / "rank0.jsonl").read_text())
    assert found["whole"] > 150e6
    assert found["limit"] < 0.7 * found["whole"] and found["peak"] < 0.6 * found["whole"], found
    assert found["passes"] == 3 and found["read"] == 3 * found["whole"], found
    assert found["error"] == 0.0
    assert "can't allocate memory" in found["in memory"]
