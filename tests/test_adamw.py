"""The split master is exact, and its AdamW is torch's float32 AdamW bit for bit.

python -m pytest tests/test_adamw.py
"""

import itertools

import numpy as np
import pytest
import torch

from gearshift.kernels import adamw, dispatch, ops
from gearshift.kernels.adamw import join_master, split_master

LR = 1e-6  # of PPO: far below the spacing of bfloat16
HYPER = {"lr": LR, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
BACKENDS = ["torch"]
if dispatch.HAS_TRITON:
    BACKENDS.append("triton")


@pytest.fixture(autouse=True)
def rounding_of_a_gpu(monkeypatch):
    """Triton's interpreter rounds the product of an fma, and cuts a float32 off to a bfloat16."""
    if not dispatch.HAS_TRITON:
        return
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def convert(data, source, target, mode):
        kinds = {32: (np.int32, torch.float32), 16: (np.int16, torch.bfloat16)}
        (held, read), (_, written) = (kinds[x.primitive_bitwidth] for x in (source, target))
        values = torch.from_numpy(data.view(held).copy()).view(read).to(written)
        return bits(values).numpy()

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(interpreter, "_convert_float", convert)


def gradients(count, steps, dtype):
    """From 1e-25, whose square is 0, to 1e17, with zeros; clipped by norm in their own dtype."""
    torch.manual_seed(1)
    for _ in range(steps):
        grad = torch.randn(count) * 10.0 ** torch.randint(-25, 18, (count,))
        grad = torch.where(torch.rand(count) < 0.2, 0.0, grad).to(dtype)
        yield grad.mul_(1 / (grad.float().norm() + 1e-6).clamp(min=1e12)).mul_(1e12)


def start(count, moments=torch.float32):
    torch.manual_seed(0)
    weight = (torch.randn(count) * 10.0 ** torch.randint(-3, 2, (count,))).bfloat16()
    low = torch.zeros(count, dtype=torch.int16)
    return [weight, low, *(torch.zeros(count, dtype=moments) for _ in range(2))]


def step(state, grad, t, backend, **changes):
    weight, low, *moments = state
    settings = HYPER | changes
    ops.adamw_split_step(weight, low, grad, *moments, **settings, step=t, backend=backend)


def torch_adamw(parameter, hyper=HYPER):
    return torch.optim.AdamW(
        [parameter],
        lr=hyper["lr"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        foreach=False,
        fused=False,
    )


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def specials():
    """Every sign, exponent and carry; both zeros, subnormals, infinities."""
    tops = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (tops[:, None] + lows).flatten().view(torch.float32)


def test_the_split_is_exact_and_its_weight_is_the_nearest():
    master = specials()
    weight, low = split_master(master)
    known = ~master.isnan()
    assert torch.equal(bits(join_master(weight, low))[known], bits(master)[known])
    assert weight[~known].isnan().all() and join_master(weight, low)[~known].isnan().all()
    tie = (bits(master) & 0xFFFF) == 0x8000
    assert torch.equal(bits(weight)[known & ~tie], bits(master.bfloat16())[known & ~tie])
    assert (weight.float().abs() > master.abs())[known & tie].all()  # away from zero
    assert join_master(*split_master(torch.zeros(0))).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_200_steps_are_float32_adamw_bit_for_bit(backend, dtype):
    # torch rounds the last elements of a tensor, those that fill no vector, in another way.
    count, padded, steps = 1000, 1024, 200 if backend == "torch" or dtype.itemsize == 4 else 20
    state = start(padded)
    parameter = torch.nn.Parameter(state[0].float())
    optimizer = torch_adamw(parameter)
    ours = [tensor[:count].clone() for tensor in state]
    for t, grad in enumerate(gradients(padded, steps, dtype), 1):
        parameter.grad = grad.float()
        optimizer.step()
        step(ours, grad[:count], t, backend)
    weight, low, *moments = ours
    expected = parameter.detach()[:count]
    assert torch.equal(bits(join_master(weight, low)), bits(expected))
    assert torch.equal(weight, split_master(expected)[0])
    saved = optimizer.state[parameter]
    for ours, theirs in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        assert torch.equal(bits(ours), bits(saved[theirs][:count]))
    assert (low != 0).float().mean() > 0.9  # of weights that moved, and not by whole units


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
def test_triton_and_torch_give_the_same_bits(beta1, moments):
    states = [start(1088, moments) for _ in BACKENDS]
    for t, grad in enumerate(gradients(1088, 4, torch.bfloat16), 1):
        for state, backend in zip(states, BACKENDS, strict=True):
            step(state, grad, t, backend, beta1=beta1)
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(bits(ours), bits(theirs))
    assert states[0][2].dtype == moments


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("count", [5, 16, 17, 1000, 1041])
def test_lengths_that_16_does_not_divide(count):
    states = [start(count, torch.float32) for _ in BACKENDS]
    for t, grad in enumerate(gradients(count, 3, torch.bfloat16), 1):
        for state, backend in zip(states, BACKENDS, strict=True):
            step(state, grad, t, backend)
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def test_chunks_change_nothing(monkeypatch):
    whole, cut = start(1000), start(1000)
    monkeypatch.setitem(adamw.CHUNK, "cpu", 64)
    for t, grad in enumerate(gradients(1000, 5, torch.float32), 1):
        step(cut, grad, t, "torch")
    monkeypatch.undo()
    for t, grad in enumerate(gradients(1000, 5, torch.float32), 1):
        step(whole, grad, t, "torch")
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_not_a_number_is_seen():
    state = start(4)
    step(state, torch.tensor([1.0, float("nan"), float("inf"), 1.0]), 1, "torch")
    assert state[0].isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("moments, least", [(torch.float32, 0.999), (torch.bfloat16, 0.99)])
def test_small_steps_are_realised(moments, least):
    """The share of 200 equal steps that arrives: all of it, and of a bfloat16 master 2 %."""
    state = start(4096, moments)
    state[0] = (torch.randn(4096) * 0.02).bfloat16()  # a linear layer's usual spread
    grad = torch.randn(4096)
    before = state[0].float()
    hyper = HYPER | {"weight_decay": 0.0}
    exact, narrow = (torch.nn.Parameter(x) for x in (before.clone(), state[0].clone()))
    exact.grad, narrow.grad = grad, grad.bfloat16()
    optimizers = [torch_adamw(exact, hyper), torch_adamw(narrow, hyper)]
    for t in range(1, 201):
        for optimizer in optimizers:
            optimizer.step()
        step(state, grad, t, "torch", weight_decay=0.0)
    drift = exact.detach() - before
    masters = (join_master(*state[:2]), narrow.detach().float())
    ours, stock = (((m - before) @ drift / drift.square().sum()).item() for m in masters)
    assert least < ours < 1.01
    assert 0.005 < stock < 0.05


def test_bf16_moments_follow_gradients_that_shrink():
    """And with beta2 = 0.999, which is refused, the second moment would stay at 1."""
    state = start(64, torch.bfloat16)
    state[3].fill_(1.0)
    for t in range(1, 101):
        step(state, torch.zeros(64), t, "torch")
    torch.testing.assert_close(state[3].float(), torch.full((64,), 0.95**100), rtol=0.1, atol=0)
    assert torch.tensor(1.0).bfloat16() * 0.999 == 1.0


@pytest.mark.parametrize(
    "index, wrong, says",
    [
        (0, torch.zeros(4), "weight_bf16 is torch.float32"),
        (1, torch.zeros(4), "low_u16 is torch.float32: must be torch.int16"),
        (2, torch.zeros(5), r"grad has shape \[5\]"),
        (2, torch.zeros(8)[::2], "grad has shape"),
        (2, torch.zeros(4, device="meta"), "grad is on meta"),
        (4, torch.zeros(4).bfloat16(), "exp_avg_sq is torch.bfloat16: must be torch.float32"),
    ],
)
def test_wrong_tensors_are_named(index, wrong, says):
    weight, low, *moments = start(4)
    tensors = [weight, low, torch.zeros(4), *moments]
    tensors[index] = wrong
    with pytest.raises(ValueError, match=says):
        ops.adamw_split_step(*tensors, **HYPER, step=1)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"beta1": 1.0}, "beta1=1.0: must be"),
        ({"beta2": 0.999}, "beta2=0.999: bfloat16 moments freeze"),
        ({"beta2": 0.99}, "beta2=0.99: bfloat16 moments freeze"),
    ],
)
def test_wrong_settings_are_named(changes, says):
    state = start(4, torch.bfloat16)
    with pytest.raises(ValueError, match=says):
        step(state, torch.zeros(4), 1, "torch", **changes)
    with pytest.raises(ValueError, match="step=0"):
        step(state, torch.zeros(4), 0, "torch")


def test_nothing_to_do():
    for backend, dtype in itertools.product(BACKENDS, (torch.float32, torch.bfloat16)):
        step(start(0, dtype), torch.zeros(0), 1, backend)
