"""Starting up under each launcher, and what one process sees before and after."""

import os
import random
import re
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gearshift.engine.cluster import distributed

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
OTHERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
OTHERS += ("CUDA_VISIBLE_DEVICES",)


@pytest.fixture
def environment():
    """No launcher at all; restored afterwards, with whatever the code under test has set."""
    before = dict(os.environ)
    for name in [*NAMES, *OTHERS, *(name for name in os.environ if name.startswith("SLURM_"))]:
        os.environ.pop(name, None)
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


def test_plain_python_is_one_rank_on_a_free_port(environment):
    distributed.adopt_launcher_environment()
    assert [environment[name] for name in NAMES[:5]] == ["0", "0", "1", "127.0.0.1", "0"]


@pytest.mark.parametrize(
    "names",
    [
        ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ],
)
def test_other_launchers_are_adopted(environment, names):
    environment.update(zip(names, ("5", "1", "8"), strict=True))
    environment.update(MASTER_ADDR="node0", MASTER_PORT="29500")
    distributed.adopt_launcher_environment()
    assert [environment[name] for name in NAMES[:3]] == ["5", "1", "8"]


def test_deepspeed_and_torchrun_are_left_as_they_are(environment):
    environment.update(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1")
    environment.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="1")
    distributed.adopt_launcher_environment()
    assert [environment[name] for name in NAMES[:5]] == ["3", "1", "4", "a", "1"]


def test_mpirun_in_a_slurm_job_counts_its_own_ranks(environment, ranks):
    """Its daemons are tasks of srun, whose variables the ranks inherit."""
    environment.update(SLURM_PROCID="1", SLURM_LOCALID="0", SLURM_NTASKS="16")
    environment.update(SLURM_STEP_TASKS_PER_NODE="1(x2)", OMPI_COMM_WORLD_LOCAL_SIZE="8")
    environment.update(OMPI_COMM_WORLD_RANK="9", OMPI_COMM_WORLD_LOCAL_RANK="1")
    environment.update(OMPI_COMM_WORLD_SIZE="16", MASTER_ADDR="node0", MASTER_PORT="29500")
    distributed.adopt_launcher_environment()
    assert [environment[name] for name in NAMES[:3]] == ["9", "1", "16"]
    ranks(16)
    assert distributed.ranks_per_node() == 8


def test_many_ranks_without_a_meeting_point_are_refused(environment):
    environment.update(SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_NTASKS="2")
    with pytest.raises(ValueError, match="MASTER_ADDR is not set for 2 processes"):
        distributed.adopt_launcher_environment()


@pytest.fixture
def ranks(monkeypatch):
    """ranks(world, rank, gathered): a process group that is not there; gathered: of all ranks."""

    def pretend(world: int, rank: int = 0, gathered: list | None = None) -> None:
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "all_gather_objects", lambda value: gathered or [value])

    return pretend


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 16),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "4(x2),4(x2)"}, 4),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "16"}, 16),
        ({"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "32"}, 16),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"PMI_SIZE": "16", "MPI_LOCALNRANKS": "8"}, 8),
        ({"PMI_SIZE": "16", "PMI_LOCAL_SIZE": "8"}, 8),
        # torchrun in a step of one task per node, and ranks that Slurm did not start.
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 8),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "2"}, 8),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 16),
    ],
)
def test_ranks_of_a_node_are_those_of_the_launcher(environment, ranks, variables, expected):
    environment.update(variables)
    ranks(16)
    assert distributed.ranks_per_node() == expected


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"SLURM_NTASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "8,4"},
            "SLURM_STEP_TASKS_PER_NODE=8,4: does not divide the 12 ranks; start the same number",
        ),
        (
            {"SLURM_NTASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1"},
            "SLURM_STEP_TASKS_PER_NODE=4(x2),3,1: does not divide",
        ),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8: does not divide the 12 ranks"),
    ],
)
def test_nodes_of_different_size_are_refused(environment, ranks, variables, said):
    environment.update(variables)
    ranks(12)
    with pytest.raises(ValueError, match=re.escape(said)):
        distributed.ranks_per_node()


def test_nodes_that_each_look_right_are_compared(environment, ranks):
    """4, 2 and 2 ranks: each divides 8."""
    environment.update(LOCAL_WORLD_SIZE="2")
    ranks(8, 4, gathered=[(1, 4)] * 4 + [(1, 2)] * 4)
    with pytest.raises(ValueError, match=re.escape("nodes have [2, 4] ranks; start the same")):
        distributed.share_of_cores({0})


