"""Tiny real models and tokenizers on disk: what the tests train instead of doubles."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>"]


def tokenizer(vocab_size: int = 32, *, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token per word `w4`, `w5`, ...; ids 0 to 3 are pad, bos, eos, unk."""
    words = WORDS + [f"w{i}" for i in range(len(WORDS), vocab_size)]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token=pad,
    )


# Of a decoder of two layers with grouped KV heads.
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def llama_config(vocab_size: int = 32, **changes):
    """A Llama of that shape."""
    own = {"vocab_size": vocab_size, "max_position_embeddings": 128}
    own |= {"bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model("llama", **SHAPE | own | changes)


def save_policy(directory: Path, vocab_size: int = 32, seed: int = 0, **changes) -> Path:
    """A random causal LM with its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(llama_config(vocab_size, **changes))
    model.save_pretrained(directory)
    tokenizer(vocab_size).save_pretrained(directory)
    return directory


def save_reward(directory: Path, vocab_size: int = 32, seed: int = 1, **changes) -> Path:
    """A random reward model, a sequence classifier with one label, with its tokenizer."""
    torch.manual_seed(seed)
    config = llama_config(vocab_size, num_labels=1, **changes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    tokenizer(vocab_size).save_pretrained(directory)
    return directory
