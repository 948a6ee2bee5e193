"""Run on ranks: a small model trained by AdamW on a split master, beside stock DeepSpeed.

    torchrun --nproc_per_node W split_on_ranks.py OUT PART[,PART]

OUT/rank<r>.jsonl gets one object per part: `bytes.<choice>` (state per parameter; `_twice` leaves
DeepSpeed its second copy), `exact.<stage>`, `resume.<stage>`, or `ppo`, which reads OUT/models.
"""

import gc
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import OptimizerConfig
from gearshift.engine.zero import layout
from gearshift.engine.zero import state as zero_state
from gearshift.engine.zero.optim import build_optimizer
from gearshift.engine.zero.split_adamw import share_weights
from gearshift.kernels.adamw import join_master
from tests.tiny import run as tiny_run

SPLIT = {"name": "split_adamw"}
CHOICES = {
    "stock": {},
    "split_fp32": SPLIT,
    "split_bf16": SPLIT | {"moments": "bf16"},
}
LR = 1e-6


def settings(name: str, stage: int) -> dict:
    """The shipped file for this choice at another stage, with buffers that weigh nothing."""
    split = name != "stock"
    config = ds_config.load("actor_zero3_bf16_split" if split else "actor_zero3_bf16")
    config["data_types"] = {"grad_accum_dtype": "bf16"}
    zero = {"stage": stage, "reduce_bucket_size": 1000, "overlap_comm": False}
    zero |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return config | {"zero_optimization": zero, "steps_per_print": 1 << 30}


def model(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(width, 3)).bfloat16()  # sizes that two ranks must pad


def engine(name: str, stage: int, width: int, share: bool = True):
    config = OptimizerConfig(lr=LR, weight_decay=0.1, **CHOICES[name])
    module, ds = model(width), settings(name, stage)
    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=ds):
            module = model(width)
    optimizer = build_optimizer(module, config, ds)
    made, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)
    if share and name != "stock":
        share_weights(made.optimizer)
    return made


def train(made, width: int, steps: range, seen: list | None = None) -> None:
    """Steps on inputs of their own; `seen` collects the (clipped) gradients of each update."""
    inner = made.optimizer.optimizer
    if seen is not None:
        update = inner._update

        def recorded(parameter, group):
            seen.append((parameter, group["weight_decay"], parameter.grad.clone()))
            update(parameter, group)

        inner._update = recorded
    for step in steps:
        torch.manual_seed(1000 * step + distributed.rank())
        out = made(torch.randn(4, width).bfloat16())
        made.backward(out.float().square().sum() * 10.0)
        made.step()


