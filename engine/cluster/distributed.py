"""Starting up under deepspeed, torchrun, srun, mpirun or plain python, and what ranks share."""

import os
import random
import socket
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.engine.cluster import rendezvous
from gearshift.engine.config.errors import ConfigError, refuse_if

# Where launchers that set no RANK keep it: (rank, local rank, world size). Slurm is last: mpirun in
# a Slurm job starts its daemons with srun, and ranks inherit what Slurm says of a daemon.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)
# Beside each world size: where that launcher keeps the number of ranks of a node.
_NODE_SIZES = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    "PMI_SIZE": ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    "SLURM_NTASKS": ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
}
# How long ranks wait for the slowest where one has hours of work: the watchdog finds the stuck.
_LONGEST_WAIT = timedelta(days=1)
# What gloo and NCCL say of a rank that has left.
_PEER_LEFT = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
_SAME_RANKS = "start the same number of ranks on every node"


def adopt_launcher_environment() -> None:
    """Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not."""
    environment = os.environ
    if "RANK" not in environment:
        found = next((names for names in _LAUNCHERS if all(n in environment for n in names)), None)
        # A one-task Slurm allocation also sets SLURM_PROCID: harmless, it means one process.
        values = [environment[name] for name in found] if found else ["0", "0", "1"]
        environment.update(zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), values, strict=True))
    if environment["WORLD_SIZE"] == "1":
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", "0")  # any free port
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            problem = f"{name} is not set for {environment['WORLD_SIZE']} processes"
            fix = f"start them with deepspeed or torchrun, or export {name}"
            raise ConfigError("", f"{problem}: {fix}")


def forbid_cudnn_attention() -> None:
    """PyTorch's attention leaves out its cuDNN backend, which Hopper GPUs otherwise prefer.

    With a mask its backward gives non-finite gradients at some lengths (T % 128 == 64: measured on
    one H200 with PyTorch 2.11, 40 parameters of a left-padded batch; pytorch#196678), and every new
    shape costs up to 1.6 s for a plan. Whoever runs a model calls this first.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def start(threads: int = 0, timeout_s: float = 120) -> torch.device:
    """Joins the process group and returns this rank's device.

    threads: CPU threads of this rank; 0 shares the cores between the ranks of the node.
    timeout_s: how long ranks wait for each other.
    Raises ConfigError where a rank does not come, the port is taken, a rank has no GPU or nodes
    differ.
    """
    adopt_launcher_environment()
    # Host temporaries above 32 MB are mapped anew for every op. In huge pages a tiny step with
    # V = 32000 has 22 thousand page faults, in 4 kB pages 386 thousand (0.7 of 5.0 CPU seconds).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Micro-batches differ in size: without it, segments of one size serve no other.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # NCCL registers the buffers of captured collectives, and cannot those of such segments (before
    # 2.29): tensor-parallel decode graphs would hang (pytorch#158029).
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    forbid_cudnn_attention()
    device, slot = torch.device("cpu"), os.environ.get("LOCAL_RANK", "")
    if torch.cuda.is_available():
        device = torch.device("cuda", _adopt_gpu())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        rendezvous.join("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout_s, slot)
    if world_size() > 1:
        _patient_group()
    cores = share_of_cores(os.sched_getaffinity(0))
    torch.set_num_threads(threads or cores)
    return device


def device() -> torch.device:
    """This rank's GPU, after `start`; the host where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _adopt_gpu() -> int:
    """Index of this rank's GPU among those it sees, which becomes LOCAL_RANK, or ConfigError."""
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank < count:
        return local_rank
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # srun --gpus-per-task=1 shows each task its own GPU; torchrun and deepspeed show all ranks the
    # same, so that there one GPU is one too few.
    if count != 1 or len(visible) != 1 or not visible[0] or has_launcher():
        problem = f"this node has {count} GPUs"
        raise ConfigError("LOCAL_RANK", problem, "start fewer ranks", local_rank)
    # DeepSpeed takes it for the index of the device, and wants OpenMPI's to be equal.
    os.environ["LOCAL_RANK"] = "0"
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = "0"
    return 0


