"""Which implementation of an op runs: the one rule, for every op.

`backend="auto"` is Triton for CUDA tensors and PyTorch elsewhere; the environment variable
GEARSHIFT_KERNELS (auto, triton, torch) overrides "auto" and nothing else. Triton on CPU tensors
exists only under TRITON_INTERPRET=1, which is how the kernels are tested without a GPU.
"""

import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(backend: str, device: torch.device) -> str:
    """Returns "triton" or "torch"; raises ValueError for a backend that cannot run here."""
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("GEARSHIFT_KERNELS", "auto"), "GEARSHIFT_KERNELS"
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(f"{source}='triton': triton is not installed; pip install triton")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"{source}='triton' on {device.type} tensors: set TRITON_INTERPRET=1 or use 'torch'"
            )
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            current = torch.cuda.current_device()
            raise ValueError(
                f"tensors on {device}, but Triton launches on the current device, {current}; "
                f"call torch.cuda.set_device({device.index}) first"
            )
    return backend
