"""A training job of tiny models: its files, its YAML, and `launch/train.py` in this process."""

import json
import os
from pathlib import Path

import pytest
import yaml

from gearshift.launch import train
from tests.tiny import models as tiny

VOCABULARY = 16
# Figures that measure the machine: the others of two equal runs are equal to the bit.
COSTS = ("timing_s/", "memory_gb/", "states_gb/", "throughput/", "perf/")
TRAIN = Path(train.__file__).resolve()
REWARD = '''
def score(prompts, completions, **columns):
    """The number of words."""
    return [float(len(text.split())) for text in completions]
'''


def write(folder: Path, **changes: dict) -> Path:
    """Models, prompts, a reward and `run.yaml` in `folder`; returns the YAML's path.

    changes: keys put into the YAML's sections, as run={"steps": 3}.
    """
    tiny.save_policy(folder / "policy", VOCABULARY, initializer_range=0.2)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"w{4 + i} w{5 + i}", "gold": i} for i in range(8)]
    write_rows(folder / "prompts.jsonl", rows)
    settings = {
        "run": {"dir": str(folder / "run"), "steps": 2, "threads": 1, "hang_timeout_s": 0},
        "actor": {"path": str(folder / "policy"), "deepspeed": "actor_zero0.json"},
        "critic": {"deepspeed": "critic_zero0.json"},
        "reference": {"deepspeed": "frozen_zero3.json"},
        "rewards": [{"name": "words", "function": f"{folder / 'reward.py'}:score"}],
        "data": {"sources": [{"path": str(folder / "prompts.jsonl")}], "max_prompt_tokens": 8},
        "sampling": {"max_new_tokens": 6},
        "ppo": {"prompts_per_step": 4, "minibatch_size": 4, "micro_batch_size": 2},
    }
    for section, keys in changes.items():
        settings.setdefault(section, {}).update(keys)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of one process, restored after the test."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GEARSHIFT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def environment(**changes: str) -> dict[str, str]:
    """Of a subprocess: nothing of a launcher's or of a test's own process group, one thread."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    ours += ("MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in os.environ.items() if key not in ours}
    return inherited | {"OMP_NUM_THREADS": "1"} | changes


def learned(folder: Path) -> list[dict]:
    """The lines of `folder`/metrics.jsonl, without COSTS."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(COSTS)} for line in lines]
