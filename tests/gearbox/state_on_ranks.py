"""Run on ranks: a run that generates beside one that never does, for several DeepSpeed settings.

    deepspeed --num_accelerators W state_on_ranks.py OUT VARIANT:TP[,VARIANT:TP]

OUT/rank<r>.jsonl gets one object per variant: hashes of both runs' training state and what the
generation gear held.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import RolloutConfig
from gearshift.engine.gearbox.gearbox import Gearbox

BF16 = {"bf16": {"enabled": True}}
SMALL_WHOLE = {"stage3_param_persistence_threshold": 100_000}
VARIANTS = {
    "zero3": (3, {}, BF16),
    "hpz": (3, {"zero_hpz_partition_size": 2, **SMALL_WHOLE}, BF16),
    "offload": (3, {"offload_param": {"device": "cpu"}}, {}),  # fp32
    "zero2": (2, {}, BF16),
    "zero1": (1, {}, BF16),
}


class Wrapped(nn.Module):
    """The causal LM as a part of a larger module: its parameter names get a prefix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.policy = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=101,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        )

    def forward(self, **inputs):
        return self.policy(**inputs)


def start_engine(variant: str):
    stage, zero, precision = VARIANTS[variant]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **precision,
    }
    model = Wrapped()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, model


def train(engine, step: int) -> None:
    draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
    ids = torch.randint(0, 101, (2, 8), generator=draw)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def digest(values) -> str:
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        state.update(value if isinstance(value, bytes) else repr(value).encode())
    return state.hexdigest()


def fingerprint(engine, model) -> dict[str, str]:
    """Hashes of weights, optimizer, random numbers, and the modules' hooks and modes."""
    optimizer = engine.optimizer.optimizer
    moments = [v for state in optimizer.state.values() for _, v in sorted(state.items())]
    masters = [p.data for group in optimizer.param_groups for p in group["params"]]
    hooks = [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks), m.training, "forward" in vars(m))
        for name, m in model.named_modules()
    ]
    return {
        "weights": digest(getattr(p, "ds_tensor", p) for p in model.parameters()),
        "masters": digest(masters),
        "moments": digest(moments),
        "random": digest([torch.get_rng_state(), random.getstate(), np.random.get_state()]),
        "modules": digest(hooks),
        "config": digest([model.policy.config.to_json_string(), engine.global_steps]),
    }


def generate(gearbox, model) -> dict:
    """Enters and leaves twice, training in neither; what the module held."""
    seen = {"addresses": []}
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        with gearbox.generation() as module, torch.no_grad():
            module(input_ids=ids)
            shards = gearbox._shards
            seen["addresses"].append([shard.parameter.data_ptr() for shard in shards])
            seen["dtype"] = str(shards[0].parameter.dtype)
            seen["wrong"] = wrong_elements(gearbox, model)
            seen["views"] = sum(is_view(shard) for shard in shards) / len(shards)
        seen["left"] = sum(parameter.numel() for parameter in module.parameters())
    seen["received"] = gearbox.stats.bytes_received
    return seen


def is_view(shard) -> bool:
    """Whether the shard lies in the training parameter's own memory."""
    source = getattr(shard.source, "ds_tensor", shard.source)
    return shard.parameter.data_ptr() == source.data_ptr()


def wrong_elements(gearbox, model) -> int:
    """Elements that differ from slices of the weights gathered by DeepSpeed."""
    wrong = 0
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for shard in gearbox._shards:
            rows = torch.cat([torch.arange(a, b) for a, b in shard.spec.intervals])
            expected = shard.source.data.index_select(shard.spec.dim, rows)
            wrong += int((expected != shard.parameter).sum())
    return wrong


def run(variant: str, tp: int, generates: bool) -> dict:
    """Four optimizer steps, with both kinds of generation between the second and the third."""
    engine, model = start_engine(variant)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    seen = {}
    for step in range(4):
        if generates and step == 2:
            for weights in ("release", "resident"):
                config = RolloutConfig(tp=tp, weights=weights, shift_bucket_mb=0.01)
                gearbox = Gearbox(engine, model.policy, config, device=torch.device("cpu"))
                seen[weights] = generate(gearbox, model)
        if generates and step == 3:
            seen["after_step"] = generate(gearbox, model)  # the resident shards, refreshed
        train(engine, step)
    seen["state"] = fingerprint(engine, model)
    engine.destroy()
    return seen


def main(out: str, variants: str) -> None:
    distributed.start(threads=1)
    with Path(out, f"rank{dist.get_rank()}.jsonl").open("w") as log:
        for case in variants.split(","):
            variant, tp = case.split(":")
            never, with_generation = run(variant, int(tp), False), run(variant, int(tp), True)
            seen = {"case": case, "never": never["state"], **with_generation}
            print(json.dumps(seen), file=log, flush=True)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
