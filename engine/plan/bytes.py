"""Bytes of one role: what DeepSpeed keeps of a model, and what a forward and a backward add.

States follow DeepSpeed 0.19.8 as the JSON files configure it, and are checked against the tensors
of real runs; activations follow transformers' modules as they are, with SDPA.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from gearshift.engine.config.deepspeed import offloaded
from gearshift.engine.models.shapes import Shape
from gearshift.engine.rollout.linear import NARROW
from gearshift.engine.streaming.store import SLOTS
from gearshift.kernels.head.projection import CUDA_LOGITS_BYTES


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What the planner reads of a DeepSpeed JSON."""

    stage: int
    size: int  # bytes of a weight
    accumulation: int  # bytes of an accumulated gradient
    master: int  # bytes of a weight as the optimizer sees it
    communication: int  # bytes of a gradient on its way
    parameters: str  # "gpu", "cpu" or "nvme"
    optimizer: str
    reduce_bucket: float
    prefetch: float
    max_live: float
    persistence: float
    sub_group: float
    fused: bool  # RMSNorm, RoPE and SwiGLU are single kernels
    nvme_host: float  # elements of DeepSpeed's buffers for trained weights on NVMe

    @classmethod
    def of(cls, settings: dict[str, Any], *, fused: bool = False) -> "Zero":
        zero = settings["zero_optimization"]
        size = 2 if settings.get("bf16", {}).get("enabled") else 4
        wanted = settings.get("data_types", {}).get("grad_accum_dtype")
        own_dtype = settings.get("bf16", {}).get("bf16_master_weights_and_grads")
        parameters = zero.get("offload_param") or {}
        buffers = parameters.get("buffer_count", 5) * parameters.get("buffer_size", 1e8)
        return cls(
            stage=zero["stage"],
            size=size,
            accumulation={"fp32": 4, "bf16": 2, None: size}[wanted],
            master=2 if own_dtype else 4,
            communication=4 if settings.get("communication_data_type") == "fp32" else size,
            parameters=offloaded(settings, "param") or "gpu",
            optimizer=offloaded(settings, "optimizer") or "gpu",
            reduce_bucket=zero.get("reduce_bucket_size", 5e8),
            prefetch=zero.get("stage3_prefetch_bucket_size", 5e7),
            max_live=zero.get("stage3_max_live_parameters", 1e9),
            persistence=zero.get("stage3_param_persistence_threshold", 1e5),
            sub_group=zero.get("sub_group_size", 1e9),
            fused=fused,
            nvme_host=buffers + parameters.get("max_in_cpu", 1e9),
        )


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes per rank that stay between phases once the first optimizer step is done.

    AdamW makes its moments in that step; everything else is there when the model is loaded.
    """

    gpu: dict[str, float]
    host: dict[str, float]

    @property
    def steady_host(self) -> float:
        return sum(self.host.values())


def shard_elements(shape: Shape, zero: Zero, world: int) -> int:
    """Elements of a rank's weights."""
    return shape.shard(world) if zero.stage == 3 else shape.total


def state_elements(shape: Shape, zero: Zero, world: int) -> int:
    """Elements of a rank's part of the optimizer."""
    if zero.stage == 3:
        return shape.updated_shard(world)
    return math.ceil(shape.updated / world) if zero.stage else shape.updated


def frozen_states(shape: Shape, zero: Zero, world: int, *, on_base: bool = False) -> States:
    """Of a model without an optimizer; off the device it is streamed (streaming/engine.py).
    on_base: its own weights are adapters and a head alone."""
    shape = replace(shape, numels=shape.trained, packed=()) if on_base else shape
    if zero.parameters == "gpu":
        return States(
            gpu={"weights": float(zero.size * shard_elements(shape, zero, world))}, host={}
        )
    if zero.parameters == "cpu":
        return States(gpu={}, host={"weights": float(zero.size * shape.shard(world))})
    read_ahead = SLOTS * zero.size * math.ceil(max(shape.units) / world)
    return States(gpu={}, host={"read-ahead": float(read_ahead)})


def streamed_weights(shape: Shape, zero: Zero) -> float:
    """Bytes of a streamed model on the device: the unit in use, the one on its way, kept ones."""
    return float(zero.size * shape.most_streamed)


