"""Starting up under each launcher, and what one process sees before and after."""

import os
import random

import numpy as np
import pytest
import torch

from gearshift.engine import distributed

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
NAMES += ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


@pytest.fixture
def environment():
    """No launcher at all; restored afterwards, with whatever the code under test has set."""
    before = dict(os.environ)
    for name in NAMES:
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


def test_many_ranks_without_a_meeting_point_are_refused(environment):
    environment.update(SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_NTASKS="2")
    with pytest.raises(ValueError, match="MASTER_ADDR is not set for 2 processes"):
        distributed.adopt_launcher_environment()


def test_one_process_is_the_whole_world():
    value = torch.tensor([1.5, -2.0])
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    for reduced in (distributed.global_sum(value), distributed.global_max(value)):
        assert torch.equal(reduced, value) and reduced.data_ptr() != value.data_ptr()
    assert torch.equal(distributed.all_gather_rows(value), value)
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
