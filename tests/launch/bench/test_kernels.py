"""`gearshift bench kernels` and launch/gpu/check.py, as far as a CPU can show them."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gearshift.engine.models.shapes import published
from gearshift.kernels import ops
from gearshift.kernels.checks.case import Size, errors_of
from gearshift.kernels.checks.self_check import CASES
from gearshift.launch import cli
from gearshift.launch.bench import table as bench_table
from gearshift.launch.bench.ops import case as bench_case
from gearshift.launch.bench.ops import run as bench_kernels
from gearshift.launch.bench.ops import timing as bench_timing
from gearshift.launch.bench.ops.peers import missing, peers_of
from gearshift.launch.bench.ops.shapes import FLOORS, SHAPES, Floor, parse_shape
from gearshift.launch.gpu import check as gpu_check

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
SHAPE = "32x16x300"
SMALL = Size(
    rows=32, hidden=16, vocab=300, batch=4, response=16, heads=(4, 2, 16), context=32, plain=True
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU where one is")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_timing, "CPU_SECONDS", 0.0)


def bench(*words) -> int:
    return cli.main(["bench", "kernels", *map(str, words)])


def test_peak_memory_of_a_run_without_a_gpu():
    """32 MiB that come and go inside the run count; what was there before does not."""
    kept = torch.ones(1 << 23)
    extra = bench_timing.peak_extra_bytes(lambda: torch.ones(1 << 23).sum(), CPU)
    if extra is None:
        pytest.skip("the system does not count a process's peak")
    assert kept.nbytes - (2 << 20) < extra < kept.nbytes + (8 << 20)


def test_table_and_json(tmp_path, capsys):
    file = tmp_path / "k.json"
    words = ["--op", "linear_ppo_loss", "value_loss", "--shape", SHAPE, "--peers", "eager"]
    assert bench(*words, "--seed", "7", "--json", file) == 0
    said = capsys.readouterr().out
    assert said.startswith("no GPU: CPU time of the PyTorch backend")
    assert "linear_ppo_loss.bonus" in said and "kl_reward_gae" not in said
    report = json.loads(file.read_text())
    assert report["seed"] == 7 and report["machine"]["torch"] == torch.__version__
    assert report["ceiling"]["bytes_per_s"] > 0 and report["ceiling_after"]["flops_per_s"] > 0
    sides = {(row["case"], row["side"]): row for row in report["rows"]}
    assert len(sides) == len(report["rows"]) == 6
    for row in sides.values():
        assert row["problem"] is None and row["error"] < 2e-4
        timing = row["timing_ms"]
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert timing["repetitions"] >= 6  # two visits
        rate = row["floor"]["flops"] / timing["median"] / 1e9
        assert row["tflop_per_s"] == pytest.approx(rate)
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / timing["median"])


def test_what_fails_its_check_has_no_speed(monkeypatch, tmp_path, capsys):
    right = ops.value_loss

    def wrong(*args, **kwargs):
        loss, clipped = right(*args, **kwargs)
        return loss * 1.01, clipped

    monkeypatch.setattr(ops, "value_loss", wrong)
    file = tmp_path / "k.json"
    words = ["--op", "value_loss", "whiten", "--shape", SHAPE, "--peers", "eager"]
    assert bench(*words, "--json", file) == 1
    rows = {(r["case"], r["side"]): r for r in json.loads(file.read_text())["rows"]}
    failed = rows["value_loss", "gearshift torch"]
    assert failed["timing_ms"] is None and "share_of_floor" not in failed
    assert re.match(r"check failed: loss is off by 0\.0", failed["problem"])
    assert rows["value_loss", "eager"]["timing_ms"] and rows["whiten", "eager"]["timing_ms"]
    said = capsys.readouterr().out
    assert "see below" in said and "value_loss, gearshift torch: check failed: loss" in said


def test_a_peer_that_does_not_run_is_a_line_of_the_table(monkeypatch):
    def broken(inputs, size):
        raise RuntimeError("no such device\nat line 3")

    def other(inputs, size):
        return {"whitened": inputs["x"]}

    monkeypatch.setattr(bench_case, "peers_of", lambda case: {"eager": broken, "compile": other})
    setting = bench_case.Setting(
        shape="small",
        size=SMALL,
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(1),
        backends=("torch",),
        peers=("eager", "compile"),
    )
    case = next(case for case in CASES if case.name == "whiten")
    ours, failed, off = bench_case.measure(case, setting, Floor(1, 1), 1.0)
    assert ours.timing and ours.problem is None
    assert failed.problem == "failed: RuntimeError: no such device" and failed.timing is None
    assert off.problem.startswith("check failed: whitened is off by") and off.timing is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eager_peers_compute_the_same(case):
    peers = {n: p for n, p in peers_of(case.name).items() if n in ("eager", "torch_chunked")}
    inputs = case.draw(SMALL, torch.float32, torch.Generator().manual_seed(2))
    for name, peer in peers.items():
        if missing(name):
            continue
        outputs = peer(inputs, SMALL)
        errors = errors_of(outputs, case.truth(inputs, outputs))
        assert errors and max(errors.values()) < 2e-4, f"{name}: {errors}"


def test_every_timed_case_has_a_floor_and_an_eager_peer():
    assert set(FLOORS) <= {case.name for case in CASES}
    assert {case.op for case in CASES} == {name.partition(".")[0] for name in FLOORS}
    for name, floor in FLOORS.items():
        small, large = (floor(SHAPES[shape], 2) for shape in ("tiny", "llama3-8b"))
        assert 0 < small.bytes < large.bytes and 0 < small.flops < large.flops
        assert "eager" in peers_of(name)


def test_floors_are_those_of_the_head():
    size = SHAPES["llama3-8b"]
    gemm = 2 * 8192 * 4096 * 128256
    assert FLOORS["linear_logprob"](size, 2).flops == gemm
    floor = FLOORS["linear_ppo_loss"](size, 2)
    assert floor.flops == 3 * gemm
    assert floor.bytes == pytest.approx(2 * (8192 + 128256) * 4096 * 2, rel=1e-3)
    assert floor.seconds(3e12, 790e12) == pytest.approx(0.0327, rel=1e-2)
    assert FLOORS["logprob_entropy"](size, 2).bytes == pytest.approx(8192 * 128256 * 2, rel=1e-3)


def test_the_page_names_every_op_and_option():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    options = ("--op", "--shape", "--peers", "--backend", "--json")
    for word in (*(case.op for case in CASES), *options, *SHAPES, "GEARSHIFT_SELF_CHECK"):
        assert word in page, word


def test_timing_pools_both_visits():
    timing = bench_timing.summary([1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0])
    assert timing == bench_timing.Timing(5.5, 3.0, 9.0, (8 - 3) / 3, 10)
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "AB"}
    bench_timing.interleaved(runs, CPU)
    assert "".join(order) == "AB" + "AAABBB" + "BBBAAA"


@pytest.mark.parametrize(
    "words, told",
    [
        (["--shape", "8x8"], "--shape 8x8: give NxHxV, or one of llama3-8b"),
        (["--shape", "0x8x8"], "--shape 0x8x8: give NxHxV"),
        (["--shape", "llama3-8b"], "--shape llama3-8b: too large without a GPU"),
        (["--peers", "vllm"], "--peers vllm: choose from eager"),
        (["--backend", "triton"], "--backend triton: without a GPU"),
    ],
)
def test_mistakes_are_one_line(words, told, capsys):
    assert bench(*words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_shapes_by_numbers():
    size = parse_shape("64x32x1000", CPU)
    assert (size.rows, size.hidden, size.vocab, size.plain) == (64, 32, 1000, True)


def test_a_table(capsys):
    bench_table.show("title", ["op", "side", "ms"], [["a", "ours", "1.5"]], ["note"])
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "op  side   ms",
        "a   ours  1.5",
        "note",
    ]


def test_gpu_check_says_that_there_is_no_gpu(tmp_path, capsys):
    assert gpu_check.main(["--part", "shift", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("gpu-check: no CUDA device") and told.err.count("\n") == 1
    assert told.out == "" and not (tmp_path / "out").exists()


BOOTSTRAP = """
import importlib.util, os, pathlib, runpy, subprocess, sys, tempfile
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [place for place in sys.path if "editable" not in place.lower()]
assert importlib.util.find_spec("gearshift") is None, "an installation would hide a fault"
check = runpy.run_path(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    environment = check["bootstrap"](pathlib.Path(folder))
    from gearshift.kernels import dispatch
    from gearshift.launch.bench.ops import shapes
    assert dispatch.__file__.startswith(folder)
    assert "kernels" not in sys.modules
    print(environment["PYTHONPATH"].split(os.pathsep)[0] == folder)
"""


def test_gpu_check_needs_no_installation(tmp_path):
    script = ROOT / "launch" / "gpu" / "check.py"
    done = subprocess.run(
        [sys.executable, "-I", "-c", BOOTSTRAP, script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
    assert not list(tmp_path.iterdir())


def test_wheels_are_checked_before_anything_runs(tmp_path):
    check = runpy.run_path(str(ROOT / "launch" / "gpu" / "check.py"))
    with pytest.raises(ValueError, match="there is no .whl file in it"):
        check["_install"](tmp_path, tmp_path / "target")


def test_parts_of_the_gpu_check():
    jobs = gpu_check.jobs_of("all", gpus=2)
    assert {job.part for job in jobs} == set(gpu_check.PARTS) - {"first"}
    assert [job.name for job in jobs[:2]] == ["ragged", "kernels-correct"]
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(job.limit_s < 480 and "{out}" in " ".join(job.words) for job in jobs)
    speed = gpu_check.jobs_of("kernels-speed", gpus=1)
    assert [job.words[job.words.index("--shape") + 1] for job in speed] == list(
        gpu_check.SPEED_SHAPES
    )
    for job in speed:  # the words are those the bench takes
        parser = bench_kernels.argparse.ArgumentParser()
        bench_kernels.add_arguments(parser)
        args = parser.parse_args(job.words[job.words.index("kernels") + 1 :])
        assert args.peers == [] and args.json.name == f"{job.name}.json"


def test_jobs_that_fail_hang_or_lack_something_do_not_stop_the_next(tmp_path, capsys):
    def job(name, code, limit=20, needs=()):
        return gpu_check.Job("kernels-correct", name, ("-c", code), limit, needs)

    jobs = [
        job("lacks", "raise SystemExit(3)", needs=("no_such_package",)),
        job("fails", "print('reason'); raise SystemExit(3)"),
        job("hangs", "import time; print('begun', flush=True); time.sleep(60)", limit=2),
        job("works", "open(r'{out}/made', 'w').write('x'); print('fine')"),
    ]
    results = gpu_check.run_jobs(jobs, tmp_path, {}, tmp_path)
    assert [r["status"] for r in results] == ["skipped", "failed", "timed out", "passed"]
    assert results[0]["reason"] == "not installed: no_such_package"
    assert results[1]["reason"] == "exit status 3, see fails.log"
    assert (tmp_path / "made").exists()
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["jobs"] == results and report["machine"]["torch"] == torch.__version__
    assert "reason" in capsys.readouterr().out
    assert len(gpu_check.summary(results)) == 5


def test_correctness_job(tmp_path, capsys, monkeypatch):
    from gearshift.launch.gpu import parts as gpu_parts

    wanted = list(gpu_parts.checks(memory_bytes=80e9))
    assert {check.label for check in wanted} >= {*SHAPES, "beyond 2^31", "large cache"}
    assert {check.case.name for check in wanted} == {case.name for case in CASES}
    big = gpu_parts.BEYOND_INT32
    assert big.rows * big.vocab > 2**31
    assert not any(c.label == "beyond 2^31" for c in gpu_parts.checks(memory_bytes=16e9))

    few = [
        dataclasses.replace(check, size=dataclasses.replace(SMALL, plain=False), backend="torch")
        for check in wanted
        if check.label == "small" and check.case.op in ("value_loss", "whiten")
    ]
    file = tmp_path / "c.json"
    assert gpu_parts.correctness(few, CPU, file) == 0
    monkeypatch.setattr(ops, "whiten", lambda x, mask: x)
    assert gpu_parts.correctness(few, CPU, file) == 1
    rows = json.loads(file.read_text())["checks"]
    assert [bool(row["problem"]) for row in rows] == [row["case"] == "whiten" for row in rows]
    assert "small whiten float32 torch: whitened is off by" in capsys.readouterr().out


@pytest.mark.parametrize("job", gpu_check.jobs_of("generation", gpus=1), ids=lambda job: job.name)
def test_the_generation_job_is_a_bench(job):
    from gearshift.launch.bench import generation, workload

    parser = generation.argparse.ArgumentParser()
    generation.add_arguments(parser)
    args = parser.parse_args(job.words[job.words.index("generation") + 1 :])
    assert published(args.model.removeprefix("shape:")).num_hidden_layers == 28
    work = workload.make_workload(args, 100)
    assert {len(prompt) for prompt in work.prompts} == {256} and set(work.limits) == {512}
    assert args.slots == len(work.prompts) == args.batch and args.dtype == "bfloat16"
