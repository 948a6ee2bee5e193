"""The split master is exact; its AdamW is torch's where torch computes, and to rounding elsewhere.

Three ways to round one formula: the PyTorch path and torch.optim.AdamW use the same operations of
one library, so they agree to the bit on every processor. The Triton kernel does what its source
says, which NumPy's float32 repeats here to the bit (`documented`). Between those two lie the fused
multiply-adds that PyTorch uses on some processors and not on others: at most `rounding` apart.
"""

import itertools

import numpy as np
import pytest
import torch

from gearshift.kernels import adamw, dispatch, ops
from gearshift.kernels.adamw import join_master, split_master

pytestmark = pytest.mark.bits

LR = 1e-6  # of PPO: far below the spacing of bfloat16
HYPER = {"lr": LR, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
U, TINY = 2.0**-24, 2.0**-149  # half a unit of float32, relative; its least subnormal
BACKENDS = ["torch", "triton"] if dispatch.HAS_TRITON else ["torch"]
needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")


@pytest.fixture(autouse=True)
def as_a_gpu_rounds(monkeypatch):
    """Triton's interpreter rounds the product of an fma, and cuts a float32 off to a bfloat16."""
    if not dispatch.HAS_TRITON:
        return
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        return interpreter.TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

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


def documented(state, grad, t, **changes):
    """One step as kernels/adamw.py writes it, in NumPy's float32: returns the new state."""
    hyper = HYPER | changes
    lr, beta1, beta2 = hyper["lr"], hyper["beta1"], hyper["beta2"]
    weight, low, *moments = state
    master = join_master(weight, low).numpy()
    g, m, v = (x.float().numpy() for x in (grad, *moments))
    master = master * np.float32(1 - lr * hyper["weight_decay"])
    # As torch.lerp: from the nearer end.
    blend, near = (1 - beta1, m) if beta1 > 0.5 else (-beta1, g)
    m = fused(g - m, np.float32(blend), near)
    v = fused(np.float32(1 - beta2) * g, g, v * np.float32(beta2))
    scale = np.sqrt(v) / np.float32((1 - beta2**t) ** 0.5) + np.float32(hyper["eps"])
    master = master + np.float32(-(lr / (1 - beta1**t))) * m / scale
    kept = (torch.from_numpy(x).to(moments[0].dtype) for x in (m, v))
    return [*split_master(torch.from_numpy(master)), *kept]


def fused(x, y, z):
    """A float32 multiply-add with one rounding: the product of two float32 is exact in float64."""
    return (x.astype(np.float64) * np.float64(y) + z.astype(np.float64)).astype(np.float32)


def rounding(state, grad, after, t, **changes):
    """How far two float32 evaluations of one step may lie apart: of (master, exp_avg, exp_avg_sq).

    Each operation rounds by half a unit at most, U of its result, and a fused one saves one of
    them; two evaluations are therefore apart by twice the roundings of the longer one.
    """
    hyper = HYPER | changes
    (master, m, v), (new, new_m, new_v) = map(wide, (state, after))
    g = grad.double()
    blended = m.abs() + (1 - hyper["beta1"]) * (g - m).abs()
    error_m = 3 * U * blended  # the difference, the product, the sum
    error_v = 4 * U * new_v  # two products, the square, the sum
    scale = (new_v / (1 - hyper["beta2"] ** t)).sqrt() + hyper["eps"]
    step = hyper["lr"] / (1 - hyper["beta1"] ** t) * new_m.abs() / scale
    # The root halves the relative error of v; then five operations to the step, and two on master.
    moved = step * (2 + 5) * U + hyper["lr"] / (1 - hyper["beta1"] ** t) * error_m / scale
    errors = [2 * U * (master.abs() + new.abs()) + moved, error_m, error_v]
    if state[2].dtype == torch.bfloat16:  # what differs by little may round to neighbours
        for i, moment in ((1, new_m), (2, new_v)):
            errors[i] = errors[i] + 2.0**-8 * moment.abs()
    return [2 * error + 4 * TINY for error in errors]


def wide(state):
    """(master, exp_avg, exp_avg_sq) in float64."""
    return [join_master(*state[:2]).double(), *(moment.double() for moment in state[2:])]


def close(found, expected, bounds):
    for ours, theirs, bound in zip(wide(found), wide(expected), bounds, strict=True):
        assert ((ours - theirs).abs() <= bound).all()
    assert torch.equal(found[0], split_master(join_master(*found[:2]))[0])


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
def test_200_steps_are_float32_adamw_bit_for_bit(dtype):
    # torch rounds the last elements of a tensor, those that fill no vector, in another way.
    count, padded, steps = 1000, 1024, 200
    state = start(padded)
    parameter = torch.nn.Parameter(state[0].float())
    optimizer = torch_adamw(parameter)
    ours = [tensor[:count].clone() for tensor in state]
    for t, grad in enumerate(gradients(padded, steps, dtype), 1):
        parameter.grad = grad.float()
        optimizer.step()
        step(ours, grad[:count], t, "torch")
    weight, low, *moments = ours
    expected = parameter.detach()[:count]
    full = count - count % 64
    assert torch.equal(bits(join_master(weight, low))[:full], bits(expected)[:full])
    assert torch.equal(weight[:full], split_master(expected)[0][:full])
    saved = optimizer.state[parameter]
    for ours, theirs in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        assert torch.equal(bits(ours)[:full], bits(saved[theirs][:full]))
    assert (low != 0).float().mean() > 0.9  # of weights that moved, and not by whole units


@needs_triton
@pytest.mark.parametrize(
    "beta1, moments, count, steps",
    [(0.9, torch.float32, 1000, 200)]
    + [(beta1, torch.float32, 1041, 4) for beta1 in (0.0, 0.3, 0.9)]
    + [(beta1, torch.bfloat16, 1041, 4) for beta1 in (0.0, 0.3, 0.9)]
    + [(0.9, torch.float32, count, 3) for count in (5, 16, 17)],
)
def test_the_kernel_rounds_as_it_is_written(beta1, moments, count, steps):
    """Over steps that build on each other, on lengths that 16 divides and does not."""
    expected, found = start(count, moments), start(count, moments)
    for t, grad in enumerate(gradients(count, steps, torch.bfloat16), 1):
        expected = documented(expected, grad, t, beta1=beta1)
        step(found, grad, t, "triton", beta1=beta1)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(bits(ours + 0), bits(theirs + 0))  # + 0: no zero has a sign
    assert found[2].dtype == moments


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
def test_torch_differs_from_it_by_rounding_at_most(beta1, moments):
    before = start(1041, moments)
    for t, grad in enumerate(gradients(1041, 30, torch.bfloat16), 1):
        expected = documented(before, grad, t, beta1=beta1)
        found = [tensor.clone() for tensor in before]
        step(found, grad, t, "torch", beta1=beta1)
        close(found, expected, rounding(before, grad, expected, t, beta1=beta1))
        before = expected


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
        (2, torch.zeros(8)[::2], r"grad has strides \[2\]: must be contiguous"),
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