@pytest.mark.parametrize(
    ("masks", "rank", "expected"),
    [
        ([range(8)] * 4, 2, 2),  # torchrun: one mask for the job
        ([range(first, first + 4) for first in (0, 4, 8, 12)], 3, 4),  # srun: one each
        ([range(0, 4), range(0, 4), range(4, 8), range(4, 8)], 1, 2),  # mpirun --bind-to numa
        ([range(1)] * 4, 0, 1),
    ],
)
def test_cores_are_shared_by_those_who_may_use_them(environment, ranks, masks, rank, expected):
    """The last half of the world is another node, where cores have the same numbers."""
    size = len(masks)
    environment.update(LOCAL_WORLD_SIZE=str(size))
    bits = [(sum(1 << core for core in mask), size) for mask in masks]
    ranks(2 * size, rank, gathered=bits + [(1, size)] * size)
    assert distributed.share_of_cores(set(masks[rank])) == expected


@pytest.mark.parametrize(
    ("local_rank", "count", "variables", "expected"),
    [
        (3, 8, {}, (3, "3")),
        (3, 1, {"CUDA_VISIBLE_DEVICES": "5"}, (0, "0")),  # srun --gpus-per-task=1
        (3, 1, {"CUDA_VISIBLE_DEVICES": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, (0, "0")),
        (1, 1, {}, None),  # two ranks on a node with one GPU
        (1, 1, {"CUDA_VISIBLE_DEVICES": ""}, None),
        (1, 1, {"CUDA_VISIBLE_DEVICES": "0,1"}, None),  # one of them is not there
        (1, 1, {"CUDA_VISIBLE_DEVICES": "0", "LOCAL_WORLD_SIZE": "2"}, None),  # torchrun: for all
        (1, 1, {"CUDA_VISIBLE_DEVICES": "0", "LOCAL_SIZE": "2"}, None),  # deepspeed
        (2, 2, {"CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_the_gpu_of_a_rank(environment, monkeypatch, local_rank, count, variables, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    environment.update(variables, LOCAL_RANK=str(local_rank))
    if expected is None:
        with pytest.raises(ValueError, match=f"LOCAL_RANK={local_rank}: this node has {count}"):
            distributed._adopt_gpu()
        assert environment["LOCAL_RANK"] == str(local_rank)
        return
    assert (distributed._adopt_gpu(), environment["LOCAL_RANK"]) == expected
    assert environment.get("OMPI_COMM_WORLD_LOCAL_RANK", expected[1]) == expected[1]


def test_ranks_with_a_gpu_each_meet_as_the_launcher_numbered_them(environment, monkeypatch):
    """srun --gpus-per-task=1: each sees its GPU as the first, and would be local rank 0."""
    met = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.rendezvous, "join", lambda *given: met.append(given))
    place = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS": "8"}
    place |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    environment.update(place, CUDA_VISIBLE_DEVICES="5")
    assert distributed.start(timeout_s=7) == torch.device("cuda", 0)
    assert environment["LOCAL_RANK"] == "0"  # for DeepSpeed
    assert met == [("cpu:gloo,cuda:nccl", 7, "3")]


def test_ranks_wait_on_the_host_and_for_a_day(monkeypatch, ranks):
    made, waited = [], []
    monkeypatch.setattr(dist, "new_group", lambda **how: made.append(how) or "patient")
    monkeypatch.setattr(dist, "barrier", waited.append)
    ranks(2)
    distributed._patient_group.cache_clear()
    try:
        distributed.barrier()
        distributed.barrier()
    finally:
        distributed._patient_group.cache_clear()
    assert waited == ["patient"] * 2
    assert made == [{"backend": "gloo", "timeout": timedelta(days=1)}]


def test_one_process_is_the_whole_world():
    value = torch.tensor([1.5, -2.0])
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    for reduced in (distributed.global_sum(value), distributed.global_max(value)):
        assert torch.equal(reduced, value) and reduced.data_ptr() != value.data_ptr()
    assert distributed.all_gather_objects({"a": 1}) == [{"a": 1}]
    distributed.barrier()


def test_seeding_covers_every_generator():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    distributed.seed_everything(2**33 + 7)
    first = draw()
    assert draw() != first
    distributed.seed_everything(2**33 + 7)
    assert draw() == first