def paused_forwards(shape: Shape, zero: Zero, tokens: int) -> float:
    """Bytes that the forwards of a streamed pass hold while others run, of all rows together.

    Of each token the embedding, which the decoder's loop keeps, the hidden state, the rotary sine
    and cosine, and its position. Checked against a walk.
    """
    return float(tokens * (2 * zero.size * (shape.hidden + shape.head_dim) + 8))


def trained_states(
    shape: Shape, zero: Zero, world: int, optimizer: Any, *, on_base: bool = False
) -> States:
    """Of a model with its optimizer. on_base: its frozen weights are another role's.

    optimizer: OptimizerConfig. AdamW keeps an fp32 master and two fp32 moments; split_adamw keeps
    the low 16 bits of the master beside the weights, and moments of `moments` (fp32 or bf16).
    """
    gpu: dict[str, float] = {}
    host: dict[str, float] = {}
    own = replace(shape, numels=shape.trained, packed=()) if on_base else shape
    _weights(own, zero, world, gpu, host)
    part = state_elements(shape, zero, world)
    place = gpu if zero.optimizer == "gpu" else host
    split = getattr(optimizer, "name", "adamw") == "split_adamw"
    if split:
        place["low master bits"] = 2.0 * part
    elif zero.stage or zero.size == 2:
        place[f"{'fp32' if zero.master == 4 else 'bf16'} master"] = float(zero.master * part)
    moment = zero.master
    if split:
        moment = {"fp32": 4, "bf16": 2}[optimizer.moments]
    place["moments"] = 2.0 * moment * part
    if zero.stage == 3:
        # One flat buffer for the whole run, where the optimizer is.
        place["gradients"] = float(zero.accumulation * part)
        gpu["reduce buckets"] = zero.communication * zero.reduce_bucket
        if world > 1 or zero.parameters != "gpu":
            # Gathered again after every step, up to stage3_param_persistence_threshold.
            small = sum(n for n in shape.numels if n <= zero.persistence)
            gpu["small weights, whole"] = float(zero.size * small)
    if zero.optimizer == "cpu":
        # DeepSpeed's optimizer reads its gradients from a second buffer; both are pinned.
        host["fp32 gradients"] = 4.0 * part
        pinned = [4 * part] + ([zero.accumulation * part] if zero.stage == 3 else [])
        host["pinned rounding"] = host.get("pinned rounding", 0.0) + _rounding(pinned)
    if zero.optimizer == "nvme":
        host.clear()
        host["NVMe buffers"] = 4 * 4.0 * min(part, zero.sub_group)
    return States(gpu=gpu, host=host)


def _weights(shape: Shape, zero: Zero, world: int, gpu: dict, host: dict) -> None:
    """Of a trained model: its partitions lie in one buffer. Those in 4 bit are not cut."""
    if zero.parameters == "gpu":
        whole = shape.weight_bytes(zero.size)
        gpu["weights"] = float(zero.size * shape.shard(world)) if zero.stage == 3 else whole
    elif zero.parameters == "nvme":
        host["NVMe buffers"] = zero.size * zero.nvme_host
    else:
        host["weights"] = float(zero.size * shape.shard(world))
        host["pinned rounding"] = _rounding([zero.size * shape.shard(world)])


def _rounding(blocks: list[int]) -> float:
    """What torch's allocator of pinned memory adds: it rounds blocks up to a power of two."""
    return float(sum((1 << (block - 1).bit_length()) - block for block in blocks))


def movable(shape: Shape, zero: Zero, world: int, states: States) -> list[float]:
    """Bytes of each tensor of the optimizer that can sleep: one per kind and ZeRO-3 sub-group."""
    parts = [float(state_elements(shape, zero, world))]
    if zero.stage == 3:
        parts = [0.0]
        for numel in shape.trained:
            if parts[-1] >= zero.sub_group:
                parts.append(0.0)
            parts[-1] += math.ceil(numel / world)
    whole = sum(parts)
    sizes = []
    for what in states.gpu:
        if is_optimizer(what):
            tensors = 2 if what == "moments" else 1
            sizes += [states.gpu[what] / tensors * part / whole for part in parts] * tensors
    return sizes


def is_optimizer(what: str) -> bool:
    """Whether a state sleeps with the optimizer."""
    return what.endswith("master") or what in ("low master bits", "moments")


