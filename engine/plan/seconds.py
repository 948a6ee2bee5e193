"""Seconds of each phase: the floor of the hardware over the share of it that is expected.

The floors count multiplications and bytes. The shares of the dense bf16 rate, in a forward and in
training, and of a decoder's roof are those of a PPO step of four 7B models on one H200
(docs/results/h200-ppo-7b.json); elsewhere they are estimates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gearshift.engine.config.schema import OptimizerConfig
from gearshift.engine.gearbox.quantised import BYTES
from gearshift.engine.models.shapes import Shape
from gearshift.engine.plan.bytes import Zero, state_elements
from gearshift.engine.plan.hardware import Hardware
from gearshift.engine.zero.residence import Sleep, take_turns

SCORE_SHARE = 0.56
TRAIN_SHARE = 0.53
DECODE_SHARE = 0.47
LINK_SHARE = 0.7
ADAM_BYTES = 36  # read and written per element: gradient, master, moments, weight
HOST_BANDWIDTH = 150e9  # bytes per second of a node's memory, shared by its ranks
UNMERGED = 1.3  # of generation, where adapters are beside the weights: two more products a layer
DISK = 2e9  # bytes per second of a node's disk
# DeepSpeed's and autograd's Python for a decoder layer, forward and backward, by ZeRO stage: of 28
# layers on CPU, without a product of any size; three quarters are backward.
LAYER_S = {0: 0.008, 1: 0.009, 2: 0.009, 3: 0.021}
ALL_REDUCE_S = 15e-6  # of a decode step's activations: latency, not bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """One rank's part of a PPO step at full lengths. rows: sequences."""

    rows: int
    prompt: int
    response: int
    score_pieces: int  # gradient-free forwards
    train_pieces: int = 1  # forwards and backwards of an epoch
    epochs: int = 1
    updates: int = 1  # optimizer steps

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def forward_flops(shape: Shape, work: Work) -> tuple[float, float]:
    """(of body and causal attention, of the head on response tokens)."""
    attention = 2 * shape.heads * shape.head_dim * shape.layers * work.length**2 * work.rows
    body = 2 * shape.body * work.tokens + attention
    return body, 2.0 * shape.head * work.rows * work.response


def fetch_seconds(shape: Shape, zero: Zero, hw: Hardware) -> float:
    """To bring every weight of a ZeRO-3 model to a rank once."""
    if zero.stage < 3:
        return 0.0
    whole = zero.size * shape.total
    seconds = whole * (hw.world - 1) / hw.world / (hw.link * LINK_SHARE)
    if zero.parameters != "gpu":
        seconds += whole / hw.world / (hw.gpu.host * LINK_SHARE)
    return seconds


def score_seconds(
    shape: Shape, zero: Zero, work: Work, hw: Hardware, *, streamed: bool = False
) -> float:
    """One forward over all rows; weights are fetched while the layer before computes: for each
    micro-batch, or once for all where they are streamed."""
    compute = sum(forward_flops(shape, work)) / (hw.gpu.flops * SCORE_SHARE)
    python = work.score_pieces * shape.layers * LAYER_S[zero.stage] / 4
    if not streamed:
        return max(compute, python, work.score_pieces * fetch_seconds(shape, zero, hw))
    disk = zero.size * shape.total / hw.nodes / DISK if zero.parameters == "nvme" else 0.0
    return max(compute, fetch_seconds(shape, zero, hw), disk)


def train_seconds(shape: Shape, zero: Zero, work: Work, hw: Hardware, recompute: bool) -> float:
    """All epochs of forwards, backwards and optimizer steps."""
    body, head = forward_flops(shape, work)
    passes = (3 if shape.whole else 2) + recompute  # no gradients of frozen weights
    compute = (passes * body + (3 if shape.head_trains else 2) * head) / (
        hw.gpu.flops * TRAIN_SHARE
    )
    reduced = 4 * shape.updated / (hw.link * LINK_SHARE) if hw.world > 1 else 0.0
    moved = work.train_pieces * (2 * fetch_seconds(shape, zero, hw) + reduced)
    python = work.train_pieces * shape.layers * LAYER_S[zero.stage]
    return work.epochs * max(compute, python, moved) + work.updates * _adam(shape, zero, hw)


