"""Samples from a model: `gearshift generate --model runs/demo/export/actor "The film is"`."""

import argparse
import sys

from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import ModelConfig, RolloutConfig, SamplingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face directory, hub id or .gguf")
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
    sampling = SamplingConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("prompts", "give a text, or lines on standard input")
    prompts = [prompt for prompt in prompts for _ in range(args.samples)]
    for prompt, response in zip(prompts, respond(args, prompts, sampling), strict=True):
        print(f"{prompt} -> {response}")
    return 0


def respond(args: argparse.Namespace, prompts: list[str], sampling: SamplingConfig) -> list[str]:
    """One decoded response per prompt."""
    import torch

    from gearshift.engine.models.load import load_model, load_tokenizer
    from gearshift.engine.rollout.engine import RolloutEngine
    from gearshift.engine.rollout.responses import end_token_ids, sequence_seed

    distributed.forbid_cudnn_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(path=args.model)
    bf16 = {"enabled": device.type == "cuda"}
    tokenizer = load_tokenizer(config)
    model = load_model(config, "policy", {"zero_optimization": {"stage": 0}, "bf16": bf16})
    ends = end_token_ids(tokenizer, model)
    engine = RolloutEngine(
        model.to(device),
        RolloutConfig(),
        eos_token_ids=ends,
        pad_token_id=ends[0],
        device=device,
    )
    ids = [_encode(tokenizer, prompt, args.chat) for prompt in prompts]
    seeds = [sequence_seed(args.seed, i) for i in range(len(ids))]
    completions = engine.generate(ids, sampling, seeds)
    return [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]


def _encode(tokenizer, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise ConfigError("--chat", "the model's tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
