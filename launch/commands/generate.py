"""Samples from a model: `gearshift generate --model runs/demo/export/actor "The film is"`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError, refuse_if, told_as
from gearshift.engine.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    SamplingConfig,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hugging Face directory, hub id or .gguf")
    parser.add_argument("--adapter", help="directory of peft; without --model on the base it names")
    parser.add_argument("--chat", action="store_true", help="wrap each prompt as a user message")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: off")
    parser.add_argument("--samples", type=int, default=1, help="responses per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("prompts", nargs="*", help="texts; none: one per line of standard input")


def main(args: argparse.Namespace) -> int:
    """Prints `prompt -> response` for every sample."""
    keys = {key: f"--{key.replace('_', '-')}" for key in vars(args) if key != "prompts"}
    keys |= dict.fromkeys(["path", "lora.base"], "--model" if args.model else "--adapter")
    with told_as(keys):
        for prompt, response in answered(args):
            print(f"{prompt} -> {response}")
    return 0


def answered(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(prompt, response) of every sample."""
    sampling = SamplingConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    refuse_if(not (args.model or args.adapter), "--model", "give a model, or --adapter")
    refuse_if(args.samples < 1, "--samples", "must be at least 1", value=args.samples)
    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    refuse_if(not prompts, "prompts", "give a text, or lines on standard input")
    prompts = [prompt for prompt in prompts for _ in range(args.samples)]
    return list(zip(prompts, respond(args, prompts, sampling), strict=True))


def adapter_of(folder: str, model: str | None) -> Any:
    """The adapters in a directory of peft. model: what they sit on; None: the base it names."""
    from gearshift.engine.models import lora
    from gearshift.engine.models.files import ADAPTER_CONFIG, is_adapter

    path, settings = Path(folder).expanduser(), LoraConfig(base=model)
    refuse_if(not is_adapter(folder), "--adapter", f"no {ADAPTER_CONFIG}", value=repr(folder))
    base = lora.base_of(path, settings)
    return lora.Lora(settings=settings, base=base, revision=None, task="CAUSAL_LM", folder=path)


def respond(args: argparse.Namespace, prompts: list[str], sampling: SamplingConfig) -> list[str]:
    """One decoded response per prompt."""
    import torch

    from gearshift.engine.data.prompts import PromptEncoder
    from gearshift.engine.gearbox.adapters import fold
    from gearshift.engine.models import lora
    from gearshift.engine.models.cast import is_decoder
    from gearshift.engine.models.files import is_adapter
    from gearshift.engine.models.load import load_config, load_model, load_tokenizer
    from gearshift.engine.rollout.context import positions
    from gearshift.engine.rollout.responses import engine_alone, sequence_seed

    distributed.forbid_cudnn_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = args.adapter and adapter_of(args.adapter, args.model)
    config = ModelConfig(path=adapter.base if adapter else args.model)
    bf16 = {"enabled": device.type == "cuda"}
    fix = f"give it as --adapter {args.model}, or take adapter_config.json out"
    ignored, problem = not adapter and is_adapter(args.model), "holds adapters"
    refuse_if(ignored, "--model", problem, fix, repr(args.model))
    hf_config = load_config(config, "policy")
    reads_on = not (is_decoder(hf_config) or getattr(hf_config, "is_decoder", False))
    problem = f"{hf_config.model_type} reads what follows a token, too: it writes no text"
    refuse_if(reads_on, "--model", problem, "choose a decoder", repr(config.path))
    tokenizer, limit = load_tokenizer(config), positions(hf_config)
    if args.chat and not tokenizer.chat_template:
        raise ConfigError("--chat", "the model's tokenizer has no chat template")
    data = DataConfig(chat_template="always" if args.chat else "auto")
    encoder = PromptEncoder(data, tokenizer, hf_config.vocab_size)
    ids = [encoder.encode(encoder.read({"prompt": prompt}, "prompt")) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        refuse_if(not tokens, "prompts", "the tokenizer makes no token of it", value=repr(prompt))
        problem = f"a prompt has {len(tokens)} tokens and the model {limit} positions"
        refuse_if(limit is not None and len(tokens) >= limit, "prompts", problem, "shorten it")
        long = limit is not None and len(tokens) + args.max_new_tokens > limit
        refuse_if(long, "--max-new-tokens", problem, "lower it", args.max_new_tokens)
    settings = {"zero_optimization": {"stage": 0}, "bf16": bf16}
    model = load_model(config, "policy", settings)
    if adapter:
        lora.adapt(model, adapter, settings, seed=0)
        fold(model)
    engine = engine_alone(model, RolloutConfig(), tokenizer, device)
    seeds = [sequence_seed(args.seed, i) for i in range(len(ids))]
    completions = engine.generate(ids, sampling, seeds)
    return [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
