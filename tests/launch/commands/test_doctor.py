"""`gearshift doctor`: green on a machine that works, and each planted fault is red with its fix."""

import importlib
import json
import re
import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from gearshift.engine.config import deepspeed as ds_config
from gearshift.launch import cli
from gearshift.launch.examine import hosts as doctor_hosts
from gearshift.launch.examine import machine as doctor_checks
from gearshift.launch.examine import network
from tests.tiny import job as tiny_job

Usage = namedtuple("Usage", "total used free")


def found(check, name: str) -> doctor_checks.Finding:
    return next(finding for finding in check() if finding.name == name)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_job.write(tmp_path / "job")


def findings(capsys, *arguments: object) -> tuple[int, dict[str, dict]]:
    status = cli.main(["doctor", "--json", *map(str, arguments)])
    return status, {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_a_working_machine_and_job_are_green(job, capsys):
    status, seen = findings(capsys, "--config", job)
    assert status == 0
    assert {"python", "torch", "deepspeed", "port", "run folder"} <= set(seen)
    assert not [entry for entry in seen.values() if entry["level"] == "bad"]
    built = torch.__version__.partition("+")[0]  # some builds name their CUDA here alone
    assert seen["torch"]["text"].partition("+")[0] == built
    assert "checkpoints of 0.0 GB" in seen["run folder"]["text"]
    assert seen["attention of actor"]["text"] in ("sdpa", "flash_attention_2")


def test_lines_for_people_have_the_fix_below(capsys, monkeypatch):
    sizes = {Path("/dev/shm"): Usage(64 << 20, 0, 64 << 20)}
    ample = Usage(1 << 40, 0, 1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: sizes.get(path, ample))
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("BAD  /dev/shm: 0.07 GB"))
    assert lines[at + 1] == "     -> docker run --shm-size=16g, or --ipc=host"
    assert lines[-1].endswith("1 to fix")


@pytest.mark.parametrize(
    "version, fix", (("4.40.0", "pip install 'transformers"), (None, "pip install 'transformers"))
)
def test_an_old_or_missing_library(monkeypatch, version, fix):
    real = doctor_checks.metadata.version

    def planted(name):
        if name != "transformers":
            return real(name)
        if version is None:
            raise doctor_checks.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor_checks.metadata, "version", planted)
    finding = found(doctor_checks.versions, "transformers")
    assert finding.level == "bad" and finding.fix.startswith(fix)


def test_a_port_in_use(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(doctor_checks, "DEFAULT_PORT", other.getsockname()[1])
        finding = found(doctor_checks.launcher, "port")
    assert finding.level == "warn" and "deepspeed --master_port" in finding.fix


@pytest.mark.parametrize("line", ("", "# a comment", "export NCCL_DEBUG=WARN", "NCCL_DEBUG"))
def test_variables_that_stop_the_launcher(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text(f"NCCL_DEBUG=WARN\n{line}\nA=1\n")
    finding = found(doctor_checks.launcher, "launcher's variables")
    assert finding.level == "bad" and f"line 2 {line!r}" in finding.fix


def test_variables_that_the_launcher_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nA=b=c\nEMPTY=\n")
    assert found(doctor_checks.launcher, "launcher's variables").level == "ok"


def test_a_package_kernels_that_hides_hugging_faces(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor_checks, "ROOT", tmp_path)
    assert found(doctor_checks.shadows, "name kernels").level == "ok"
    (tmp_path / "kernels" / "__init__.py").touch()
    importlib.invalidate_caches()
    finding = found(doctor_checks.shadows, "name kernels")
    assert finding.level == "bad" and "no __init__.py" in finding.fix


@pytest.mark.parametrize(
    "said, level", (("release 13.0", "ok"), ("release 13.1", "warn"), ("release 12.8", "bad"))
)
def test_nvcc_of_another_version_than_torch(tmp_path, monkeypatch, said, level):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {said}, V1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert found(doctor_checks.compilers, "nvcc").level == level


def test_compiled_kernels_on_a_network_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "yet"))
    mount = namedtuple("mount", "mountpoint fstype")
    disks = [mount("/", "ext4"), mount(str(tmp_path), "nfs4")]
    monkeypatch.setattr(doctor_checks.psutil, "disk_partitions", lambda all: disks)
    first = next(iter(doctor_checks.caches()))
    assert first.level == "warn" and "nfs4" in first.text and "TRITON_CACHE_DIR" in first.fix


