"""Tiny random decoders of the families the rollout engine is tested on, and teacher forcing."""

import torch
import transformers
from torch import Tensor, nn

SMALL = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=160,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    # Wide enough that attention decides; the usual 0.02 leaves a bag of embeddings.
    initializer_range=0.18,
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40)

FAMILIES = {
    "Llama": {},
    "Qwen2": {},  # bias of query, key and value
    "Qwen3": dict(head_dim=12),  # norms of query and key; heads wider than hidden / heads
    "Mistral": dict(sliding_window=7),
    "Gemma2": dict(  # soft-capped scores and logits, alternating windows, scaled embeddings
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=6,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=20.0,
        attn_implementation="eager",  # transformers 5.17 would pick sdpa, which drops the softcap
    ),
    "Gemma3": dict(  # two rotary bases, five windowed layers to one full
        head_dim=16, query_pre_attn_scalar=16, sliding_window=6, num_hidden_layers=6
    ),
    "Phi3": {},  # fused query-key-value and gate-up
    "Qwen3Moe": dict(head_dim=12, **EXPERTS),
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "GptOss": dict(  # attention sinks, alternating windows
        head_dim=16,
        sliding_window=6,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.15,
    ),
    "GPT2": {},  # learned positions
}

# Rotary frequencies that another set replaces in rows of more than 64 tokens.
LONG = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[4.0, 5.0, 6.0, 7.0])
MOVING = {
    "dynamic": dict(
        family="Llama",
        max_position_embeddings=64,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4),
    ),
    "longrope": dict(
        family="Phi3",
        original_max_position_embeddings=64,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64, **LONG
        ),
    ),
}


def build(family: str, seed: int = 0, **changes) -> nn.Module:
    """A random fp32 model of `family` in eval mode, the same for the same seed."""
    names = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", None)}
    config_name, model_name = names.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config = getattr(transformers, config_name)(**SMALL | FAMILIES[family] | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_name or "GPT2LMHeadModel")(config)
        for name, parameter in model.named_parameters():
            if "sinks" in name or name.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
    return model.eval()


def make_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token ids from 3 to 130, so that neither padding nor an end token is among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def forced_logits(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """[R, V] fp32: the model's own logits before each response token, in one plain forward."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()
