"""This rank's part of a frozen parameter: in host memory, or in a file on a fast disk.

A parameter is flattened, padded and cut evenly over the ranks, as ZeRO-3 cuts it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_READERS = 4  # threads: one does not fill an NVMe disk's queue


@dataclass(kw_only=True)
class Shard:
    """Elements [rank * part, (rank + 1) * part) of a flattened parameter."""

    shape: torch.Size
    numel: int  # of the whole parameter, without padding
    part: int
    dtype: torch.dtype
    host: Tensor | None = None  # [part]; None where it is in `spill`
    spill: "Spill | None" = None
    offset: int = 0  # bytes from the start of the file
    _coming: Future | None = None

    @property
    def nbytes(self) -> int:
        return self.part * self.dtype.itemsize

    def prefetch(self) -> None:
        """Starts reading; nothing for what is in memory."""
        if self.spill and self._coming is None:
            self._coming = self.spill.read(self)

    def read(self) -> Tensor:
        """[part] on the host, pinned where there is a GPU."""
        if self.host is not None:
            return self.host
        self.prefetch()
        coming, self._coming = self._coming, None
        return coming.result()


class Spill:
    """A nameless file that holds one model's shards of this rank: gone when the process is.

    folder: of the disk, in the DeepSpeed JSON's offload_param.nvme_path.
    """

    def __init__(self, folder: str):
        self.folder = folder
        # Open for as long as the process lives, and deleted already.
        self._file = tempfile.TemporaryFile(dir=folder, prefix="gearshift-")  # noqa: SIM115
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="spill")
        self._end = 0
        self.bytes_read = 0

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> tuple["Spill", dict[str, Any]]:
        """The spill of a JSON with weights on NVMe, and the JSON that partitions them in memory."""
        zero = ds_config["zero_optimization"]
        memory = {"device": "cpu", "pin_memory": False}
        own = ds_config | {"zero_optimization": zero | {"offload_param": memory}}
        return cls(zero["offload_param"]["nvme_path"]), own

    def reserve(self, size: int) -> None:
        """Raises ValueError where the disk has no room for `size` bytes more."""
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise ValueError(
                f"zero_optimization.offload_param.nvme_path={self.folder}: {free / 1e9:.1f} GB are "
                f"free, this rank's part of the model needs {size / 1e9:.1f} GB; free some, or "
                "name another disk"
            )

    def take(self, parameter: nn.Parameter) -> None:
        """Moves the ZeRO-3 partition of `parameter` from memory to the file."""
        part = parameter.ds_tensor
        shard = _described(parameter)
        shard.spill, shard.offset = self, self._end
        self.reserve(shard.nbytes)
        self._write(part.detach().contiguous().view(torch.uint8).numpy())
        parameter.spilled = shard
        part.data = part.new_empty(0)

    def read(self, shard: Shard) -> Future:
        """The shard's tensor, later."""
        return self._readers.submit(self._read, shard)

    def _read(self, shard: Shard) -> Tensor:
        values = torch.empty(shard.part, dtype=shard.dtype, pin_memory=torch.cuda.is_available())
        view, done = memoryview(values.view(torch.uint8).numpy()), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], shard.offset + done)
            if not count:
                raise OSError(f"{self.folder}: the disk returned fewer bytes than were written")
            done += count
        os.posix_fadvise(self._file.fileno(), shard.offset, shard.nbytes, os.POSIX_FADV_DONTNEED)
        self.bytes_read += shard.nbytes
        return values

    def _write(self, values: Any) -> None:
        view, done = memoryview(values), 0
        while done < len(view):
            done += os.pwritev(self._file.fileno(), [view[done:]], self._end + done)
        self._end += len(view)


def take_over(module: nn.Module) -> dict[nn.Parameter, Shard]:
    """Replaces every ZeRO-3 parameter of `module` by a plain one without data; returns their parts.

    Tied weights stay one parameter.
    """
    made: dict[int, nn.Parameter] = {}
    shards: dict[nn.Parameter, Shard] = {}
    for owner in list(module.modules()):
        for name, old in list(owner.named_parameters(recurse=False)):
            if id(old) not in made:
                shard = getattr(old, "spilled", None) or _described(old)
                if shard.spill is None:
                    shard.host = old.ds_tensor.data
                new = nn.Parameter(torch.empty(0, dtype=shard.dtype), requires_grad=False)
                made[id(old)], shards[new] = new, shard
            setattr(owner, name, made[id(old)])
    return shards


def total_bytes(shards: Iterable[Shard]) -> int:
    return sum(shard.nbytes for shard in shards)


def _described(parameter: nn.Parameter) -> Shard:
    part = parameter.ds_tensor
    return Shard(
        shape=parameter.ds_shape, numel=parameter.ds_numel, part=part.ds_numel, dtype=part.dtype
    )