def test_a_disk_too_small_for_the_checkpoints(job, capsys, monkeypatch):
    free = Usage(2 << 30, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    status, seen = findings(capsys, "--config", job)
    assert status == 1 and seen["run folder"]["level"] == "bad"
    assert "lower run.keep_checkpoints" in seen["run folder"]["fix"]


def test_checkpoints_of_adapters_are_small(job, capsys, monkeypatch):
    """12 bytes of what trains, four times."""
    free = Usage(2 << 30, 0, 4 * 12 * 9_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    adapters = ("--actor.lora.r", "2", "--critic.lora.r", "2")
    for more, level in (((), "bad"), (adapters, "ok")):
        _, seen = findings(capsys, "--config", job, *more)
        assert seen["run folder"]["level"] == level


def test_a_run_folder_below_a_file(job, capsys):
    place = job.parent / "prompts.jsonl" / "run"
    status, seen = findings(capsys, "--config", job, "--run.dir", place)
    assert status == 1 and "not writable" in seen["run folder"]["text"]


def test_a_model_that_is_not_there(job, capsys):
    status, seen = findings(capsys, "--config", job, "--actor.path", job.parent / "nowhere")
    assert status == 1 and "actor.path" in seen["models"]["text"]


def test_an_nvme_folder_that_is_missing(job, capsys):
    settings = ds_config.load("frozen_zero3.json", frozen=True)
    offload = {"device": "nvme", "nvme_path": str(job.parent / "none")}
    settings["zero_optimization"]["offload_param"] = offload
    (job.parent / "nvme.json").write_text(json.dumps(settings))
    path = job.parent / "nvme.json"
    status, seen = findings(capsys, "--config", job, "--reference.deepspeed", path)
    assert status == 1 and "no such folder" in seen["nvme of reference"]["text"]


def test_a_wrong_key_is_a_mistake(job, capsys):
    assert cli.main(["doctor", "--config", str(job), "--run.dri", "x"]) == 2
    assert "run.dri" in capsys.readouterr().err


def test_hosts_are_examined_and_compared(job, tmp_path, monkeypatch, capsys):
    """n0 is this machine; n1 differs in all that is compared."""
    own = {"same": {"torch": "2.13"}, "gpus": 2, "time": time.time(), "findings": []}
    own["free"] = "3.0 GB of memory"
    red = {"name": "nvcc", "level": "bad", "text": "missing", "fix": "install it"}
    other = own | {"same": {"torch": "2.10"}, "gpus": 1, "time": time.time() - 60}
    told = {"n0": own, "n1": other | {"findings": [red]}, "n2": None}

    def on_all(hosts, command, timeout=0):
        if command.startswith("ls "):
            assert Path(command.split()[1]).exists()
            return {host: CompletedProcess([], 2 * (host == "n1")) for host in hosts}
        assert f"doctor --facts --config {job}" in command
        return {
            host: CompletedProcess([], 0, json.dumps(told[host]) if told[host] else "", "no torch")
            for host in hosts
        }

    monkeypatch.setattr(doctor_hosts.machines, "look", lambda hosts, folder: None)
    monkeypatch.setattr(doctor_hosts.machines, "on_all", on_all)
    (tmp_path / "hosts").write_text("n0 slots=2\nn1 slots=2\nn2 slots=2\n")
    status, seen = findings(capsys, "--config", job, "--hostfile", tmp_path / "hosts")
    assert status == 1
    assert seen["run folder"]["text"].startswith("n1 do not see")
    assert seen["n0"]["level"] == "ok" and seen["n1: nvcc"]["fix"] == "install it"
    assert seen["n1: slots"]["fix"] == "write n1 slots=1"
    assert seen["n1: clock"]["text"] == "60 s from ours"
    assert seen["n1: torch"]["text"] == "n0 has 2.13, n1 has 2.10"
    assert seen["n1: free"]["text"] == "3.0 GB of memory"
    assert seen["n2"]["text"] == "said no torch"  # and no ranks are started
    assert list(tmp_path.rglob(".gearshift-*")) == []


def test_what_a_host_says_of_itself(job, capsys):
    assert cli.main(["doctor", "--facts", "--config", str(job)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"sampling.max_new_tokens", "torch", "gearshift/engine/ppo.py"} <= set(told["same"])
    assert {entry["name"] for entry in told["findings"]} >= {"port", "run folder"}
    assert re.fullmatch(r"[\d.]+ GB of memory, [\d.]+ GB at \S+", told["free"])


def test_memory_that_others_have(monkeypatch):
    memory = namedtuple("memory", "total available")(100 * 10**9, 60 * 10**9)
    monkeypatch.setattr(doctor_checks.psutil, "virtual_memory", lambda: memory)
    finding = found(doctor_checks.devices, "memory")
    assert finding.level == "warn" and "100 GB of memory, 60 free" in finding.text and finding.fix


def test_a_full_disk_of_a_cache(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 << 30, 0, 1000))
    finding = found(doctor_checks.caches, "cache")
    assert finding.level == "bad" and "export TRITON_CACHE_DIR" in finding.fix


@pytest.mark.parametrize("hosts", range(2, 8))
def test_each_pair_of_hosts_is_measured_once_and_none_is_in_two_at_a_time(hosts):
    rounds = list(network.rounds(hosts))
    pairs = [pair for pairs in rounds for pair in pairs]
    assert sorted(pairs) == [(a, b) for a in range(hosts) for b in range(a + 1, hosts)]
    for pairs in rounds:
        places = [place for pair in pairs for place in pair]
        assert len(set(places)) == len(places)


def test_a_link_far_below_the_others_is_yellow():
    rates = [(f"n{a} - n{b}", "nccl", "all-reduce", 40.0) for a, b in ((0, 1), (1, 2), (0, 3))]
    rates += [("n0 - n2", "nccl", "all-reduce", 9.0), ("n0", "nccl", "all-reduce", 300.0)]
    rates += [("n0 - n1", "gloo", "all-reduce", 1.0), ("n0 - n1", "nccl", "all-gather", 38.0)]
    seen = {finding.name: finding for finding in network.judged(rates)}
    slow = seen.pop("n0 - n2: nccl")
    assert slow.level == "warn" and slow.fix
    assert slow.text == "all-reduce 9 GB/s; elsewhere all-reduce 40"
    assert {finding.level for finding in seen.values()} == {"ok"}
    assert seen["n0 - n1: nccl"].text == "all-reduce 40 GB/s, all-gather 38 GB/s"


def test_ranks_that_do_not_meet_are_red_with_what_they_said():
    told = "gearshift: error: MASTER_ADDR=n0: no answer to n1 on port 1; see what rank 0 printed\n"
    finding = network._failed(["Traceback\nOSError: broken\n", f"warning\n{told}"])
    assert finding.text == "MASTER_ADDR=n0: no answer to n1 on port 1"
    assert finding.fix == "see what rank 0 printed"
    finding = network._failed(["Traceback\nRuntimeError: no interface\n", ""])
    assert finding.level == "bad" and finding.text == "RuntimeError: no interface"
    assert "open all ports" in finding.fix
