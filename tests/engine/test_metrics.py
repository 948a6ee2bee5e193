"""Step metrics against direct formulas, on one and two ranks; the log and the trackers."""

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gearshift.engine import metrics as metrics_module
from gearshift.engine.config.schema import RunConfig
from gearshift.engine.log import trackers
from gearshift.engine.log.run_log import RunLog
from gearshift.engine.metrics import StepMetrics, peak_memory, reset_peak_memory
from tests.tiny.on_ranks import free_port

NAN = torch.nan
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def metrics() -> StepMetrics:
    return StepMetrics(torch.device("cpu"))


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reported() -> set[str]:
    """Every name that the product gives a figure; what an f-string fills in as <...>."""
    names = set()
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            first = call.args[0] if call.func.attr.startswith("add_") and call.args else None
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            text = "".join(p.value if isinstance(p, ast.Constant) else "<x>" for p in parts)
            names |= {text} if "/" in text else set()
    return names


def test_every_figure_is_explained():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    known = [re.escape(name) for name in re.findall(r"`([a-z_]+/[^`]+)`", page)]
    known = [re.sub(r"<[a-z_]+>|\\\*", "[^ ]+", name) for name in known]
    found = reported()
    assert {"objective/kl", "<x>/grad_norm", "rewards/<x>/mean"} <= found
    filled = {"<x>/grad_norm": "actor/grad_norm", "stream/<x>_<x>": "stream/reference_ratio"}
    names = [filled.get(name, name) for name in found]
    lacking = [name for name in names if not any(re.fullmatch(k, name) for k in known)]
    assert not lacking


# One rank


def test_masked_entries_are_never_read(metrics):
    values = torch.tensor([[1.0, 3.0, NAN], [5.0, -torch.inf, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    metrics.add_mean("mean", values, mask)
    metrics.add_sum("sum", values, mask)
    metrics.add_variance("var", values, mask)
    metrics.add_std("std", values, mask)
    metrics.add_max("max", values, mask)
    metrics.add_min("min", values, mask)
    figures = metrics.reduce()
    expected = {"mean": 3.0, "sum": 9.0, "var": 8 / 3, "std": (8 / 3) ** 0.5}
    assert figures == pytest.approx(expected | {"max": 5.0, "min": 1.0})


def test_a_live_nan_is_not_hidden(metrics):
    values = torch.tensor([1.0, NAN])
    metrics.add_mean("mean", values)
    metrics.add_max("max", values)
    metrics.add_min("min", values)
    figures = metrics.reduce()
    assert math.isnan(figures["mean"])
    assert figures["max"] == math.inf and figures["min"] == -math.inf


def test_nothing_live_is_nan(metrics):
    metrics.add_mean("mean", torch.ones(3), torch.zeros(3))
    assert math.isnan(metrics.reduce()["mean"])


def test_micro_batches_add_up(metrics):
    values, weights = rows(0, 8, 5), rows(1, 8, 5).abs()
    for part, weight in zip(values.split(3), weights.split(3), strict=True):
        metrics.add_mean("mean", part, weight)
        metrics.add_max("max", part)
        metrics.add_min("min", part)
        metrics.add_variance("var", part)
    figures = metrics.reduce()
    assert figures["mean"] == pytest.approx(((values * weights).sum() / weights.sum()).item())
    assert figures["max"] == values.max() and figures["min"] == values.min()
    assert figures["var"] == pytest.approx(values.var(unbiased=False).item())


def test_explained_variance(metrics):
    returns, values = rows(2, 4, 6), rows(3, 4, 6)
    mask = rows(4, 4, 6) > -0.5
    live = returns[mask].double(), (returns - values)[mask].double()
    expected = 1 - (live[1].var(unbiased=False) / live[0].var(unbiased=False)).item()
    poisoned = torch.where(mask, values, NAN), torch.where(mask, returns, NAN)
    for part in (slice(0, 2), slice(2, 4)):
        metrics.add_explained_variance("ev", poisoned[0][part], poisoned[1][part], mask[part])
    metrics.add_explained_variance("perfect", returns, returns, mask)
    metrics.add_explained_variance("constant", values, torch.full_like(returns, 0.3), mask)
    figures = metrics.reduce()
    assert figures["ev"] == pytest.approx(expected)
    assert figures["perfect"] == 1.0 and math.isnan(figures["constant"])


def test_sums_keep_small_differences(metrics):
    """float32 sums of a long step would lose them."""
    values = torch.full((2_000_000,), 1000.0) + rows(5, 2_000_000) * 0.01
    metrics.add_std("std", values)
    assert metrics.reduce()["std"] == pytest.approx(values.double().std().item(), rel=1e-3)


def test_values_keep_no_graph_and_low_precision_is_read(metrics):
    values = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    metrics.add_mean("mean", values)
    metrics.add_max("flag", torch.tensor([False, True]))
    metrics.add_mean("count", torch.tensor([3, 4]))
    assert metrics.reduce() == {"mean": 1.0, "flag": 1.0, "count": 3.5}


def test_one_name_has_one_meaning(metrics):
    metrics.add_mean("x", torch.ones(1))
    with pytest.raises(AssertionError, match="x was added in two ways"):
        metrics.add_sum("x", torch.ones(1))


def test_time_and_memory(metrics):
    for _ in range(2):
        with metrics.phase("generate"):
            time.sleep(0.02)
    metrics.add_value("lr", 1e-6)
    figures = metrics.reduce()
    assert list(figures) == ["lr", "memory_gb/generate", "timing_s/generate"]
    assert figures["timing_s/generate"] >= 0.04  # both passes, and sleep never wakes early
    assert figures["lr"] == 1e-6


def test_memory_is_the_peak_since_its_reset_in_gigabytes():
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    torch.ones(50_000_000)  # 0.2 GB, touched and let go
    assert 0.15 < peak_memory(device) - before < 0.3
    reset_peak_memory(device)
    assert abs(peak_memory(device) - before) < 0.05


def test_memory_is_what_is_resident_where_no_peak_can_be_reset(monkeypatch):
    monkeypatch.setattr(metrics_module, "_CLEAR_REFS", Path("/proc/self/absent"))
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    held = torch.ones(50_000_000)
    assert held.numel() and 0.15 < peak_memory(device) - before < 0.3
    del held
    assert abs(peak_memory(device) - before) < 0.05


def test_nothing_added_is_nothing(metrics):
    assert metrics.reduce() == {}


# Two ranks


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict]]:
    """Per case of metrics_on_ranks.py, the answers of rank 0 and rank 1."""
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("metrics_on_ranks.py")],
            env=os.environ | here | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [[json.loads(line) for line in case] for case in zip(*answers, strict=True)]


