"""One PPO step of a tiny Llama by Gearshift and by TRL: the same work, in separate processes.

Equal for both: checkpoints of policy, critic and reward model (one architecture), prompts, fixed
response length, fp32, one epoch of one minibatch, micro-batch, clip ranges, gamma, lambda, KL,
AdamW, one thread. We generate all rows at once and score 8 at a time; TRL does both with
--peer-batch rows at a time (fewer take less memory and more time). The processes take turns: ours,
theirs, theirs, ours. Compared are, as medians over the processes,

    growth   peak resident memory of a step, above what is resident when the models are built and
             one forward of a few tokens is done (VmHWM, reset when the step begins, less VmRSS)
    CPU s    process time of a step, user and system

TRL's side is this file, too, run by an interpreter that has gearshift and trl:

    python -m gearshift.launch.bench.versus FOLDER OUT      the task in FOLDER, its figures as JSON
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.metrics import peak_memory, reset_peak_memory
from gearshift.launch.bench import job
from gearshift.launch.bench.record import write_json
from gearshift.launch.bench.table import show
from gearshift.launch.train import quiet_libraries

PEER = "trl 1.12.0"  # the last release with a PPO trainer
FIGURES = {"growth_gb": "growth GB", "cpu_seconds": "CPU s"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """The work of one step."""

    vocab: int
    rows: int = 32
    prompt_tokens: int = 16
    response_tokens: int = 128
    micro_batch: int = 4
    score_batch: int = 8
    peer_batch: int = 8  # TRL generates and scores this many rows at a time
    steps: int = 3
    hidden: int = 64
    layers: int = 2
    seed: int = 0

    def __post_init__(self):
        if self.vocab < 2 * len(job.SPECIAL):
            raise ConfigError(f"--vocab {self.vocab}", f"at least {2 * len(job.SPECIAL)}")


def main(args: argparse.Namespace) -> int:
    """Prints a table of ratios, or one line when the peer is not installed."""
    if args.config:
        raise ConfigError("--config", "--vs-trl brings its own models and recipe", "leave one out")
    size = {"steps": args.steps, "peer_batch": args.peer_batch}
    tasks = [Task(vocab=vocab, **size) for vocab in args.vocab]
    quiet_libraries()
    imported = [args.peer_python, "-c", "import trl.experimental.ppo"]
    tried = subprocess.run(imported, capture_output=True, text=True)
    if tried.returncode:
        why, peer = tried.stderr.strip().rpartition("\n")[2], PEER.replace(" ", "==")
        print(f"skipped: {args.peer_python}: {why}; pip install {peer}")
        return 0
    result = {"peer": PEER, "tasks": [compare(task, args) for task in tasks]}
    print_table(result)
    write_json(args.json, result)
    return 0


def compare(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Runs each side `args.repeats` times; all figures, and the ratios of the medians."""
    runs: dict[str, list[dict]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        write_task(task, Path(folder))
        for turn in range(args.repeats):
            for side in ("ours", "trl") if turn % 2 == 0 else ("trl", "ours"):
                runs[side].append(run(side, task, Path(folder), args))
    ours, theirs = ({n: median(r[n] for r in rows) for n in FIGURES} for rows in runs.values())
    ratios = {name: ours[name] / theirs[name] for name in FIGURES}
    return {"task": asdict(task), "overrides": args.overrides, "ratio": ratios} | runs


def run(side: str, task: Task, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """{"growth_gb", "cpu_seconds", ...} of one process of `side`."""
    out = folder / f"{side}.json"
    if side == "ours":
        command = [sys.executable, "-m", "gearshift.launch.cli", "bench", "step"]
        command += ["--config", str(folder / "recipe.yaml"), "--steps", str(task.steps)]
        ask([*command, "--json", str(out), *args.overrides])
        measured = json.loads(out.read_text())["step"]
    else:
        ask([args.peer_python, "-m", __name__, str(folder), str(out)])
        measured = json.loads(out.read_text())
    expected = task.rows * task.response_tokens
    assert measured["generated_tokens"] == expected, f"{side}: {measured['generated_tokens']}"
    return measured


def ask(command: list[str]) -> str:
    """What a process prints; a failed one raises with the end of its output."""
    # torch alone would start a thread per core; the peer says on import that it is experimental.
    settings = {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode == 2 and done.stderr.startswith("gearshift: error: "):
        raise ValueError(done.stderr.removeprefix("gearshift: error: ").strip())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def print_table(result: dict[str, Any]) -> None:
    """Two rows per vocabulary: memory growth and CPU time, with the range over the processes."""
    rows = []
    for entry in result["tasks"]:
        for name, label in FIGURES.items():
            seen = [[r[name] for r in entry[side]] for side in ("ours", "trl")]
            cells = [f"{median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in seen]
            vocabulary = f"{entry['task']['vocab']:,}"
            rows.append([vocabulary, label, *cells, f"{entry['ratio'][name]:.2f}"])
    columns = ["vocabulary", "figure", "Gearshift", "TRL", "ratio"]
    show(f"One PPO step against {result['peer']}", columns, rows, ["medians (least to most)"])


# The task of both sides


def write_task(task: Task, folder: Path) -> None:
    """Models, tokenizer, prompts, our recipe and task.json for the peer."""
    _write_models(task, folder)
    prompts = job.random_prompts(2 * task.rows, task.prompt_tokens, task.vocab, task.seed)
    job.write_prompts(folder / "prompts.jsonl", prompts)
    write_json(folder / "task.json", asdict(task) | {"prompts": prompts})
    write_json(folder / "recipe.yaml", recipe(task, folder))  # JSON is YAML


def recipe(task: Task, folder: Path) -> dict[str, Any]:
    """Ours. Without ZeRO, as one process has nothing to partition over."""
    reward = {"name": "reward", "kind": "model", "path": str(folder / "reward")}
    reward |= {"batch_size": task.score_batch, "deepspeed": "frozen_zero3.json"}
    return {
        "run": {"seed": task.seed, "threads": 1},
        "actor": {"path": str(folder / "policy"), "deepspeed": "trained_zero0.json"},
        "critic": {"path": str(folder / "reward"), "deepspeed": "trained_zero0.json"},
        "reference": {"deepspeed": "frozen_zero3.json"},
        "rewards": [reward],
        "data": {
            "sources": [{"path": str(folder / "prompts.jsonl")}],
            "max_prompt_tokens": task.prompt_tokens,
        },
        "sampling": {"max_new_tokens": task.response_tokens},
        "ppo": {
            "prompts_per_step": task.rows,
            "minibatch_size": task.rows,
            "micro_batch_size": task.micro_batch,
            "score_batch_size": task.score_batch,
        },
    }


def _write_models(task: Task, folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=task.vocab,
        hidden_size=task.hidden,
        intermediate_size=4 * task.hidden,
        num_hidden_layers=task.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=task.prompt_tokens + task.response_tokens,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        num_labels=1,
    )
    torch.manual_seed(task.seed)
    policy = LlamaForCausalLM(config)
    with torch.no_grad():
        # One channel is positive in every hidden state, and the head keeps special tokens from
        # being sampled by it.
        policy.model.embed_tokens.weight[:, 0] = 0.2
        policy.lm_head.weight[:, 0] = 0
        policy.lm_head.weight[: len(job.SPECIAL)] = 0
        policy.lm_head.weight[: len(job.SPECIAL), 0] = -100
    policy.save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        job.write_tokenizer(folder / name, task.vocab)


# TRL's side


def peer(folder: Path, out: Path) -> None:
    """The task in `folder`: one step to warm up, then its steps, whose figures go to `out`."""
    task = json.loads((folder / "task.json").read_text())
    device = torch.device("cpu")
    clock = Clock(device)
    trainer = _trainer(task, folder, clock)
    with torch.no_grad():
        trainer.policy_model(torch.arange(4, 7)[None])
    reset_peak_memory(device)
    built_gb = peak_memory(device)
    trainer.train()
    cpu, seconds, peaks = zip(*clock.steps[1:], strict=True)
    ended = sum(logs["val/num_eos_tokens"] for logs in clock.logs)
    assert ended == 0, "an end token was sampled: the sides did not do the same work"
    figures = {
        "version": version("trl"),
        "cpu_seconds": median(cpu),
        "cpu_seconds_of_each": cpu,
        "seconds": median(seconds),
        "peak_gb": median(peaks),
        "growth_gb": median(peaks) - built_gb,
        "generated_tokens": task["rows"] * task["response_tokens"],
    }
    write_json(out, figures)


class Clock(TrainerCallback):
    """steps: (CPU seconds, seconds, peak GB) of each; and what the trainer logs."""

    def __init__(self, device: torch.device):
        self.device, self.steps, self.logs = device, [], []

    def on_train_begin(self, *_, **__):
        reset_peak_memory(self.device)
        self._begin = time.process_time(), time.perf_counter()

    def on_step_end(self, *_, **__):
        cpu, wall = self._begin
        seconds = time.process_time() - cpu, time.perf_counter() - wall
        self.steps.append((*seconds, peak_memory(self.device)))
        self.on_train_begin()

    def on_log(self, *_, logs, **__):
        self.logs.append(logs)


def _trainer(task: dict, folder: Path, clock: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    def policy():
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="float32")

    def scorer():
        return AutoModelForSequenceClassification.from_pretrained(
            folder / "reward", num_labels=1, dtype="float32"
        )

    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        seed=task["seed"],
        num_ppo_epochs=1,
        num_mini_batches=1,
        per_device_train_batch_size=task["micro_batch"],
        gradient_accumulation_steps=task["rows"] // task["micro_batch"],
        local_rollout_forward_batch_size=task["peer_batch"],
        total_episodes=task["rows"] * (1 + task["steps"]),
        response_length=task["response_tokens"],
        temperature=1.0,
        learning_rate=1e-6,
        cliprange_value=0.2,
        vf_coef=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return PPOTrainer(
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(folder / "policy", padding_side="left"),
        model=policy(),
        ref_model=policy(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=Dataset.from_dict({"input_ids": task["prompts"]}),
        callbacks=[clock],
    )


if __name__ == "__main__":
    peer(*map(Path, sys.argv[1:]))
