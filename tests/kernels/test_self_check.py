"""The check at start-up: it passes on kernels that are right, and names the one that is not."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gearshift.kernels import ops, paged_attention, sample
from gearshift.kernels.checks import case as check_case
from gearshift.kernels.checks import head as check_head
from gearshift.kernels.checks import self_check
from gearshift.kernels.head import anchored

CPU = torch.device("cpu")
TINY = check_case.Size(
    rows=12,
    hidden=16,
    vocab=300,
    batch=2,
    response=12,
    heads=(4, 2, 16),
    context=40,
    logits_bytes=12_288,  # 8 rows: two chunks
)


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    monkeypatch.setenv("GEARSHIFT_KERNELS", "triton")


def only(monkeypatch, name):
    cases = tuple(case for case in self_check.CASES if case.name == name)
    assert len(cases) == 1
    monkeypatch.setattr(self_check, "CASES", cases)


def test_every_op_passes_and_leaves_the_generators_alone():
    before = torch.get_rng_state()
    line = self_check.self_check(CPU, TINY)
    assert line.startswith(f"kernels: {len(self_check.CASES)} checks passed on cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_every_public_op_has_a_case():
    covered = {case.op for case in self_check.CASES}
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert functions - covered == {"kl_estimate"}  # plain PyTorch, part of kl_reward_gae


@pytest.mark.parametrize(
    "variable, value", [("GEARSHIFT_SELF_CHECK", "0"), ("GEARSHIFT_KERNELS", "torch")]
)
def test_nothing_is_checked_where_it_is_off(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(self_check, "CASES", None)
    assert self_check.self_check(CPU, TINY) is None


def wrong_constant(monkeypatch):
    monkeypatch.setattr(sample, "_LN2", 0.7)
    return "sample_tokens", "logprobs is off by"


def unwritten_output(monkeypatch):
    class Skipped:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(paged_attention, "_combine_kernel", Skipped())
    return "paged_attention", "out is off by inf"


def wrong_gradient_of_one_row(monkeypatch):
    right = anchored._finalize

    def finalize(*args):
        results, gradient = right(*args)
        gradient.scale[0] *= 1.1
        return results, gradient

    monkeypatch.setattr(anchored, "_finalize", finalize)
    return "linear_ppo_loss", "d_hidden is off by"


def does_not_compile(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("ptxas died\nof something")

    monkeypatch.setattr(sample, "_sample_kernel", Broken())
    return "sample_tokens.greedy", "RuntimeError: ptxas died"


@pytest.mark.parametrize(
    "plant", [wrong_constant, unwritten_output, wrong_gradient_of_one_row, does_not_compile]
)
def test_a_fault_stops_the_run_by_name(monkeypatch, plant):
    name, problem = plant(monkeypatch)
    only(monkeypatch, name)
    with pytest.raises(RuntimeError) as raised:
        self_check.self_check(CPU, TINY)
    told = str(raised.value)
    assert told.startswith(f"kernel {name} failed its check on cpu: {problem}")
    assert "GEARSHIFT_KERNELS=torch" in told and "\n" not in told


def test_errors_are_relative_to_the_row_and_infinite_where_numbers_are_missing():
    truth = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    rms = (12.5) ** 0.5
    assert check_case.error(truth.float(), truth) == 0
    assert check_case.error(truth + torch.tensor([[0.5, 0.0], [0.0, 0.0]]), truth) == (
        pytest.approx(0.5 / (5 + rms))
    )
    assert check_case.error(truth + torch.tensor([[0.0, 0.0], [0.5, 0.0]]), truth) == (
        pytest.approx(0.5 / rms)
    )
    assert check_case.error(truth * float("nan"), truth) == float("inf")
    assert check_case.error(truth[:1], truth) == float("inf")
    assert check_case.error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


def adamw_case(monkeypatch, name):
    """The case's outputs and its truth, of 300 weights and then read 64 at a time."""
    case = next(case for case in self_check.CASES if case.name == f"adamw_split_step.{name}")
    size = dataclasses.replace(TINY, rows=1)
    inputs = case.draw(size, torch.bfloat16, torch.Generator().manual_seed(5))
    outputs = case.run(inputs, size, "torch")
    truth = case.truth(inputs, outputs)
    whole = {name: part.block(slice(None)) for name, part in truth.items()}
    for module in (check_case, check_head):
        monkeypatch.setattr(module, "TRUTH_ELEMENTS", 64)
    return outputs, truth, whole


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_truth_in_blocks_gives_the_errors_of_the_whole_one(monkeypatch, moments):
    outputs, truth, whole = adamw_case(monkeypatch, moments)
    read = []

    def counted(part):
        return lambda rows: read.append(part.block(rows)) or read[-1]

    for name, part in truth.items():
        read.clear()
        found = check_case.error(outputs[name], dataclasses.replace(part, block=counted(part)))
        assert max(map(len, read)) == 64 and torch.equal(torch.cat(read[-5:]), whole[name])
        norm, gap = whole[name].abs(), (outputs[name].double() - whole[name]).abs()
        expected = (gap / (norm + norm.square().mean().sqrt())).max().item()
        assert found == pytest.approx(expected, rel=1e-9) and found > 0
    assert check_case.complaint(outputs, check_case.errors_of(outputs, truth)) is None


@pytest.mark.parametrize("name", ["master", "weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("wrong", [9.0, float("nan")])
def test_an_error_in_the_last_block_is_seen(monkeypatch, name, wrong):
    outputs, truth, _ = adamw_case(monkeypatch, "bf16")
    outputs[name][-1] += wrong
    problem = check_case.complaint(outputs, check_case.errors_of(outputs, truth))
    assert problem.startswith(f"{name} is off by")


def test_poison_is_in_every_fresh_buffer_and_gone_afterwards():
    with check_case.poisoned():
        fresh = [torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(2).new_empty(3)]
        assert all(tensor.isnan().all() for tensor in fresh)
        assert (torch.empty(3, dtype=torch.int32) == 77).all()
    assert "new_empty" not in vars(torch.Tensor)
    assert torch.empty.__name__ == "empty"


def test_masked_rows_are_poisoned_unless_plain():
    case = next(case for case in self_check.CASES if case.name == "linear_ppo_loss")
    for plain in (False, True):
        size = dataclasses.replace(TINY, rows=64, plain=plain)
        inputs = case.draw(size, torch.float32, torch.Generator().manual_seed(3))
        dead = inputs["hidden"].isnan().any(1)
        assert torch.equal(dead, inputs["weights"] == 0)
        assert bool(dead.any()) != plain
