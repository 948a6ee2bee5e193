"""Trials of a model on a few tokens: whose a failure is, and whether two readings are alike."""

import torch
from torch import Tensor

from gearshift.engine.cluster import distributed

FAULTS = (TypeError, AttributeError, LookupError, RuntimeError, ValueError)  # of a model's code


def is_its_own(error: BaseException) -> bool:
    """Whether an error among FAULTS is the model's, and not of the memory or of another rank."""
    return not (isinstance(error, torch.OutOfMemoryError) or distributed.peer_left(error))


def excess(errors: Tensor, dtype: torch.dtype, experts: bool) -> Tensor:
    """The share of errors [N], relative to the largest, that rounding in dtype does not explain,
    above what is allowed: it may send some of a mixture's tokens to other experts, but not half of
    them. Above 0 the readings are not alike."""
    unlike = (~(errors <= torch.finfo(dtype).eps ** 0.5)).float().mean()
    return unlike - (0.5 if experts else 0.0)
