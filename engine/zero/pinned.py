"""Host memory of an exact size, page-locked where there is a GPU."""

import resource

import torch


class Block:
    """`size` bytes, as the uint8 tensor `memory`, for as long as this object lives.

    Pinned memory is registered, not allocated: torch's allocator of pinned memory rounds each
    block up to a power of two.
    """

    def __init__(self, size: int, *, pinned: bool):
        self.memory = torch.empty(size, dtype=torch.uint8)
        self._pinned = pinned and size > 0
        if self._pinned:
            # First all threads ask the system for the pages: registering has one thread do it.
            self.memory[:: resource.getpagesize()].zero_()
            torch.cuda.check_error(
                torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 0)
            )

    def __del__(self):
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
