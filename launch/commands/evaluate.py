"""Evaluate a model on held-out prompts, without training it.

Takes a run's YAML: its `eval` says on which prompts, how they are answered and who judges; the
figures are those of an evaluation in the loop. The model is a Hugging Face directory, a hub id, a
.gguf, a directory of peft, or a checkpoint's folder step_NNNNNN; actor.path where none is named.
One process, on a GPU where there is one. Further arguments go to the configuration, as
--eval.pass_at [1,8].
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gearshift.engine.batch import PromptBatch, Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.config import check as config_check
from gearshift.engine.config import load as config_load
from gearshift.engine.config.errors import refuse_if, told_as
from gearshift.engine.config.schema import Config, LoraConfig, SamplingConfig
from gearshift.engine.data.heldout import read_held_out
from gearshift.engine.evaluate import Evaluation, check_columns
from gearshift.engine.gearbox.adapters import fold
from gearshift.engine.models.cast import Part, cast
from gearshift.engine.rewards.total import RewardSum
from gearshift.engine.rollout.context import positions
from gearshift.engine.rollout.responses import engine_alone, generate_responses
from gearshift.launch.commands.export import read_state, restored, saved_config, unpartitioned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(overrides=[])  # what is not named below, as --section.key value
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument("--model", metavar="MODEL", help="what to evaluate; default: actor.path")
    parser.add_argument("--out", type=Path, metavar="FILE", help="figures and samples, as JSON")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A policy that only answers."""

    engine: Any
    tokenizer: Any
    device: torch.device
    seed: int

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, progress: Any) -> Rollout:
        """One response per row."""
        return generate_responses(self.engine, prompts, sampling, self.seed, None, progress)


def main(args: argparse.Namespace) -> int:
    """Prints the figures."""
    with told_as(dict.fromkeys(["actor.path", "actor.lora.base"], "--model") if args.model else {}):
        return evaluate(args)


def evaluate(args: argparse.Namespace) -> int:
    config = config_load.load(args.config, args.overrides).config
    config_check.check(config)
    judges = config.eval.rewards or config.rewards
    problem, fix = "nothing to evaluate on", "as --eval.sources.0.path test.jsonl"
    refuse_if(not config.eval.sources, "eval.sources", problem, fix, "[]")
    models = [judge.name for judge in judges if judge.kind == "model"]
    problem = f"reward models, as {models}, score in a run alone"
    refuse_if(models, "eval.rewards", problem, "give functions or endpoints")
    part, load = chosen(config, args.model)
    packed = part.lora is not None and part.lora.settings.load_in_4bit
    problem, fix = "such a model is not evaluated as it is", "give --model what it exported"
    refuse_if(packed, "actor.lora.load_in_4bit", problem, fix, "true")
    check_context(config, part)
    rewards = RewardSum(judges, config.guards)
    ids = part.hf_config.vocab_size
    sets = read_held_out(config.eval, config.data, part.tokenizer, ids)
    check_columns(sets, rewards)
    actor = standing(config, part, load())
    figures, samples = Evaluation(config, actor, sets, rewards).run()
    figures = {name: value for name, value in figures.items() if name.startswith("eval/")}
    print("\n".join(f"{name} {value:.6g}" for name, value in figures.items()))
    if args.out:
        found = {"model": args.model or config.actor.path, "figures": figures, "samples": samples}
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def chosen(config: Config, model: str | None) -> tuple[Part, Callable[[], nn.Module]]:
    """The policy to evaluate, and what loads it: whole, in float32."""
    seed, folder = config.run.seed, Path(model or "")
    if model and (folder / "state.json").exists():
        state = read_state(folder)
        saved = cast(saved_config(state))["actor"]
        return saved, lambda: restored(folder, state, saved, seed)
    actor = config.actor
    if model:
        whole = LoraConfig(base=actor.lora.base)  # adapters in a directory have their own settings
        actor = replace(actor, path=model, revision=None, lora=whole)
    part = cast(replace(config, actor=actor))["actor"]
    return part, lambda: unpartitioned(part, seed)[0]


def check_context(config: Config, part: Part) -> None:
    """Raises ConfigError where the longest prompt and response are more than the model reads."""
    limit, prompt = positions(part.hf_config), config.data.max_prompt_tokens
    longest = config.eval.sampling_of(config.sampling).max_new_tokens
    problem = f"with data.max_prompt_tokens={prompt} more than the model's context of {limit}"
    wrong = limit is not None and prompt + longest > limit
    refuse_if(wrong, "eval.sampling.max_new_tokens", problem, "lower either", longest)


def standing(config: Config, part: Part, model: nn.Module) -> Standing:
    """The model on its device, in the precision that its DeepSpeed JSON trains it in."""
    distributed.forbid_cudnn_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if part.lora:
        fold(model)
    if part.settings.get("bf16", {}).get("enabled"):
        for parameter in model.parameters():  # buffers, as of rotary embeddings, stay float32
            parameter.data = parameter.data.bfloat16()
    engine = engine_alone(model, config.rollout, part.tokenizer, device)
    return Standing(engine=engine, tokenizer=part.tokenizer, device=device, seed=config.run.seed)
