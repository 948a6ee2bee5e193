"""Run on ranks: trains tiny models under ZeRO-3, generates from their shards, writes what it saw.

    deepspeed --num_accelerators W shift_on_ranks.py OUT TP[,TP] NODE_SIZE FAMILY[,FAMILY]

OUT/rank<r>.jsonl gets one object per family and TP size. The unsharded model is the judge.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers

from gearshift.engine.cluster import distributed
from gearshift.engine.config.assets import asset_path
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.gearbox.gearbox import Gearbox
from gearshift.engine.models.gguf import as_directory
from gearshift.engine.models.load import attention_implementation
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.zero.layout import partition

COMMON = dict(
    vocab_size=509,  # prime: no TP size divides it
    hidden_size=48,
    intermediate_size=66,  # 17 + 17 + 16 + 16 on four ranks
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    initializer_range=0.2,  # far from ties, so that greedy decoding compares
)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_9_3": ("Llama", dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)),
    "llama_mqa": ("Llama", dict(num_key_value_heads=1)),
    "llama_12_3": ("Llama", dict(num_attention_heads=12, num_key_value_heads=3)),
    "llama_tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama_bias": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "gemma2": ("Gemma2", dict(head_dim=12, sliding_window=5, query_pre_attn_scalar=12)),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", dict(num_local_experts=4, intermediate_size=40)),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=4, head_dim=12, **MOE)),
    "gpt_neox": ("GPTNeoX", dict(num_key_value_heads=4)),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {}),
    "cohere_norms": ("Cohere", dict(use_qk_norm=True)),
    "glm4": ("Glm4", dict(head_dim=12)),
    "granite": ("Granite", {}),
    "gemma3": ("Gemma3Text", dict(head_dim=12, sliding_window=5, query_pre_attn_scalar=12)),
    "smollm3": ("SmolLM3", {}),
}
BUDGET = 2**17  # 128 kB: below the 97 kB embedding at two ranks' staging, so it is cut inside


REAL = "smollm2"  # SmolLM2-135M with its own weights: needs `gearshift fetch smollm2`
REAL_BUDGET = 2**24  # 16 MB, the default on CPU
TEXTS = (  # for the real model: random ids put its logits, and their rounding, far from any use
    "The film is",
    "It was a dark night and the",
    "A long winded and stagy story that",
    "Once upon a time there was a",
    "My favourite director has always been",
    "The acting",
    "In the end, nothing matters because",
    "She opened the door and",
)


def build(family: str):
    """A tiny random model, or the real one; the same on every rank."""
    if family == REAL:
        folder = as_directory(asset_path(REAL))
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kind, changes = FAMILIES[family]
    config = getattr(transformers, kind + "Config")(**{**COMMON, **changes})
    # Gemma 2: some versions of transformers would drop its soft cap without a word.
    config._attn_implementation = attention_implementation("auto", config, torch.float32)
    causal = kind.removesuffix("Text") + "ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, causal)(config).float()


def train(model, lr: float, steps: int = 2):
    """A DeepSpeed engine after `steps` AdamW steps on rank-dependent data."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        ids = torch.randint(1, model.config.vocab_size, (2, 12), generator=draw)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    return engine


def full_copy(model, family: str):
    """The unsharded model with the trained weights."""
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        weights = {name: value.detach().clone() for name, value in parameters.items()}
    whole = build(family)
    whole.load_state_dict(weights, strict=False)
    return whole.eval(), weights


@torch.no_grad()
def greedy(model, ids, new_tokens: int = 6):
    for _ in range(new_tokens):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def draw_prompts(family: str, vocabulary: int, group: int) -> list[list[int]]:
    """Three prompts and one more per group, all of different lengths."""
    if family == REAL:
        tokenizer = transformers.AutoTokenizer.from_pretrained(as_directory(asset_path(REAL)))
        texts = [TEXTS[(3 * group + row) % len(TEXTS)] for row in range(3 + group)]
        return [tokenizer(text).input_ids for text in texts]
    draw = torch.Generator().manual_seed(200 + group)
    lengths = [3 + (5 * row + 7 * group) % 11 for row in range(3 + group)]
    return [torch.randint(1, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def responses(gearbox, module, whole, family: str) -> dict:
    """Greedy responses of this rank's group from its shards, held to the unsharded `generate`."""
    vocabulary, eos = whole.config.vocab_size, whole.config.eos_token_id
    prompts = draw_prompts(family, vocabulary, gearbox.dp_index)
    limits = [4 + (7 * row) % 13 for row in range(len(prompts))]
    engine = RolloutEngine(
        module,
        RolloutConfig(block_size=4, max_sequences=3),  # fewer than there are: some join later
        eos_token_ids=eos if isinstance(eos, list) else [eos],
        pad_token_id=0,
        group=gearbox.tp_group,
    )
    greedy = SamplingConfig(max_new_tokens=max(limits), temperature=0)
    ours = engine.generate(prompts, greedy, [0] * len(prompts), limits=limits)
    theirs = [generate(whole, *pair) for pair in zip(prompts, limits, strict=True)]
    errors = [
        (torch.tensor(one.logprobs) - logprobs).abs().max().item()
        for one, (_, logprobs) in zip(ours, theirs, strict=True)
    ]
    same = [one.token_ids == ids for one, (ids, _) in zip(ours, theirs, strict=True)]
    return {"tokens_equal": all(same), "logprob_error": max(errors)}


def generate(model, prompt: list[int], limit: int):
    """transformers' own greedy `generate`: (token ids, their log-probs [limit] float64).

    Its fp32 logits, normalised in float64: PyTorch's fp32 log_softmax is off by 1.7e-5 on CPU where
    the vocabulary is SmolLM2's, three times what the rounding of the logits makes.
    """
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=limit, do_sample=False, output_logits=True, return_dict_in_generate=True
        ),
    )
    tokens = out.sequences[0, len(prompt) :]
    logprobs = torch.cat(out.logits).double().log_softmax(-1)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0]


