"""Buffers that hold NaN until somebody writes to them."""

import torch


def poison_allocations(monkeypatch) -> None:
    """Whatever is allocated without a value holds NaN (or 77), never a lucky zero."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
