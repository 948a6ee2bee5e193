"""AdamW (Loshchilov and Hutter 2019) on a split master: one pass, in place.

    master = weight:low      (bits) the exact float32 weight, as bfloat16 and 16 further bits
    m      = m + (1 - beta1) (g - m)
    v      = beta2 v + (1 - beta2) g^2
    master = (1 - lr wd) master - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

`weight` is the master rounded to nearest (ties away from zero), so the model computes with the
best bfloat16 there is; `low` is the signed rest: master bits = weight bits * 2^16 + low. Ties to
even would not fit: an even weight would have 2^16 + 1 masters. Above 3.39e38 the nearest bfloat16
is infinity, as in IEEE's rounding; the master stays exact. NaN becomes the quiet NaN.

At 1e-6, a usual PPO learning rate, one step moves a weight by far less than half a unit in the last
place of bfloat16: without the low bits almost every step would round to no step at all.

The PyTorch path is torch.optim.AdamW's loop (foreach=False, fused=False), operation by operation.
The kernel has fused multiply-adds in the moments and nowhere else, exactly rounded quotients and
roots: as that loop rounds on a CPU with AVX2.
"""

import torch

from gearshift.kernels import dispatch
from gearshift.kernels.arguments import check_not_negative, check_positive, check_tensor

# Elements a time: what lies between the memory's weights and the updated ones stays in cache.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
SLOWEST_BF16 = 0.99