def wrong_elements(gearbox, sources: dict[int, str], weights) -> int:
    """Elements of the shards that differ from the same slice of the gathered weights."""
    wrong = 0
    for shard in gearbox._shards:
        whole, spec = weights[sources[id(shard.source)]], shard.spec
        rows = [torch.arange(start, stop) for start, stop in spec.intervals]
        expected = whole.index_select(spec.dim, torch.cat(rows))
        wrong += int((expected != shard.parameter).sum())
    return wrong


@torch.no_grad()
def check(engine, model, whole, weights, family: str, tp: int) -> dict:
    """Figures of both routes at one TP size."""
    sources = {id(parameter): name for name, parameter in model.named_parameters()}
    draw = torch.Generator().manual_seed(100 + dist.get_rank() // tp)  # prompts differ by group
    ids = torch.randint(1, model.config.vocab_size, (2, 9), generator=draw)
    want = whole(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    budget = REAL_BUDGET if family == REAL else BUDGET
    config = RolloutConfig(tp=tp, shift_bucket_mb=budget / 2**20)
    seen = {"tp": tp, "minimum": 0}
    for route in ("all_gather", "exact"):
        gearbox = Gearbox(engine, model, config, device=torch.device("cpu"), route=route)
        with gearbox.generation() as module:
            got = module(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            seen[route] = {
                "logprob_error": (got - want).abs().max().item(),
                "greedy_equal": torch.equal(greedy(module, ids), greedy(whole, ids)),
                "wrong_elements": wrong_elements(gearbox, sources, weights),
                "training_flags": sum(child.training for child in module.modules()),
                "received": gearbox.stats.bytes_received,
                "staging": gearbox.stats.peak_staging_bytes,
                "shard_bytes": gearbox.stats.shard_bytes,
            }
            if route == "exact":
                seen["responses"] = responses(gearbox, module, whole, family)
        seen["minimum"] = gearbox.stats.bytes_minimum
        seen["left"] = sum(parameter.numel() for parameter in module.parameters())
    seen["bound"] = missing_bytes(gearbox)
    seen["model_bytes"] = sum(value.nbytes for value in weights.values())
    return seen


def missing_bytes(gearbox) -> int:
    """Shard bytes that no partition of this rank holds, counted by marking every element."""
    missing = 0
    for shard in gearbox._shards:
        spec, count = shard.spec, partition(shard.source).numel()
        mine = torch.zeros(spec.numel, dtype=torch.bool)
        mine[dist.get_rank() * count : (dist.get_rank() + 1) * count] = True
        rows = torch.cat([torch.arange(start, stop) for start, stop in spec.intervals])
        kept = mine.view(spec.shape).index_select(spec.dim, rows)
        missing += int((~kept).sum()) * shard.source.element_size()
    return missing


def refusals(engine, model) -> dict:
    """Messages for what cannot be done."""

    def message(tp: int, candidate) -> str:
        try:
            Gearbox(engine, candidate, RolloutConfig(tp=tp), device=torch.device("cpu"))
        except ValueError as error:
            return str(error)
        return ""

    one_head = {**COMMON, "num_attention_heads": 1, "num_key_value_heads": 1}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**one_head))
    return {"divide": message(3, model), "heads": message(2, llama), "plan": message(2, gpt2)}


def main(out: str, sizes: str, node_size: str, families: str) -> None:
    distributed.start(threads=1)
    os.environ["LOCAL_WORLD_SIZE"] = node_size
    with Path(out, f"rank{dist.get_rank()}.jsonl").open("w") as log:
        for family in families.split(","):
            model = build(family)
            engine = train(model, lr=1e-5 if family == REAL else 1e-2)
            whole, weights = full_copy(model, family)
            for tp in map(int, sizes.split(",")):
                seen = check(engine, model, whole, weights, family, tp)
                print(json.dumps({"family": family, **seen}), file=log, flush=True)
        print(json.dumps({"family": "refusals", **refusals(engine, model)}), file=log)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
