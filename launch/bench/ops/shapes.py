"""The sizes that `gearshift bench kernels` knows, and the least each op must move and compute."""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from gearshift.engine.config.errors import ConfigError
from gearshift.kernels.checks.case import Size


def _model(hidden: int, vocab: int, heads: tuple[int, int, int]) -> Size:
    """8192 tokens through the head; per-token ops on 512 responses of 1024 tokens."""
    return Size(rows=8192, hidden=hidden, vocab=vocab, batch=512, response=1024, heads=heads)


SHAPES = {
    "llama3-8b": _model(4096, 128256, (32, 8, 128)),
    "qwen2.5-7b": _model(3584, 152064, (28, 4, 128)),
    "qwen2.5-0.5b": _model(896, 151936, (14, 2, 64)),
    "tiny": Size(
        rows=256, hidden=64, vocab=4096, batch=16, response=128, heads=(4, 2, 64), context=128
    ),
}
CPU_FLOPS = 1e12  # of one pass through the head: beyond, a run on a CPU takes many minutes


def parse_shape(text: str, device: torch.device) -> Size:
    """A name of SHAPES, or NxHxV: N tokens, hidden size H, vocabulary V.

    Raises ValueError for anything else, and for sizes that a CPU is too slow for.
    """
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if text in SHAPES:
        size = SHAPES[text]
    elif numbers and all(map(int, numbers.groups())):
        rows, hidden, vocab = map(int, numbers.groups())
        batch = min(512, rows)
        size = Size(rows=rows, hidden=hidden, vocab=vocab, batch=batch, response=min(1024, rows))
    else:
        raise ConfigError(f"--shape {text}", f"give NxHxV, or one of {', '.join(SHAPES)}")
    if device.type == "cpu" and 2 * size.rows * size.hidden * size.vocab > CPU_FLOPS:
        raise ConfigError(f"--shape {text}", "too large without a GPU", "use tiny or a small NxHxV")
    return dataclasses.replace(size, plain=True)


class Floor(NamedTuple):
    """No implementation moves fewer bytes through memory or does fewer operations."""

    bytes: float
    flops: float

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The larger of the two times at the rates measured."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def _head(size: Size, item: int, gemms: int, gradients: bool) -> Floor:
    """hidden and weight read once; with gradients, each of theirs written once. 2NHV operations a
    GEMM: one makes the logits, two the gradients (without making the logits twice)."""
    n, h, v = size.rows, size.hidden, size.vocab
    matrices = (n * h + v * h) * item * (2 if gradients else 1)
    columns = n * (8 + 4 * (3 + 2)) if gradients else n * (8 + 4 * 2)
    return Floor(matrices + columns, gemms * 2 * n * h * v)


def _logprob(size: Size, item: int) -> Floor:
    """Each logit read once: subtract, scale, exponential, two multiply-adds."""
    logits = size.rows * size.vocab
    return Floor(logits * item + size.rows * 16, 7 * logits)


def _sample(size: Size, item: int) -> Floor:
    """Each logit read once: scale, exponential, sum; seed, position, token and log-prob per row."""
    logits = size.batch * size.vocab
    return Floor(logits * item + size.batch * 28, 4 * logits)


def _attention(size: Size, item: int) -> Floor:
    """Keys and values of every cached token read once for all query heads that share them."""
    query_heads, heads, width = size.heads
    tokens = size.batch * size.context
    cache = tokens * heads * 2 * width * item
    rows = size.batch * query_heads * 2 * width * item
    return Floor(cache + rows + tokens // 32 * 4, 4 * tokens * query_heads * width)


def _per_token(read: int, written: int, operations: int) -> Callable[[Size, int], Floor]:
    def floor(size: Size, item: int) -> Floor:
        tokens = size.batch * size.response
        return Floor(tokens * (read + written), tokens * operations)

    return floor


def _adamw(moment: int) -> Callable[[Size, int], Floor]:
    """The case copies its inputs, since a step changes them: two passes, then one of the step."""

    def floor(size: Size, item: int) -> Floor:
        parameters = size.rows * size.vocab
        state = 4 + 2 * moment  # weight, low bits and both moments
        return Floor(parameters * (3 * (state + item) + state), parameters * 15)

    return floor


# By case: (size, bytes of an element of logits, hidden states or cache) -> Floor.
FLOORS: dict[str, Callable[[Size, int], Floor]] = {
    "linear_logprob": lambda size, item: _head(size, item, 1, gradients=False),
    "linear_ppo_loss": lambda size, item: _head(size, item, 3, gradients=True),
    "linear_ppo_loss.bonus": lambda size, item: _head(size, item, 3, gradients=True),
    "linear_cross_entropy": lambda size, item: _head(size, item, 3, gradients=True),
    "logprob_entropy": _logprob,
    # log-probs, reference's, values in float32 and a mask; rewards, advantages, returns and KL out
    "kl_reward_gae": _per_token(3 * 4 + 1, 4 * 4, 14),
    "whiten": _per_token(4 + 1, 4, 8),
    # values, old values, returns, weights; the slope and whether it was clipped
    "value_loss": _per_token(4 * 4, 4 + 1, 12),
    "sample_tokens": _sample,
    "sample_tokens.top_p": _sample,
    "sample_tokens.greedy": _sample,
    "paged_attention": _attention,
    "adamw_split_step.fp32": _adamw(4),
    "adamw_split_step.bf16": _adamw(2),
}
