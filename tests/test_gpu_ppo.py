"""The GPU check's PPO step of four models, here with a shape that a CPU can train."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift.launch import gpu_ppo
from tests import tiny, tiny_job


@pytest.fixture
def shape(monkeypatch):
    monkeypatch.setattr(gpu_ppo, "published", lambda name: tiny.llama_config(4096))
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
    assert report["recipe"] == "7b_1xh200.yaml"
