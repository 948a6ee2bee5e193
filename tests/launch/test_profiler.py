"""A profiled step: its trace, the table that is read from it, and what it leaves as it was."""

import gzip
import json

import pytest

from gearshift.engine import trace
from gearshift.launch import cli, profiler, train
from gearshift.launch.report.page import write_report
from tests.tiny import job as tiny_job


def run(path, *overrides):
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.alone(patch)
        return train.main(["--config", str(path), *overrides])


def mark(name, start, end):
    return event(f"phase {name}", "user_annotation", start, end)


def event(name, cat, start, end, tid=1):
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": start, "dur": end - start}


GPU = [  # microseconds
    mark("step", 0, 1000),
    mark("generate", 0, 400),
    mark("swap", 400, 450),
    mark("swap", 900, 950),
    mark("update_actor", 500, 900),
    event("micro-batch 0", "user_annotation", 500, 700),
    # On the host: an operator that holds another, and a launch on autograd's thread.
    event("aten::matmul", "cpu_op", 10, 110),
    event("aten::mm", "cpu_op", 20, 100),
    event("cudaLaunchKernel", "cuda_runtime", 510, 530, tid=2),
    # On the device: two streams that overlap, and a copy.
    event("gemm", "kernel", 100, 200, tid=7),
    event("gemm", "kernel", 150, 300, tid=8),
    event("Memcpy HtoD", "gpu_memcpy", 420, 440, tid=8),
    event("x" * 300, "kernel", 600, 800, tid=7),
]


def test_the_table_of_a_gpu_s_trace():
    found = profiler.by_phase(GPU)
    assert set(found) == {"step", "generate", "swap", "update_actor"}
    generate, swap, update = (found[name] for name in ("generate", "swap", "update_actor"))
    assert generate["seconds"] == pytest.approx(400e-6)
    assert generate["busy"] == pytest.approx(200 / 400), "what overlaps counts once"
    assert generate["launches"] == 2
    assert generate["device"] == [{"name": "gemm", "seconds": pytest.approx(250e-6), "calls": 2}]
    host = {cost["name"]: cost["seconds"] for cost in generate["host"]}
    assert host["aten::mm"] == pytest.approx(80e-6)
    assert host["aten::matmul"] == pytest.approx(20e-6), "without the operator inside it"
    assert host[profiler.OUTSIDE] == pytest.approx(300e-6)
    assert swap["seconds"] == pytest.approx(100e-6), "both times"
    assert swap["busy"] == pytest.approx(20 / 100)
    assert len(update["device"][0]["name"]) == 100
    assert found["step"]["busy"] == pytest.approx((200 + 20 + 200) / 1000)


def test_on_a_cpu_pytorch_s_operators_are_the_work():
    events = [
        mark("step", 0, 100),
        mark("values", 0, 100),
        event("MyBackward", "cpu_op", 0, 80),  # of Python, around an operator
        event("aten::mm", "cpu_op", 10, 40),
    ]
    values = profiler.by_phase(events)["values"]
    assert values["busy"] == pytest.approx(0.3)
    assert values["launches"] is None and values["device"] == []


def test_what_is_not_known_is_left_empty():
    phase = {"seconds": 2.0, "busy": 0.5, "launches": 7, "device": [], "host": []}
    known = phase | {"flops": 3e12, "bytes": 5e9, "floor_s": None}
    table = {"gpu": True, "seconds": 4.0, "device_busy": 0.25}
    columns, rows = profiler.rows(table | {"phases": {"a": phase, "b": known}})
    assert len(columns) == 7
    assert rows[0] == ["a", "2.000", "50%", "7", "", "", ""]
    assert rows[1] == ["b", "2.000", "50%", "7", "3", "5", ""]
    assert rows[2] == ["step", "4.000", "25%", "", "", "", ""]


def test_nothing_is_marked_while_nothing_is_profiled():
    items = [1, 2]
    assert trace.each("micro-batch", items) is items


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The folder of a run of two steps, of which the second was profiled."""
    folder = tmp_path_factory.mktemp("profiled")
    assert run(tiny_job.write(folder), "--run.profile.steps", "[2]") == 0
    return folder / "run"


def test_a_profiled_run_computes_the_same(profiled, tmp_path):
    assert run(tiny_job.write(tmp_path)) == 0
    assert tiny_job.learned(profiled) == tiny_job.learned(tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()


def test_the_trace_and_the_table(profiled):
    step = profiled / "profile" / "step_000002"
    assert {path.name for path in step.iterdir()} == {"rank0.json.gz", "table.json"}
    with gzip.open(step / "rank0.json.gz") as file:
        names = {e["name"] for e in json.load(file)["traceEvents"] if "name" in e}
    assert {"phase generate", "phase update_actor", "phase ref", "micro-batch 1"} <= names
    table = json.loads((step / "table.json").read_text())
    assert not table["gpu"]
    for name in ("generate", "logprobs", "ref", "values", "update_actor", "update_critic"):
        phase = table["phases"][name]
        assert 0 < phase["busy"] < 1 and 0 < phase["seconds"] < table["seconds"]
        assert phase["flops"] > 0 and phase["bytes"] > 0 and phase["floor_s"] is None
    figures = [json.loads(x) for x in (profiled / "metrics.jsonl").read_text().splitlines()]
    assert "perf/device_busy" not in figures[0]
    assert figures[1]["perf/device_busy"] == table["device_busy"]
    assert table["seconds"] == pytest.approx(figures[1]["timing_s/step"], rel=0.1)


def test_the_report_shows_it(profiled):
    page = write_report(profiled).read_text()
    assert "Profile of step 2" in page and "update_actor: costs on the host" in page
    assert "Profile of step 1" not in page


def test_a_step_that_never_comes_is_refused(tmp_path, capsys):
    assert run(tiny_job.write(tmp_path), "--run.profile.steps", "[3]") == 2
    told = "run.profile.steps=[3]: the run has steps 1 to 2; name any of those, as [3]\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.slow
def test_the_command_on_two_ranks(tmp_path, capfd, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    zero3 = {role: {"deepspeed": f"{role}_zero3.json"} for role in ("actor", "critic")}
    path, out = tiny_job.write(tmp_path, **zero3), tmp_path / "out"
    words = ["profile", "--config", str(path), "--ranks", "2", "--step", "1", "--out", str(out)]
    assert cli.main([*words, "--ppo.kl_coef", "0.1"]) == 0
    step = out / "profile" / "step_000001"
    assert {p.name for p in step.iterdir()} == {"rank0.json.gz", "rank1.json.gz", "table.json"}
    told = capfd.readouterr().out
    assert "step 1, rank 0" in told and "update_critic, host" in told
    assert not (out / "checkpoints").exists() and not (tmp_path / "run").exists()