def _adam(shape: Shape, zero: Zero, hw: Hardware) -> float:
    part = state_elements(shape, zero, hw.world)
    if zero.optimizer == "gpu":
        return ADAM_BYTES * part / hw.gpu.bandwidth
    on_host = ADAM_BYTES * part * hw.gpus_per_node / HOST_BANDWIDTH
    return on_host + (4 + zero.size) * part / (hw.gpu.host * LINK_SHARE)


def generate_seconds(
    shape: Shape,
    zero: Zero,
    work: Work,
    hw: Hardware,
    tp: int,
    slots: int,
    *,
    dequantises: bool = False,
) -> float:
    """Shift, prefill and decoding of `work.rows` x tp sequences by a TP group with `slots`.

    dequantises: at each token a weight in 4 bit is read, written whole and read again, as it is for
    more than a few sequences.
    """
    gpu, sequences = hw.gpu, work.rows * tp
    weights = (shape.body + (shape.head or shape.embedding)) / tp
    prefill = 2 * shape.body * work.rows * work.prompt / (gpu.flops * SCORE_SHARE)
    together = min(slots, sequences)
    read = zero.size * weights
    if dequantises:
        read += (BYTES + zero.size) * sum(shape.packed)
    product = max(2 * weights * together / gpu.flops, read / gpu.bandwidth)
    context = work.prompt + work.response / 2
    cache = together * context * shape.kv_bytes_per_token(tp, zero.size) / gpu.bandwidth
    reduces = 2 * shape.layers * ALL_REDUCE_S if tp > 1 else 0.0
    step = (product + cache) / DECODE_SHARE + reduces
    steps = work.response * sequences / together
    shift = 0.0
    if hw.world > 1 and zero.stage == 3:
        shift = zero.size * shape.total / tp / (hw.link * LINK_SHARE)
    return shift + prefill + steps * step


def swap_seconds(
    sizes: dict[str, float], sleeps: Mapping[str, Sleep], hw: Hardware, *, joint: bool
) -> float:
    """Sleeping states on their way in one step, both directions at once.

    sizes: bytes of each trained role's optimizer. With `exchange` of both they pass one another
    once, with that of one role twice; with `always` each comes alone, and one leaves while the next
    comes.
    """
    rate = hw.gpu.host * LINK_SHARE
    moving = {role: size for role, size in sizes.items() if sleeps[role] in ("exchange", "always")}
    if len(sizes) == 1:
        return 2 * sum(size for r, size in moving.items() if sleeps[r] == "always") / rate
    most = max(moving.values(), default=0.0)
    if "always" in sleeps.values():
        return (sum(moving.values()) + most) / rate
    return (1 if take_turns(sleeps, joint=joint) else 2) * most / rate


def useful_flops(shape: Shape, work: Work, *, scored: int, trained: bool) -> float:
    """Multiplications and additions that a role's forwards and backwards need; recomputed ones are
    not counted. scored: gradient-free passes over all rows."""
    once = sum(forward_flops(shape, work))
    return once * (scored + ((3 if shape.whole else 2) * work.epochs if trained else 0))


def saved_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes per parameter of a checkpoint: the fp32 master and two moments."""
    narrow = optimizer.name == "split_adamw" and optimizer.moments == "bf16"
    return 4 + (4 if narrow else 8)


def save_seconds(shape: Shape, optimizer: OptimizerConfig, hw: Hardware) -> float:
    """A role's checkpoint, written by all nodes."""
    return saved_bytes(optimizer) * shape.updated / hw.nodes / DISK
