"""Starting up under deepspeed, torchrun, srun, mpirun or plain python, and what ranks share."""

import importlib
import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# Where launchers that set no RANK keep it: (rank, local rank, world size).
_LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)


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
            raise ValueError(
                f"{name} is not set for {environment['WORLD_SIZE']} processes: start them with "
                f"deepspeed or torchrun, or export {name}"
            )


def start(threads: int = 0) -> torch.device:
    """Joins the process group and returns this rank's device.

    threads: CPU threads of this rank; 0 shares the cores between the ranks of the node.
    Raises ValueError where the launcher's port is taken or a rank has no GPU.
    """
    adopt_launcher_environment()
    # Host temporaries above 32 MB are mapped anew for every op. In huge pages a tiny step with
    # V = 32000 has 22 thousand page faults, in 4 kB pages 386 thousand (0.7 of 5.0 CPU seconds).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={local_rank}: this node has {torch.cuda.device_count()} GPUs; "
                "start fewer ranks"
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        _join(backend)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // ranks_per_node()))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _join(backend: str) -> None:
    import deepspeed

    # On CPU DeepSpeed would compile an all-reduce that only its own inference layers call: minutes
    # on the first run of a machine, and a line of output per rank on every other.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"MASTER_PORT={os.environ['MASTER_PORT']}: another job on this machine has that port; "
            "choose a free one, as deepspeed --master_port 29600 ..."
        ) from None


def stop() -> None:
    """Leaves the process group; NCCL warns of groups that are left open at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """As torchrun (LOCAL_WORLD_SIZE) or deepspeed (LOCAL_SIZE) set it; the world if neither."""
    names = (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ)
    name = next(names, None)
    size = int(os.environ[name]) if name else world_size()
    if world_size() % size:
        raise ValueError(
            f"{name}={size}: does not divide the {world_size()} ranks; start the same number of "
            "ranks on every node"
        )
    return size


def has_launcher() -> bool:
    """Whether deepspeed or torchrun started this process, and stays until it ends."""
    return "LOCAL_WORLD_SIZE" in os.environ or "LOCAL_SIZE" in os.environ


def world_group() -> dist.ProcessGroup | None:
    """The group of all ranks, None before `start`."""
    return dist.group.WORLD if dist.is_initialized() else None


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


def all_gather_rows(rows: Tensor) -> Tensor:
    """[n, ...] on every rank, the same shape on each -> [world size * n, ...], in rank order."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> Sequence[Any]:
    """Small Python objects of every rank, in rank order."""
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size == 1:
        return [value]
    gathered = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def seed_everything(seed: int) -> None:
    """The same seed on every rank: what must differ by rank or row carries its own generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