def stop() -> None:
    """Leaves the process group; NCCL warns of groups that are left open at exit."""
    _patient_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """As torchrun, deepspeed, srun or mpirun set it; the world if none did. Raises ConfigError."""
    name = _node_size_variable()
    if name is None:
        return world_size()
    sizes = _counts(os.environ[name])
    size = sizes[0]
    if name == "SLURM_NTASKS_PER_NODE":
        size = min(size, world_size())  # there it is the most that a node may have
    wrong = len(set(sizes)) > 1 or world_size() % size
    problem = f"does not divide the {world_size()} ranks"
    refuse_if(wrong, name, problem, _SAME_RANKS, os.environ[name])
    return size


def _node_size_variable() -> str | None:
    """The variable that holds the number of ranks of this node, of whoever started this one."""
    names = ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"]
    for _, _, world in _LAUNCHERS:
        # Another number of ranks: Slurm then speaks of the allocation around what was started.
        if os.environ.get(world) == str(world_size()):
            names += _NODE_SIZES[world]
    return next((name for name in names if name in os.environ), None)


def _counts(text: str) -> list[int]:
    """Ranks of each node, in Slurm's form: "8", "8(x2)" or "8(x2),4"."""
    counts = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def share_of_cores(cores: set[int]) -> int:
    """How many of `cores`, those this rank may use, are its own. A collective; raises ConfigError.

    Ranks are asked because the mask alone does not tell: srun and mpirun may have bound each rank
    to cores of its own, while under torchrun the mask of a job is shared by the ranks of a node.
    """
    mine, size = sum(1 << core for core in cores), ranks_per_node()
    asked = all_gather_objects((mine, size))
    sizes = {theirs for _, theirs in asked}
    refuse_if(sizes != {size}, "", f"nodes have {sorted(sizes)} ranks", _SAME_RANKS)
    first = rank() // size * size
    sharing = sum(bool(mask & mine) for mask, _ in asked[first : first + size])
    return max(1, len(cores) // sharing)


def has_launcher() -> bool:
    """Whether deepspeed or torchrun started this process, and stays until it ends."""
    return "LOCAL_WORLD_SIZE" in os.environ or "LOCAL_SIZE" in os.environ


def world_group() -> dist.ProcessGroup | None:
    """The group of all ranks, None before `start`."""
    return dist.group.WORLD if dist.is_initialized() else None


def host() -> str:
    """This machine, as messages name it."""
    return socket.gethostname()


def is_main() -> bool:
    return rank() == 0


def global_sum(value: Tensor) -> Tensor:
    """Sum over all ranks, of a tensor that has the same shape on each; the input is not changed."""
    total = value.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def global_max(value: Tensor) -> Tensor:
    """Maximum over all ranks; the input is not changed."""
    largest = value.clone()
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_gather_rows(value: Tensor) -> Tensor:
    """Tensors of the same shape on every rank, one below the other in rank order."""
    rows = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(rows, value.contiguous())
    return torch.cat(rows)


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> Sequence[Any]:
    """Small Python objects of every rank, in rank order. Waits as `barrier` does."""
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size == 1:
        return [value]
    gathered = [None] * size
    dist.all_gather_object(gathered, value, group=group or _patient_group())
    return gathered


def peer_left(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return any(sign in str(error) for sign in _PEER_LEFT)


def barrier() -> None:
    """Waits for all ranks, up to a day, on the host.

    On devices the wait would end with the process group's timeout, 10 minutes under NCCL: writing a
    large export takes rank 0 longer, a reward may take one rank longer than the others, and some
    groups generate longer.
    """
    if world_size() > 1:
        dist.barrier(_patient_group())


@cache
def _patient_group() -> dist.ProcessGroup:
    """A collective when it is first called, as `start` does."""
    return dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def seed_everything(seed: int) -> None:
    """The same seed on every rank: what must differ by rank or row carries its own generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
