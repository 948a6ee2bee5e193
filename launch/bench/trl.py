"""The peer of `gearshift bench step --vs-trl`: PPO steps of TRL's experimental trainer.

    python -m gearshift.launch.bench.trl --check         prints why it cannot run; nothing if it can
    python -m gearshift.launch.bench.trl FOLDER OUT      runs bench_versus.py's task, writes JSON

The interpreter needs gearshift and trl; 1.12.0 is the last release of trl with a PPO trainer.
"""

import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

PEER = "trl 1.12.0"


def main(argv: list[str]) -> int:
    if argv == ["--check"]:
        print(missing() or "", end="")
        return 0
    folder, out = map(Path, argv)
    Path(out).write_text(json.dumps(measure(folder)))
    return 0


def missing() -> str | None:
    """What to install, or None."""
    advice = f"pip install {PEER.replace(' ', '==')}"
    if importlib.util.find_spec("trl") is None:
        return f"trl is not installed; {advice}"
    if importlib.util.find_spec("trl.experimental.ppo") is None:
        return f"trl {version('trl')} has no PPO trainer; {advice}"
    return None


def measure(folder: Path) -> dict[str, Any]:
    """Builds the trainer, then runs one step to warm up and the task's steps."""
    import torch

    from gearshift.engine.metrics import peak_memory, reset_peak_memory

    task = json.loads((folder / "task.json").read_text())
    device = torch.device("cpu")
    clock = _clock(device)
    trainer = _trainer(task, folder, clock)
    with torch.no_grad():
        trainer.policy_model(torch.arange(4, 7)[None])
    reset_peak_memory(device)
    built_gb = peak_memory(device)
    trainer.train()
    cpu, seconds, peaks = zip(*clock.steps[1:], strict=True)
    ended = sum(logs["val/num_eos_tokens"] for logs in clock.logs)
    assert ended == 0, "an end token was sampled: the sides did not do the same work"
    return {
        "version": version("trl"),
        "cpu_seconds": median(cpu),
        "cpu_seconds_of_each": cpu,
        "seconds": median(seconds),
        "peak_gb": median(peaks),
        "growth_gb": median(peaks) - built_gb,
        "generated_tokens": task["rows"] * task["response_tokens"],
    }


def _clock(device: Any) -> Any:
    """A callback with `steps`: (CPU seconds, seconds, peak GB) of each; and `logs`."""
    from transformers import TrainerCallback

    from gearshift.engine.metrics import peak_memory, reset_peak_memory

    class Clock(TrainerCallback):
        def __init__(self):
            self.steps, self.logs = [], []

        def on_train_begin(self, *_, **__):
            reset_peak_memory(device)
            self._begin = time.process_time(), time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            cpu, wall = self._begin
            seconds = time.process_time() - cpu, time.perf_counter() - wall
            self.steps.append((*seconds, peak_memory(device)))
            self.on_train_begin()

        def on_log(self, args, state, control, logs, **_):
            self.logs.append(logs)

    return Clock()


def _trainer(task: dict, folder: Path, clock: Any) -> Any:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
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
    sys.exit(main(sys.argv[1:]))
