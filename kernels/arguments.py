"""Checks of what a caller hands to an op: each failure is one ValueError that names the argument.

Nothing here converts, copies or repairs. Only `check_token_ids` looks at values, because an id out
of range is an illegal address on a GPU; it waits for the device once.
"""

import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_matrix(name: str, tensor: torch.Tensor, device: torch.device | None = None) -> None:
    """A 2-D tensor of a float dtype the ops compute with, on `device` where one is given."""
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: pass a matrix, one row a token")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}: use float32, bfloat16 or float16")
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: its rows are empty")
    _check_device(name, tensor, device)


def check_vector(name: str, tensor: torch.Tensor, length: int, device: torch.device) -> None:
    """A float vector [length]."""
    _check_shape(name, tensor, length)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: pass a float tensor")
    _check_device(name, tensor, device)


def check_token_ids(
    token_ids: torch.Tensor, length: int, device: torch.device, *, vocab: int | None = None
) -> None:
    """An integer vector [length]; with `vocab`, every id in 0..vocab-1."""
    name = "token_ids"
    _check_shape(name, token_ids, length)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is {token_ids.dtype}: pass int64 or int32")
    _check_device(name, token_ids, device)
    if vocab is None or length == 0:
        return
    low, high = torch.stack(token_ids.aminmax()).tolist()
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{name} holds {wrong}, outside the vocabulary 0..{vocab - 1}: "
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


def _check_shape(name: str, tensor: torch.Tensor, length: int) -> None:
    if tensor.shape != (length,):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}: must be [{length}], one entry per row"
        )


def _check_device(name: str, tensor: torch.Tensor, device: torch.device | None) -> None:
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the rows are on {device}: move it there")
