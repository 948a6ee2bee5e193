"""A tiny random checkpoint of any causal-LM family of transformers, for the page of families."""

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = 64
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# What configurations call their sizes, the first that matches the whole name: nothing gets larger.
SIZES = {
    r"index_n_heads": 32,  # where all heads of a few say no, scores are equal: any choice is right
    r"index_topk": 6,
    r"vocab_size|.*vocab_size(_per.*)?": VOCABULARY,
    r"mamba_(n|num)_heads|mamba_d_head|mamba_head_dim": 8,
    r"mamba_d_ssm": 64,
    r".*(num_key_value_heads|num_kv_heads|kv_heads)": 2,
    r".*(num|n)_.*heads?|n_head|.*attention_heads|num_heads": 4,
    r".*(num_hidden_layers|num_layers|n_layers?|n_layer|layers)|num_layers_per_stack": 2,
    r".*lora_rank|.*lora_dim|time_step_rank|.*_rank": 16,
    r".*head_dim|.*head_size|dim_head|d_kv|query_pre_attn_scalar": 8,
    r".*experts_per_tok(en)?|.*top_?k|moe_k": 2,
    r".*(num|n).*experts|.*num_experts": 4,
    r"(n|topk|num).*groups?": 1,
    r".*(intermediate|inner|ffn|ffw|mlp|feed_forward).*(size|dim|hidden)|n_inner|dff|.*dim_ff": 64,
    r".*(max|n)_(position|source|target|ctx|seq).*|n_positions|n_ctx|max_.*len.*|seq_length": 128,
    r".*state_size|.*d_state": 8,
    r".*chunk_size.*|.*window.*|.*block_size": 16,
    r".*hidden_size.*|d_model|n_embd|.*embed.*(dim|size)|dim|.*width|hidden_dim|.*_dim": 32,
    r"nemo_conv_channels": 32,
    r"num_blocks": 2,
    r"image_size": 28,
    r"patch_size": 14,
}
# Where shrinking alone makes no model, or leaves a kind of layer out.
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gptj": {"rotary_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlnet": {"d_head": 8},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_ngroups": 1,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "dots3_note": {"audio_config": {"adapter_input_size": 32}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}


def shrunk(kind: type, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of a configuration class that make a tiny model. given: exceptions.

    One layer of each sort, by what configurations list layer by layer, and no fewer than two.
    """
    default = kind()
    small: dict[str, Any] = ENDS if hasattr(default, "vocab_size") else {}
    small = dict(small)
    count = getattr(default, "num_hidden_layers", None)
    by_layer = {n: v for n, v in vars(default).items() if isinstance(v, list) and len(v) == count}
    sorts = {
        str(sort): i for i, sort in reversed(list(enumerate(zip(*by_layer.values(), strict=True))))
    }
    layers = sorted(set(sorts.values()) | {0, 1})[:5]
    for name, value in vars(default).items():
        own = (given or {}).get(name)
        if name in getattr(default, "sub_configs", {}) and isinstance(value, PreTrainedConfig):
            small[name] = type(value)(**shrunk(type(value), own))
        elif name in by_layer:
            small[name] = [_size(name, value[i]) for i in layers]
        elif type(value) is int and name not in small:
            alike = "key_value" in name and value == vars(default).get("num_attention_heads")
            small[name] = _size("num_heads" if alike else name, value)
    if "is_decoder" in vars(default):
        small["is_decoder"] = True
    if count and by_layer:
        small["num_hidden_layers"] = len(layers)
    listed = [len(v) for n, v in (given or {}).items() if n in by_layer]
    if listed:
        small["num_hidden_layers"] = listed[0]
    nested = getattr(default, "sub_configs", {})
    return small | {name: value for name, value in (given or {}).items() if name not in nested}


def _size(name: str, value: Any) -> Any:
    """The tiny value of a size; whatever else as it is."""
    size = next((n for pattern, n in SIZES.items() if re.fullmatch(pattern, name)), None)
    return min(size, value) if type(value) is int and size is not None else value


def make(family: str) -> int:
    """Writes policy/, a tiny random checkpoint, and tokenizer/ into the current folder."""
    config = CONFIG_MAPPING[family](**shrunk(CONFIG_MAPPING[family], EXCEPTIONS.get(family)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for parameter in model.parameters():  # what is alike could change places unnoticed
        spread = float(parameter.detach().std()) if parameter.numel() > 1 else 0.0
        if spread == 0:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.ndim > 1 and spread < 0.15:
            parameter.data *= 0.15 / spread
        if parameter.ndim > 1:  # a padding token's, which is sampled here as any other
            dead = ~parameter.detach().flatten(1).any(1)
            parameter.data[dead] = 0.15 * torch.randn_like(parameter.data[dead])
    model.save_pretrained("policy")
    tokenizer().save_pretrained("tokenizer")
    return 0


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of w3, w4, ..."""
    words = ["<pad>", "<bos>", "<eos>"] + [f"w{i}" for i in range(3, VOCABULARY)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **ends)
