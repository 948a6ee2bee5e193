"""One PPO step of a tiny Llama by Gearshift and by TRL: the same work, in separate processes.

Equal for both: checkpoints of policy, critic and reward model (one architecture), prompts, fixed
response length, fp32, one epoch of one minibatch, micro-batch, clip ranges, gamma, lambda, KL,
AdamW, one thread. We generate all rows at once and score 8 at a time; TRL does both with
--peer-batch rows at a time (fewer take less memory and more time). The processes take turns: ours,
theirs, theirs, ours. Compared are, as medians over the processes,

    growth   peak resident memory of a step, above what is resident when the models are built and
             one forward of a few tokens is done (VmHWM, reset when the step begins, less VmRSS)
    CPU s    process time of a step, user and system
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from gearshift.launch.bench.step import write_json
from gearshift.launch.bench.trl import PEER
from gearshift.launch.train import quiet_libraries

_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


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
        if self.peer_batch < 1:
            raise ValueError(f"--peer-batch {self.peer_batch}: at least 1")
        if self.vocab < 2 * len(_SPECIAL):
            raise ValueError(f"--vocab {self.vocab}: at least {2 * len(_SPECIAL)}")


def main(args: argparse.Namespace) -> int:
    """Prints a table of ratios, or one line when the peer is not installed."""
    if args.config:
        raise ValueError("--config: --vs-trl brings its own models and recipe; leave one out")
    size = {"steps": args.steps, "peer_batch": args.peer_batch}
    tasks = [Task(vocab=vocab, **size) for vocab in args.vocab]
    quiet_libraries()
    missing = ask([args.peer_python, "-m", "gearshift.launch.bench.trl", "--check"]).strip()
    if missing:
        print(f"skipped: {args.peer_python}: {missing}")
        return 0
    result = {"peer": PEER, "tasks": [compare(task, args) for task in tasks]}
    Console(highlight=False).print(table(result))
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
    ratios = {
        name: _median(runs["ours"], name) / _median(runs["trl"], name)
        for name in ("growth_gb", "cpu_seconds")
    }
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
        ask([args.peer_python, "-m", "gearshift.launch.bench.trl", str(folder), str(out)])
        measured = json.loads(out.read_text())
    expected = task.rows * task.response_tokens
    assert measured["generated_tokens"] == expected, f"{side}: {measured['generated_tokens']}"
    return measured


def ask(command: list[str]) -> str:
    """What a process prints; a failed one raises with the end of what it said."""
    # torch alone would start a thread per core; the peer says on import that it is experimental.
    settings = {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode == 2 and done.stderr.startswith("gearshift: error: "):
        raise ValueError(done.stderr.removeprefix("gearshift: error: ").strip())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def write_task(task: Task, folder: Path) -> None:
    """Models, tokenizer, prompts, our recipe and task.json for the peer."""
    _write_models(task, folder)
    import random

    draw = random.Random(task.seed)
    prompts = [
        [draw.randrange(len(_SPECIAL), task.vocab) for _ in range(task.prompt_tokens)]
        for _ in range(2 * task.rows)
    ]
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in ids)}) for ids in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "task.json").write_text(json.dumps(asdict(task) | {"prompts": prompts}))
    (folder / "recipe.yaml").write_text(json.dumps(recipe(task, folder), indent=2) + "\n")


def recipe(task: Task, folder: Path) -> dict[str, Any]:
    """Ours; JSON is YAML. Without ZeRO, as one process has nothing to partition over."""
    reward = {"name": "reward", "kind": "model", "path": str(folder / "reward")}
    reward |= {"batch_size": task.score_batch, "deepspeed": "frozen_zero3.json"}
    return {
        "run": {"seed": task.seed, "threads": 1},
        "actor": {"path": str(folder / "policy"), "deepspeed": "actor_zero0.json"},
        "critic": {"path": str(folder / "reward"), "deepspeed": "critic_zero0.json"},
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
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

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
    _never_sample_special(policy)
    policy.save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    tokenizer = _tokenizer(task.vocab)
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)


def _never_sample_special(policy: Any) -> None:
    """One channel that is positive in every hidden state, and a head that reads it for them."""
    import torch

    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = 0.2
        policy.lm_head.weight[:, 0] = 0
        policy.lm_head.weight[: len(_SPECIAL)] = 0
        policy.lm_head.weight[: len(_SPECIAL), 0] = -100


def _tokenizer(vocab: int) -> Any:
    """A word w<i> for every id but the special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = _SPECIAL + [f"w{i}" for i in range(len(_SPECIAL), vocab)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, **dict(names))


def table(result: dict[str, Any]) -> Table:
    """Two rows per vocabulary: memory growth and CPU time, with the range over the processes."""
    made = Table(title=f"One PPO step against {result['peer']}", caption="medians (least to most)")
    made.add_column("vocabulary", justify="right")
    made.add_column("figure")
    for name in ("Gearshift", "TRL", "ratio"):
        made.add_column(name, justify="right")
    for entry in result["tasks"]:
        for name, label in (("growth_gb", "growth GB"), ("cpu_seconds", "CPU s")):
            cells = [_cell(entry[side], name) for side in ("ours", "trl")]
            ratio = f"{entry['ratio'][name]:.2f}"
            made.add_row(f"{entry['task']['vocab']:,}", label, *cells, ratio)
    return made


def _median(runs: list[dict], name: str) -> float:
    return median(run[name] for run in runs)


def _cell(runs: list[dict], name: str) -> str:
    values = [run[name] for run in runs]
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
