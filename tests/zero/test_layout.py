"""What the layout of DeepSpeed's partitions tells, on stand-ins for its parameters and optimizers.

Real engines of every stage are in tests/checkpoint and test_split_adamw.py.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2

from gearshift.engine.zero import layout


def cut(numel: int, ranks: int, rank: int) -> torch.nn.Parameter:
    """A parameter as ZeRO-3 leaves it on one rank; its values count from 0."""
    part = -(-numel // ranks)
    parameter = torch.nn.Parameter(torch.empty(0))
    padded = torch.nn.functional.pad(torch.arange(float(numel)), (0, part * ranks - numel))
    parameter.ds_tensor = padded[part * rank : part * (rank + 1)].clone()
    parameter.ds_numel, parameter.ds_shape = numel, torch.Size([numel])
    parameter.ds_process_group, parameter.partition_numel = None, lambda: part
    parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    return parameter


@pytest.mark.parametrize("rank", range(4))
def test_fragments_of_partitions_leave_padding_out(monkeypatch, rank):
    """Nine elements over four ranks are parts of three, the last of padding only."""
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    names = {"a": cut(9, 4, rank), "b": cut(10, 4, rank)}
    weights = torch.cat([parameter.ds_tensor for parameter in names.values()])
    zero = SimpleNamespace(
        fp32_partitioned_groups_flat=[weights.clone()],
        fp16_partitioned_groups_flat=[weights],
        fp16_groups=[list(names.values())],
    )
    module = SimpleNamespace(named_parameters=names.items)
    found = layout.fragments(SimpleNamespace(module=module, optimizer=zero))
    expected = [("a", 3 * rank, 3), ("b", 3 * rank, min(3, 10 - 3 * rank))]
    assert [(f.name, f.start, f.count) for f in found] == expected[rank == 3 :]
    for fragment in found:
        values = torch.arange(float(fragment.start), fragment.start + fragment.count)
        assert torch.equal(fragment.of(fragment.master), values)


def test_a_parameter_that_one_rank_holds_is_not_copied():
    """A stand-in for ZeRO-3's parameters: at one rank the partition is the parameter, flat."""
    weight = cut(6, 1, 0)
    weight.ds_tensor, weight.ds_shape = torch.arange(8.0), (2, 3)
    with pytest.raises(ZeroDivisionError), layout.gathered(weight, None):
        assert weight.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert weight.data_ptr() == weight.ds_tensor.data_ptr()
        1 / 0  # noqa: B018
    assert weight.numel() == 0


def test_a_gradient_is_held_until_it_is_reduced():
    """Stages 1 and 2 reduce a large one on a stream of their own; see hold_gradients."""
    held = []
    there = SimpleNamespace(is_cuda=True, record_stream=held.append)
    zero = SimpleNamespace(_record_gradient_stream=lambda tensor, stream: None)
    layout.hold_gradients(zero)
    zero._record_gradient_stream(there, "a stream")
    zero._record_gradient_stream(torch.zeros(1), None)  # of the host: nothing to hold
    assert held == ["a stream"]
    layout.hold_gradients(other := SimpleNamespace())  # stages 0 and 3 have another way
    assert not vars(other)


def test_deepspeed_still_asks_for_it():
    """What is put in its place is called where a gradient is reduced."""
    source = inspect.getsource(stage_1_and_2.DeepSpeedZeroOptimizer.average_tensor)
    assert "self._record_gradient_stream(tensor, stream)" in source
