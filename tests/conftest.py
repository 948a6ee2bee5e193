"""Test-wide set-up. Runs before any kernel is imported."""

import os

import torch

if not torch.cuda.is_available():
    # Triton kernels then run on CPU tensors, in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # threads of tiny models only contend on a small machine
