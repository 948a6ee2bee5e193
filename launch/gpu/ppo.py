"""One PPO step of four full-parameter models on this machine: does the promise hold?

Actor, critic, reference and reward of one shape, with random weights, through the real main job and
its recipe; only files, batch, lengths and the critic's warm-up are changed. Writes memory and
seconds by phase, planned and measured. Needs disk for a bf16 checkpoint of the shape: 15 GB for 7B.
A run that --limit-s cuts short is reported as far as it came, with exit status 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gearshift.engine.models.shapes import published
from gearshift.launch.bench.job import random_prompts, write_prompts, write_tokenizer
from gearshift.launch.bench.record import machine, write_json
from gearshift.launch.bench.table import plain_lines

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch" / "recipes" / "7b_1xh200.yaml"
WORDS = 4000  # of the tokenizer; the embedding has all rows of the shape
_SHARD_BYTES = 2_000_000_000


def write_model(
    folder: Path, config: Any, auto: Any, device: torch.device, trunk: Path | None = None
) -> None:
    """A Hugging Face directory of bf16 weights as transformers starts them.

    trunk: another one's directory, from which the weights of the same names are taken, as links.
    """
    with device:
        module = auto.from_config(config, dtype=torch.bfloat16)
    if trunk is None:
        module.save_pretrained(folder, max_shard_size=_SHARD_BYTES)
        return
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    for file in trunk.glob("*.safetensors"):
        link = folder / f"trunk-{file.name}"
        link.symlink_to(file)
        with safe_open(file, "pt") as weights:
            index |= dict.fromkeys(weights.keys(), link.name)
    own = {
        name: weight.contiguous() for name, weight in module.named_parameters() if name not in index
    }
    save_file(own, folder / "own.safetensors", metadata={"format": "pt"})
    index = {name: index.get(name, "own.safetensors") for name, _ in module.named_parameters()}
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(content)


def write_job(folder: Path, config: Any, rows: int, prompt: int, device: torch.device) -> list[str]:
    """The files of a run in `folder`; returns the overrides of the recipe that name them.

    config: of all four models, transformers'.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    write_model(folder / "policy", config, AutoModelForCausalLM, device)
    config.num_labels = 1
    scorer, trunk = AutoModelForSequenceClassification, folder / "policy"
    write_model(folder / "reward", config, scorer, device, trunk)
    # By itself: beside a model, its type decides how a tokenizer's file is read.
    write_tokenizer(folder / "tokenizer", WORDS)
    write_prompts(folder / "prompts.jsonl", random_prompts(rows, prompt, WORDS))
    changes = {
        "run.dir": folder / "run",
        "run.export": "false",
        "run.save_last": "false",
        "actor.path": folder / "policy",
        "actor.tokenizer": folder / "tokenizer",
        "critic.path": folder / "policy",
        "critic.tokenizer": folder / "tokenizer",
        "rewards.0.path": folder / "reward",
        "rewards.0.tokenizer": folder / "tokenizer",
        "data.sources.0.path": folder / "prompts.jsonl",
        "data.max_prompt_tokens": prompt,
        "ppo.critic_warmup_steps": 0,  # the first step is to have every phase
        "rollout.max_sequences": rows,  # all at once, as far as the cache holds them
    }
    return [word for key, value in changes.items() for word in (f"--{key}", str(value))]


def train(
    folder: Path, overrides: list[str], limit_s: float
) -> tuple[list[dict[str, float]], bool]:
    """The main job on one device: the figures of the steps it finished, and whether limit_s cut it
    short. Raises RuntimeError where it fails, or no step was finished."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(RECIPE)]
    timed_out = False
    try:
        done = subprocess.run([*command, *overrides], timeout=limit_s)
        if done.returncode:
            raise RuntimeError(f"the run ended with status {done.returncode}")
    except subprocess.TimeoutExpired:
        timed_out = True
    steps = finished(folder / "run" / "metrics.jsonl")
    if not steps:
        raise RuntimeError(f"no step was finished, the run had {limit_s:.0f} s; raise --limit-s")
    return steps, timed_out


def check_work(steps: list[dict[str, float]], rows: int, prompt: int) -> None:
    """Raises RuntimeError where prompts were not as long as asked, or a role did not train."""
    for step in steps:
        read = (step["tokens"] - step["generated_tokens"]) / rows
        if read != prompt:
            raise RuntimeError(f"prompts had {read:g} tokens, not {prompt}")
        missing = {"timing_s/update_actor", "timing_s/update_critic"} - set(step)
        if missing:
            raise RuntimeError(f"not measured: {', '.join(sorted(missing))}")


def finished(metrics: Path) -> list[dict[str, float]]:
    """Its whole lines: a run that is ended may leave part of one, or no file."""
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def token_counts(steps: list[dict[str, float]], rows: int) -> list[dict[str, float]]:
    """What each step really read and wrote."""
    return [
        {
            "step": step["step"],
            "rows": rows,
            "mean prompt": (step["tokens"] - step["generated_tokens"]) / rows,
            "mean response": step["generated_tokens"] / rows,
            "longest response": step["response_length/max"],
            "tokens": step["tokens"],
        }
        for step in steps
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("gpu_ppo", description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-7b", help="a published architecture")
    parser.add_argument("--layers", type=int, default=0, help="of them; 0: all")
    parser.add_argument("--vocab", type=int, default=0, help="its vocabulary; 0: the shape's")
    parser.add_argument("--rows", type=int, default=64, help="responses per PPO step")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=2, help="PPO steps")
    parser.add_argument("--limit-s", type=float, default=460.0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="after --: --section.key VALUE")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = published(args.shape, layers=args.layers, vocabulary=args.vocab)
    with tempfile.TemporaryDirectory() as home:
        folder, started = Path(home), time.monotonic()
        words = write_job(folder, config, args.rows, args.prompt, device)
        torch.cuda.empty_cache()  # what drawing the weights took is for the run, another process
        lengths = {"sampling.max_new_tokens": args.new, "run.steps": args.steps}
        lengths |= {"ppo.prompts_per_step": args.rows, "ppo.minibatch_size": args.rows}
        words += [word for key, value in lengths.items() for word in (f"--{key}", str(value))]
        left = args.limit_s - (time.monotonic() - started)
        steps, timed_out = train(folder, [*words, *args.overrides], left)
    check_work(steps, args.rows, args.prompt)
    counts = token_counts(steps, args.rows)
    lines = [[f"{value:g}" for value in row.values()] for row in counts]
    print("\n".join(plain_lines(list(counts[0]), lines, 0)))
    report = {"machine": machine(device), "arguments": vars(args), "recipe": RECIPE.name}
    report |= {"timed_out": timed_out, "token_counts": counts, "steps": steps}
    write_json(args.json, report)
    if timed_out:
        print(f"cut short: {len(steps)} of {args.steps} steps in {args.limit_s:.0f} s")
    return int(timed_out)


if __name__ == "__main__":
    sys.exit(main())