_QUIET_NAN = 0x7FC00000


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 of any shape -> its bfloat16 (to nearest) and the int16 low bits."""
    bits = master.view(torch.int32)
    bits = torch.where(master.isnan(), _QUIET_NAN, bits)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The exact float32 master of a bfloat16 weight and its int16 low bits."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + low.to(torch.int32)).view(torch.float32)


def _adamw(master, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step):
    """The update on float32 tensors, in place: the reference."""
    master.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    master.addcdiv_(exp_avg, scale, value=-(lr / (1 - beta1**step)))


def _step_torch(weight, low, grad, exp_avg, exp_avg_sq, *settings):
    size = CHUNK.get(weight.device.type, CHUNK["cuda"])
    tensors = (weight, low, grad, exp_avg, exp_avg_sq)
    for weights, lows, grads, *moments in zip(*(t.split(size) for t in tensors), strict=True):
        master = join_master(weights, lows)
        wide = [moment.float() for moment in moments]  # themselves where they are float32
        _adamw(master, grads.float(), *wide, *settings)
        high, rest = split_master(master)
        weights.copy_(high)
        lows.copy_(rest)
        for moment, value in zip(moments, wide, strict=True):
            moment.copy_(value)


if dispatch.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _adamw_kernel(
        weight_ptr,
        low_ptr,
        grad_ptr,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        N,
        keep,  # 1 - lr * weight_decay
        blend,  # 1 - beta1, or -beta1 counted from the gradient
        beta2,
        rest2,  # 1 - beta2
        root,  # sqrt(1 - beta2^t)
        eps,
        negative_step,  # -lr / (1 - beta1^t)
        FROM_GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < N
        high = tl.load(weight_ptr + i, mask=inside).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(low_ptr + i, mask=inside).to(tl.int32)
        grad = tl.load(grad_ptr + i, mask=inside).to(tl.float32)
        exp_avg = tl.load(exp_avg_ptr + i, mask=inside).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + i, mask=inside).to(tl.float32)
        master = ((high << 16) + low).to(tl.float32, bitcast=True)

        master = master * keep
        # As torch.lerp: from the nearer end, with one rounding.
        exp_avg = tl.fma(grad - exp_avg, blend, grad if FROM_GRAD else exp_avg)
        exp_avg_sq = tl.fma(rest2 * grad, grad, exp_avg_sq * beta2)
        scale = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + eps
        master = master + tl.div_rn(negative_step * exp_avg, scale)

        bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
        high = (bits + 0x8000) >> 16
        low = (bits - (high << 16)).to(tl.int16)
        tl.store(weight_ptr + i, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(low_ptr + i, low, mask=inside)
        tl.store(exp_avg_ptr + i, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq_ptr + i, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=inside)


def _step_triton(weight, low, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step):
    N, BLOCK = weight.numel(), 1024
    from_grad = 1 - beta1 >= 0.5
    tensors = (weight, low, grad, exp_avg, exp_avg_sq)
    if N % 16 and N > 16:
        # Loads are 128 bits wide only where Triton knows that 16 divides the length.
        settings = (lr, beta1, beta2, eps, weight_decay, step)
        for part in (slice(0, N - N % 16), slice(N - N % 16, N)):
            pieces = [tensor.view(-1)[part] for tensor in tensors]
            _step_triton(*pieces, *settings)  # type: ignore[call-arg]
        return
    if N == 0:
        return
    _adamw_kernel[(triton.cdiv(N, BLOCK),)](
        *tensors,
        N,
        1 - lr * weight_decay,
        -beta1 if from_grad else 1 - beta1,
        float(beta2),
        1 - beta2,
        (1 - beta2**step) ** 0.5,
        float(eps),
        -(lr / (1 - beta1**step)),
        FROM_GRAD=from_grad,
        BLOCK=BLOCK,
        num_warps=4,
        # A compiler that fuses further multiplies and adds would change the last bit.
        enable_fp_fusion=False,
    )


_STEP = {"torch": _step_torch, "triton": _step_triton}


@torch.no_grad()
def adamw_split_step(
    weight_bf16: torch.Tensor,
    low_u16: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    backend: str = "auto",
) -> None:
    """One AdamW step on the float32 master that `weight_bf16` and `low_u16` are, in place.

    Args:
        weight_bf16: [N] bfloat16, what the model computes with. low_u16: [N] int16, zeros at first.
        grad: [N] bfloat16 or float32, only read.
        exp_avg, exp_avg_sq: [N], both float32 (then the master is that of float32 AdamW with
            these gradients) or both bfloat16 (arithmetic in float32, stored rounded).
        step: t >= 1, for the bias correction. weight_decay is decoupled.

    All tensors contiguous, on one device. Raises ValueError, naming the argument, for anything
    else and for bfloat16 moments with a beta of 0.99 or more: such a step decays them by less than
    bfloat16 resolves (half a unit is 0.2 to 0.4 %), so they stay, however small gradients become.
    """
    tensors = {
        "weight_bf16": (weight_bf16, (torch.bfloat16,)),
        "low_u16": (low_u16, (torch.int16,)),
        "grad": (grad, (torch.bfloat16, torch.float32)),
        "exp_avg": (exp_avg, (torch.bfloat16, torch.float32)),
        "exp_avg_sq": (exp_avg_sq, (exp_avg.dtype,)),
    }
    for name, (tensor, dtypes) in tensors.items():
        check_tensor(name, tensor, (weight_bf16.numel(),), weight_bf16.device, dtypes)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {list(tensor.stride())}: must be contiguous")
    check_not_negative("lr", lr)
    check_not_negative("weight_decay", weight_decay)
    check_positive("eps", eps)
    if step < 1:
        raise ValueError(f"step={step}: counts from 1")
    check_betas(beta1, beta2, exp_avg.dtype)
    run = _STEP[dispatch.resolve(backend, weight_bf16.device)]
    settings = (lr, beta1, beta2, eps, weight_decay, step)
    run(weight_bf16, low_u16, grad, exp_avg, exp_avg_sq, *settings)


def check_betas(beta1: float, beta2: float, moments: torch.dtype) -> None:
    """Raises ValueError for a decay outside [0, 1), and for one that `moments` cannot follow."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}={beta}: must be at least 0 and below 1")
        if moments == torch.bfloat16 and beta >= SLOWEST_BF16:
            raise ValueError(
                f"{name}={beta}: bfloat16 moments freeze where a step decays them by less than "
                f"they resolve, 0.2 to 0.4 %; use {name} below {SLOWEST_BF16}, as 0.95, or "
                "float32 moments"
            )