def is_gradients(what: str) -> bool:
    """Whether a state is a buffer that holds nothing between two updates."""
    return what in ("gradients", "reduce buckets")


def live_weights(shape: Shape, zero: Zero, world: int) -> float:
    """Bytes of whole parameters that ZeRO-3 holds at once, prefetch and the head included; and of
    one that is dequantised."""
    if zero.stage < 3 or (world == 1 and zero.parameters == "gpu"):
        return float(zero.size * max(shape.packed, default=0))
    at_once = max(zero.max_live, *shape.numels) + zero.prefetch + shape.head
    return zero.size * min(float(shape.total), at_once)


def reduce_transient(shape: Shape, zero: Zero, world: int, *, several: bool) -> float:
    """Bytes of gradients on their way: whole ones, and the copy that is communicated.

    several: an update has several micro-batches. Stage 2 gathers each one's gradients in a buffer
    of its own before it adds them to the first's; the stages below add in place.
    """
    bucket = min(float(shape.updated), max(zero.reduce_bucket, *shape.trained))
    whole = 0.0 if zero.stage >= 2 else zero.accumulation * shape.updated
    part = state_elements(shape, zero, world)
    if zero.stage == 2:
        whole += (1 + several) * zero.accumulation * part
    return bucket * (zero.size + zero.communication) + whole


def step_transient(shape: Shape, zero: Zero, world: int) -> float:
    """Bytes that an optimizer step adds: the gradients of a sub-group, flat, as its master."""
    part = state_elements(shape, zero, world)
    return zero.master * float(min(part, zero.sub_group) if zero.stage == 3 else part)


def saved_per_token(shape: Shape, size: int, *, fused: bool = False) -> float:
    """Bytes per token and layer that backward needs, without recomputation.

    A norm keeps its input in fp32, what it is before the weight, and its output; attention its
    query, keys and values expanded to all heads, its output and an fp32 log-sum; the MLP gate, its
    activation, up and the product. Checked against autograd. Fused layers keep a norm's input and
    output, and neither the fp32 copy nor the activation.
    """
    attention = shape.heads * shape.head_dim
    norms = 2 * shape.hidden * (2 * size if fused else 4 + 2 * size)
    mlp = (3 if fused else 4) * shape.mlp
    return norms + size * (4 * attention + mlp) + 4 * shape.heads


def training_activations(shape: Shape, zero: Zero, tokens: int, recompute: bool) -> float:
    """Bytes at the start of backward. recompute: only each layer's input is kept. DoRA keeps what
    each of its magnitudes multiplies."""
    layer = saved_per_token(shape, zero.size, fused=zero.fused) * tokens
    layer += zero.size * shape.magnitudes / shape.layers * tokens
    ends = 3 * shape.hidden * max(4, zero.size) * tokens
    if recompute:
        return layer + shape.layers * zero.size * shape.hidden * tokens + ends
    return shape.layers * layer + ends


def scoring_activations(shape: Shape, zero: Zero, tokens: int) -> float:
    """Bytes at the widest point of a forward without gradients: inside an MLP or a norm."""
    wide = max(3 * zero.size * shape.mlp, 12 * shape.hidden)
    return tokens * (2 * zero.size * shape.hidden + wide)


def logits_chunk(
    shape: Shape, zero: Zero, rows: int, *, training: bool, most: float = CUDA_LOGITS_BYTES
) -> float:
    """Bytes of the head's buffers for `rows` response tokens, and in training its gradients.

    most: bytes of a chunk of logits.
    """
    if not shape.head:
        return 0.0
    row = shape.vocabulary * (4 + (2 if training and zero.size == 2 else 0))
    chunk = min(float(rows * row), most)
    if not training or not shape.head_trains:
        return chunk + rows * shape.hidden * zero.size * training
    several = rows * row > most
    weight = shape.head * (zero.size + (4 if several and zero.size == 2 else 0))
    return chunk + weight + rows * shape.hidden * zero.size


def grouped_weights(shape: Shape, tp: int, size: int) -> float:
    """Copies of narrow layers' weights that generation makes on a GPU, see rollout/linear.py: of q,
    k and v, and of gate and up. size: bytes of an element."""
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tp
    outputs = (attention, 0 if shape.experts else 2 * shape.mlp // tp)
    groups = [size * shape.hidden * count for count in outputs]
    return float(shape.layers * sum(group for group in groups if group <= NARROW))
