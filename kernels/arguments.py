"""Checks of what a caller hands to an op: each failure is one ValueError that names the argument.

Nothing here converts, copies or repairs. Only `check_token_ids` looks at values, because an id out
of range is an illegal address on a GPU; it waits for the device once.
"""

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """A tensor of this shape, on this device; dtypes: of one of these, None: of any float."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}: must be {list(shape)}")
    if not (tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes):
        wanted = "a float dtype" if dtypes is None else " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is {tensor.dtype}: must be {wanted}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the others are on {device}: move it there")


def check_matrix(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """A 2-D tensor of a float dtype the ops compute with, on this device."""
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: pass a matrix, one row a token")
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: its rows are empty")
    check_tensor(name, tensor, tensor.shape, device, FLOATS)


def check_token_ids(
    token_ids: torch.Tensor, length: int, device: torch.device, *, vocab: int | None = None
) -> None:
    """An integer vector [length]; with `vocab`, every id in 0..vocab-1."""
    check_tensor("token_ids", token_ids, (length,), device, (torch.int64, torch.int32))
    if vocab is None or length == 0:
        return
    low, high = torch.stack(token_ids.aminmax()).tolist()
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token_ids holds {wrong}, outside the vocabulary 0..{vocab - 1}: "
            "give padding any valid id (a row of weight 0 is never looked at)"
        )


def check_positive(name: str, value: float | None) -> None:
    """A finite number above 0; None passes, for options that None turns off."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: must be a finite number above 0")


def check_not_negative(name: str, value: float) -> None:
    """A finite number of at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: must be a finite number, 0 or above")