def held() -> int:
    """Bytes of every tensor's storage, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.device.type != "meta"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def state_bytes(name: str, stage: int = 3, share: bool = True) -> float:
    """Bytes per parameter of this rank's part after a step, gradients' buffer included."""
    before = held()
    made = engine(name, stage, 256, share)
    train(made, 256, range(1))
    count = sum(layout.whole_shape(p).numel() for p in made.module.parameters())
    return (held() - before) * dist.get_world_size() / count


def exact(stage: int) -> dict:
    """The master after 20 clipped steps beside float32 AdamW given the same gradients."""
    made, seen = engine("split_fp32", stage, 40), []
    masters = {}
    for parameter in (group.master for group in layout.groups(made.optimizer)):
        masters[parameter] = nn.Parameter(parameter.detach().float())
    train(made, 40, range(20), seen)
    optimizers = {}
    for parameter, decay, grad in seen:
        master = masters[parameter]
        if parameter not in optimizers:
            optimizers[parameter] = torch.optim.AdamW(
                *([master], LR), betas=(0.9, 0.95), weight_decay=decay, foreach=False
            )
        master.grad = grad.float()
        optimizers[parameter].step()
    state = made.optimizer.optimizer.state
    equal = [
        torch.equal(join_master(parameter.detach(), state[parameter]["low"]), master.detach())
        for parameter, master in masters.items()
    ]
    whole = masters_of(made)
    nearest = [torch.equal(whole[name].bfloat16(), weight) for name, weight in _weights(made)]
    clipped = made.get_global_grad_norm() > 1.0
    return {"equal": equal, "nearest": nearest, "clipped": bool(clipped)}


def masters_of(made) -> dict[str, torch.Tensor]:
    """The exact float32 weights, flat, by name: what a checkpoint saves of all ranks, joined."""
    views, places = zero_state.tensors(made)
    mine = {}
    for name, (start, count) in places.items():
        values = views[f"weights/{name}"].float()
        if f"low/{name}" in views:
            values = join_master(views[f"weights/{name}"], views[f"low/{name}"])
        mine[name] = (slice(start, start + count), values)
    whole = {name: torch.zeros(math.prod(s)) for name, s in zero_state.shapes(made).items()}
    for rank in distributed.all_gather_objects(mine):
        for name, (span, values) in rank.items():
            whole[name][span] = values
    return whole


def _weights(made):
    for name, parameter in made.module.named_parameters():
        with layout.gathered(parameter):
            yield name, parameter.detach().flatten().clone()


def resume(stage: int, out: Path) -> dict:
    """Six steps, and three saved, loaded into a fresh engine, and three more."""
    rank = distributed.rank()
    whole = engine("split_bf16", stage, 40)
    train(whole, 40, range(3))
    views, places = zero_state.tensors(whole)
    copies = {name: view.clone() for name, view in views.items()}
    save_file(copies, out / f"{stage}.rank{rank}.safetensors", {"notes": json.dumps(places)})
    counters = zero_state.counters(whole, schedule(whole))
    distributed.barrier()
    train(whole, 40, range(3, 6))
    other = engine("split_bf16", stage, 40)
    train(other, 40, range(7, 8))  # what it must forget
    files = sorted(out.glob(f"{stage}.rank*.safetensors"))
    zero_state.load(other, schedule(other), counters, files)
    train(other, 40, range(3, 6))
    ours, theirs = masters_of(whole), masters_of(other)
    equal = [torch.equal(ours[name], theirs[name]) for name in ours]
    states = [s for s in other.optimizer.optimizer.state.values()]
    dtypes = {str(v.dtype) for s in states for v in s.values() if torch.is_tensor(v)}
    moved = [not torch.equal(v, v.bfloat16().float()) for v in ours.values()]
    return {"equal": equal, "moved": moved, "dtypes": sorted(dtypes)}


def schedule(made) -> LambdaLR:
    return LambdaLR(made.optimizer.optimizer, lambda step: 1.0)


def ppo(models: Path) -> dict:
    """Two PPO steps of tiny models, actor and critic on split masters."""
    plain = tiny_run.config(models, "zero3_bf16_split", lr=LR)
    optimizer = OptimizerConfig(lr=LR, **CHOICES["split_bf16"])
    config = replace(
        plain,
        actor=replace(plain.actor, optimizer=optimizer),
        critic=replace(plain.critic, optimizer=optimizer),
    )
    trainer = tiny_run.trainer(config)
    zeros = {"actor": trainer.actor.engine, "critic": trainer.critic.engine}
    before = {name: masters_of(made) for name, made in zeros.items()}
    figures = [trainer.step(tiny_run.prompts(config.ppo, step))[0] for step in range(2)]
    result = {}
    for name, made in zeros.items():
        after = masters_of(made)
        moved = [(after[key] - before[name][key]).abs().max().item() for key in after]
        groups = layout.groups(made.optimizer)
        shared = [group.master.data_ptr() == group.weights.data_ptr() for group in groups]
        result[name] = {"moved": moved, "shared": shared}
    return result | {"ratio": figures[-1]["rollout/ratio_first_max"]}


def main() -> None:
    out, parts = Path(sys.argv[-2]), sys.argv[-1].split(",")
    distributed.start(1)
    for part in parts:
        kind, _, what = part.partition(".")
        if kind == "bytes":
            name = what.removesuffix("_twice")
            result = {"bytes": state_bytes(name, share=name == what)}
        elif kind == "ppo":
            result = ppo(out / "models")
        else:
            stage = int(what)
            result = exact(stage) if kind == "exact" else resume(stage, out)
        with (out / f"rank{distributed.rank()}.jsonl").open("a") as file:
            file.write(json.dumps({"part": part, **result}) + "\n")


if __name__ == "__main__":
    main()