def test_ranks_share_two_reductions(two_ranks):
    first, second = two_ranks[0]
    assert first == second and first.pop("reductions") == 2
    assert first.pop("timing_s/generate") >= 0.2  # the slower rank's
    live = torch.tensor([1.0, 2.0, 10.0, 4.0])
    expected = {"first": 4.25, "second": 5.25, "max": 10.0, "min": 1.0, "sum": 17.0, "value": 3.0}
    assert first == pytest.approx(expected | {"std": live.std(unbiased=False).item()})


def test_ranks_with_different_names_are_told_apart(two_ranks):
    for answer in two_ranks[1]:
        assert "ranks measured different metrics" in answer["refused"]
        assert answer["reductions"] == 1


# The log


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_log(folder: Path, **options) -> RunLog:
    return RunLog(RunConfig(dir=str(folder)), **options)


def test_a_line_is_whole_as_soon_as_it_is_written(tmp_path):
    log = open_log(tmp_path / "run")
    log.step(1, {"a": 0.5, "bad": math.nan, "worse": -math.inf, "step": 1.0})
    chat = [{"role": "user", "content": "hé\u2028 \ud800"}]
    log.samples(1, [{"prompt": chat, "response": "x\ny", "score": math.nan}])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "a": 0.5, "bad": null, "worse": null}\n'
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_bytes())
    assert sample["prompt"][0]["content"] == "hé\u2028 ?" and sample["score"] is None
    log.close()


def test_resuming_cuts_what_will_be_written_again(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.step(step, {"a": float(step)})
        log.samples(step, [{"prompt": "p", "response": "r", "score": 0.0}] * 2)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a"')  # killed while writing
    log = open_log(tmp_path, resumed_step=3)
    log.step(4, {"a": 40.0})
    log.close()
    assert [(line["step"], line["a"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_torn_line_is_cut_even_at_the_resumed_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    open_log(tmp_path, resumed_step=2).close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


# Trackers


def test_a_missing_tracker_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'wandb' is not installed: pip install wandb"):
        trackers.check_trackers(["wandb"])
    trackers.check_trackers([])


class FakeModule:
    """Has wandb's and trackio's interface."""

    def __init__(self):
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_tracker_run(tmp_path, monkeypatch, name):
    module = FakeModule()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module)
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    config = RunConfig(dir=str(tmp_path), trackers=[name], tracker_project="p")
    for step in (1, 2):
        log = RunLog(config, {"ppo": {"gamma": 1.0}}, resumed_step=step - 1)
        log.step(step, {"a": 1.5, "bad": math.nan})
        log.close()
    first, second = module.inits
    assert first == second and first["project"] == "p" and first["resume"] == "allow"
    run_id = (tmp_path / "tracker_id").read_text()
    assert run_id in (first.get("id") or first["name"])
    assert first["config"] == {"ppo": {"gamma": 1.0}}
    assert module.logged == [(1, {"a": 1.5}), (2, {"a": 1.5})] and module.finished == 2


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RunConfig(dir=str(tmp_path), trackers=["tensorboard"])
    log = RunLog(config)
    for step in (1, 2, 3):
        log.step(step, {"loss/policy_avg": step / 2, "bad": math.nan})
    log.close()
    log = RunLog(config, resumed_step=2)
    log.step(3, {"loss/policy_avg": 9.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss/policy_avg"]
    found = [(event.step, event.value) for event in events.Scalars("loss/policy_avg")]
    assert found == [(1, 0.5), (2, 1.0), (3, 9.0)]
