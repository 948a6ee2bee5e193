"""The GPU check's PPO step of four models, here with a shape that a CPU can train."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift.launch.gpu import check as gpu_check
from gearshift.launch.gpu import ppo as gpu_ppo
from tests.tiny import job as tiny_job
from tests.tiny import models as tiny


@pytest.fixture
def shape(monkeypatch):
    monkeypatch.setattr(gpu_ppo, "published", lambda name, **_: tiny.llama_config(4096))
    for name, value in tiny_job.environment().items():
        monkeypatch.setenv(name, value)


def test_random_checkpoints_load(tmp_path, shape):
    config = gpu_ppo.published("any")
    place = torch.device("cpu")
    gpu_ppo._SHARD_BYTES, whole = 100_000, gpu_ppo._SHARD_BYTES  # several files
    gpu_ppo.write_model(tmp_path / "policy", config, AutoModelForCausalLM, place)
    gpu_ppo._SHARD_BYTES = whole
    assert len(list((tmp_path / "policy").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    norms = [p for name, p in loaded.named_parameters() if "norm" in name]
    assert norms and all(torch.equal(p, torch.ones_like(p)) for p in norms)
    assert 0.015 < float(loaded.get_input_embeddings().weight.detach().float().std()) < 0.025


@pytest.mark.slow
def test_a_step_of_four_models_is_run_and_written_down(tmp_path, shape):
    file = tmp_path / "ppo.json"
    sizes = ["--rows", "4", "--prompt", "8", "--new", "6", "--json", str(file)]
    assert gpu_ppo.main([*sizes, "--", "--ppo.micro_batch_size", "2"]) == 0
    report = json.loads(file.read_text())
    assert [step["step"] for step in report["steps"]] == [1, 2]
    last = report["steps"][-1]
    assert last["response_length/max"] == 6
    assert {"timing_s/update_actor", "timing_s/ref", "memory_gb/update_critic"} <= set(last)
    assert report["recipe"] == "7b_1xh200.yaml" and report["timed_out"] is False


STUB = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run.dir") + 1])
folder.mkdir()
(folder / "metrics.jsonl").write_text({lines!r})
time.sleep({rest})
sys.exit({status})
"""
FIGURES = {"step": 1, "timing_s/step": 2.5, "memory_gb/generate": 7.0, "generated_tokens": 9.0}
FIGURES |= {
    "response_length/max": 9.0,
    "tokens": 64 * 256 + 9.0,
    "timing_s/update_actor": 1.0,
    "timing_s/update_critic": 1.0,
}
LINE = json.dumps(FIGURES) + "\n"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(lines, rest, status) puts a job in the main job's place; returns main's exit status."""

    def run(lines, *, rest=0, status=0):
        (tmp_path / "launch").mkdir()
        job = STUB.format(lines=lines, rest=rest, status=status)
        (tmp_path / "launch" / "train.py").write_text(job)
        return gpu_ppo.main(["--limit-s", "4", "--json", str(tmp_path / "ppo.json")])

    monkeypatch.setattr(gpu_ppo, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_ppo, "published", lambda name, **_: tiny.llama_config(4096))
    monkeypatch.setattr(gpu_ppo, "write_job", lambda folder, *_: ["--run.dir", str(folder / "run")])
    return run


def test_a_run_cut_short_is_reported_as_far_as_it_came(stub, tmp_path, capsys):
    assert stub(LINE + LINE[:20], rest=60) == 1
    report = json.loads((tmp_path / "ppo.json").read_text())
    assert report["timed_out"] is True and report["steps"] == [json.loads(LINE)]
    told = capsys.readouterr().out
    assert "cut short: 1 of 2 steps in 4 s" in told and "256" in told.split()


def test_a_run_that_ends_in_time_is_not_marked(stub, tmp_path):
    assert stub(LINE * 2) == 0
    report = json.loads((tmp_path / "ppo.json").read_text())
    assert report["timed_out"] is False and len(report["steps"]) == 2


def test_a_run_cut_short_before_its_first_step_has_no_figures(stub, tmp_path):
    with pytest.raises(RuntimeError, match="no step was finished"):
        stub("", rest=60)
    assert not (tmp_path / "ppo.json").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"tokens": 64 + 9.0}, "prompts had 1 tokens, not 256"), ({"tokens": None}, "update_actor")],
)
def test_other_work_than_was_asked_for_is_no_result(stub, tmp_path, changes, told):
    figures = FIGURES | changes
    if changes["tokens"] is None:
        figures = {k: v for k, v in FIGURES.items() if k != "timing_s/update_actor"}
    with pytest.raises(RuntimeError, match=told):
        stub(json.dumps(figures) + "\n")
    assert not (tmp_path / "ppo.json").exists()


def test_a_run_that_fails_is_no_run_cut_short(stub):
    with pytest.raises(RuntimeError, match="ended with status 3"):
        stub(LINE, status=3)


def test_the_gpu_check_asks_for_as_many_steps_as_its_limit_holds():
    jobs = {job.name: job for job in gpu_check.jobs_of("ppo", gpus=1)}
    asked = {name: job.words[job.words.index("--steps") + 1] for name, job in jobs.items()}
    assert asked == {"ppo-64": "2", "ppo-512": "1"}
    for job in jobs.values():
        assert int(job.words[job.words.index("--limit-s") + 1]) < job.limit_s


def test_the_first_part_takes_six_minutes_and_others_four_each():
    first = gpu_check.jobs_of("first", gpus=1)
    assert sum(job.limit_s for job in first) <= 360
    names = ["ragged", "kernels-speed-qwen2.5-7b", "ppo-64", "generation-64", "generation-256"]
    assert [job.name for job in first] == [f"first-{name}" for name in names]
    every = gpu_check.jobs_of("all", gpus=1)
    assert {job.name for job in every if job.limit_s > 240} == {"ppo-512"}
    assert [job.name for job in gpu_check.jobs_of("generation-64", gpus=1)] == ["generation-64"]


def test_an_unknown_part_and_a_tiny_form_that_is_not_there_are_told(tmp_path, capsys):
    assert gpu_check.main(["--part", "frist", "--out", str(tmp_path / "out")]) == 2
    assert "--part frist: there are all, first" in capsys.readouterr().err
    assert gpu_check.main(["--part", "shift", "--tiny", "--out", str(tmp_path / "out")]) == 2
    assert "--tiny: only part first has such a form" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny form is a CPU's")
def test_the_first_part_in_its_tiny_form(tmp_path):
    """All its jobs at sizes of a CPU, by the command a GPU machine runs."""
    words = [gpu_check.__file__, "--part", "first", "--tiny", "--out", str(tmp_path)]
    environment = tiny_job.environment(PYTHONPATH="")
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    ppo = json.loads((tmp_path / "first-ppo-4.json").read_text())
    (row,) = ppo["token_counts"]
    assert (row["mean prompt"], row["longest response"], row["rows"]) == (8, 6, 4)
    generated = json.loads((tmp_path / "first-generation-4.json").read_text())
    assert generated["token_counts"]["all"] == 4 * (8 + 6)
    ragged = json.loads((tmp_path / "first-ragged.json").read_text())
    assert [row["packed"] for row in ragged["rows"]] == [False, True]
    assert json.loads((tmp_path / "first-kernels-speed-tiny.json").read_text())["seed"] >= 0
