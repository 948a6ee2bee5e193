"""This rank's part of a frozen model: in one block of host memory, or in a file on a fast disk.

A parameter is flattened, padded and cut evenly over the ranks, as ZeRO-3 cuts it. The room for all
of a model is taken before any of it is read.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.cluster import distributed
from gearshift.engine.config.deepspeed import offloaded
from gearshift.engine.zero.layout import is_on_disk, is_partitioned, partition, whole_shape
from gearshift.engine.zero.pinned import Block

SLOTS = 2  # units of a spilled model in host memory: one on its way to the device, one being read
_READERS = 4  # threads: one does not fill an NVMe disk's queue
_READ = 16 * 2**20  # bytes of one read
_ALIGNMENT = 16  # bytes: a part starts where any dtype may
_FIX = "free some, or name another disk"
_KEY = "zero_optimization.offload_param.nvme_path"


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """This rank's elements [rank * count, (rank + 1) * count) of a flattened parameter."""

    shape: torch.Size
    numel: int  # of the whole parameter, without padding
    count: int
    dtype: torch.dtype
    offset: int  # bytes from the start of the store

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


class Host:
    """A model's parts of this rank in one block of memory, pinned where there is a GPU."""

    def __init__(self, size: int):
        """size: bytes, of room_of."""
        self._block = Block(size, pinned=torch.cuda.is_available())
        self._end = 0

    @property
    def nbytes(self) -> int:
        """Host memory, of this rank."""
        return self._block.memory.nbytes

    def take(self, parameter: nn.Parameter) -> None:
        """Moves this rank's part of `parameter` here, which ZeRO-3 may have cut already."""
        part = _described(parameter, self._end)
        own, here = _own(parameter, part), self._at(part)
        here[: own.numel()].copy_(own)
        here[own.numel() :].zero_()
        self._end += _padded(part.nbytes)
        _moved(parameter, self, part)

    def begin(self, largest: int) -> None:
        """Nothing to prepare."""

    def ahead(self, parts: Sequence[RankPart]) -> None:
        """Nothing to do: all is here."""

    def read(self, parts: Sequence[RankPart]) -> list[Tensor]:
        """[count] of each."""
        return [self._at(part) for part in parts]

    def copied(self, parts: Sequence[RankPart]) -> None:
        """Nothing to do: what was read stays."""

    def _at(self, part: RankPart) -> Tensor:
        return self._block.memory[part.offset :][: part.nbytes].view(part.dtype)


@dataclass(eq=False)
class _Slot:
    """Host memory of one unit that comes from a disk."""

    block: Block
    holds: Sequence[RankPart] = ()  # until they are copied
    reads: list[Future] = field(default_factory=list)
    left: Any = None  # CUDA event: the last content is on the device

    def views(self) -> Iterator[Tensor]:
        start = 0
        for part in self.holds:
            yield self.block.memory[start:][: part.nbytes].view(part.dtype)
            start += _padded(part.nbytes)

    def wait(self) -> None:
        for read in self.reads:
            read.result()


class Spill:
    """A nameless file that holds one model's parts of this rank: gone when the process is.

    Plain reads in parallel, not DeepSpeed's async I/O: they need no libaio, and are as many bytes.
    """

    def __init__(self, folder: str, size: int):
        """folder: on the disk. Raises ValueError where it cannot hold `size` bytes."""
        self.folder, self.bytes_read = folder, 0
        try:
            # Open for as long as the process lives, and deleted already.
            self._file = tempfile.TemporaryFile(dir=folder, prefix="gearshift-")  # noqa: SIM115
            self._reserve(size)
        except OSError as error:
            raise ValueError(
                f"{_KEY}={folder}: no room for {size / 1e9:.1f} GB: {error.strerror}; {_FIX}"
            ) from None
        self._readers = ThreadPoolExecutor(_READERS, "spill", _same_device())
        self._slots: list[_Slot] = []  # the one whose content left first comes first
        self._end = 0

    @property
    def nbytes(self) -> int:
        """Host memory, of this rank."""
        return sum(slot.block.memory.nbytes for slot in self._slots)

    def take(self, parameter: nn.Parameter) -> None:
        """Moves this rank's part of `parameter` here, which ZeRO-3 may have cut already."""
        part = _described(parameter, self._end)
        view = memoryview(_own(parameter, part).cpu().view(torch.uint8).numpy())
        done = 0
        with self._telling("writing"):
            while done < len(view):
                done += os.pwritev(self._file.fileno(), [view[done:]], self._end + done)
        self._end += _padded(part.nbytes)
        _moved(parameter, self, part)

    def _reserve(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise ValueError(
                f"{_KEY}={self.folder}: {free / 1e9:.1f} GB are free, this rank's part of the "
                f"model needs {size / 1e9:.1f} GB; {_FIX}"
            )
        if size:
            os.posix_fallocate(self._file.fileno(), 0, size)  # nobody can take it any more

    def begin(self, largest: int) -> None:
        """Makes the slots. largest: bytes of the largest unit, see unit_bytes."""
        pinned = torch.cuda.is_available()
        self._slots = [_Slot(Block(largest, pinned=pinned)) for _ in range(SLOTS)]

    def ahead(self, parts: Sequence[RankPart]) -> None:
        """Starts reading where there is a slot for it."""
        slot = next((slot for slot in self._slots if not slot.holds), None)
        if slot and not self._slot_of(parts):
            self._start(slot, parts)

    def read(self, parts: Sequence[RankPart]) -> list[Tensor]:
        """[count] of each; theirs until `copied`. Raises OSError where the disk fails."""
        slot = self._slot_of(parts)
        if slot is None:
            slot = next((slot for slot in self._slots if not slot.holds), self._slots[0])
            slot.wait()
            self._start(slot, parts)
        slot.wait()
        return list(slot.views())

    def copied(self, parts: Sequence[RankPart]) -> None:
        """Gives the slot of these parts back, once the copies to the device are queued: it is
        filled anew when the current CUDA stream has got past them."""
        slot = self._slot_of(parts)
        assert slot, "read before it is copied"
        slot.holds = ()
        if torch.cuda.is_available():
            slot.left = torch.cuda.current_stream().record_event()
        self._slots.remove(slot)
        self._slots.append(slot)

    def _slot_of(self, parts: Sequence[RankPart]) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == parts), None)

    def _start(self, slot: _Slot, parts: Sequence[RankPart]) -> None:
        slot.holds, slot.reads = parts, []
        for part, values in zip(parts, slot.views(), strict=True):
            view = memoryview(values.view(torch.uint8).numpy())
            for start in range(0, len(view), _READ):
                some = view[start : start + _READ]
                read = self._readers.submit(self._read, some, part.offset + start, slot.left)
                slot.reads.append(read)
            self.bytes_read += part.nbytes

    def _read(self, view: memoryview, offset: int, left: Any) -> None:
        if left is not None:
            left.synchronize()
        done, file = 0, self._file.fileno()
        with self._telling("reading"):
            while done < len(view):
                count = os.preadv(file, [view[done:]], offset + done)
                if not count:
                    raise OSError("the file is shorter than what was written")
                done += count
            os.posix_fadvise(file, offset, len(view), os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{_KEY}={self.folder}: {doing} a frozen model's weights failed: "
                f"{error.strerror or error}; check the disk, or name another"
            ) from error


def _same_device() -> Callable[[], None] | None:
    """For a thread's start, on CUDA: else its waits would make a context on the first GPU."""
    if not torch.cuda.is_available():
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


Store = Host | Spill


def place(ds_config: dict[str, Any], size: int) -> Store:
    """The room for a model whose JSON offloads its weights."""
    if offloaded(ds_config, "param") == "nvme":
        return Spill(ds_config["zero_optimization"]["offload_param"]["nvme_path"], size)
    return Host(size)


def partitioning(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The JSON that makes the partitions which a store takes: in plain memory, one at a time."""
    zero = ds_config["zero_optimization"]
    memory = {"device": "cpu", "pin_memory": False}
    return ds_config | {"zero_optimization": zero | {"offload_param": memory}}


def room_of(parameters: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes of a rank's parts of these parameters, which may be partitioned or on meta."""
    return sum(_padded(_count(p) * dtype.itemsize) for p in parameters)


def unit_bytes(parts: Iterable[RankPart]) -> int:
    """Bytes of a slot that holds these parts."""
    return sum(_padded(part.nbytes) for part in parts)


def take_over(module: nn.Module) -> tuple[Store, dict[nn.Parameter, RankPart]]:
    """Replaces every ZeRO-3 parameter of `module` by a plain one without data.

    Returns where their weights are, and their parts. Partitions that no store took while they were
    loaded are moved into one of host memory. Tied weights stay one parameter.
    """
    loose = [p for p in module.parameters() if not hasattr(p, "stored")]
    if loose:
        assert not any(map(is_on_disk, loose)), "on DeepSpeed's own disk"
        host = Host(room_of(loose, _dtype(loose)))
        for parameter in loose:
            host.take(parameter)
    made: dict[int, nn.Parameter] = {}
    parts: dict[nn.Parameter, RankPart] = {}
    stores = set()
    for owner in list(module.modules()):
        for name, old in list(owner.named_parameters(recurse=False)):
            if id(old) not in made:
                store, part = old.stored
                stores.add(store)
                new = nn.Parameter(torch.empty(0, dtype=part.dtype), requires_grad=False)
                made[id(old)], parts[new] = new, part
            setattr(owner, name, made[id(old)])
    (store,) = stores
    return store, parts


def _dtype(parameters: Sequence[nn.Parameter]) -> torch.dtype:
    return max((p.dtype for p in parameters), key=lambda dtype: dtype.itemsize)


def _described(parameter: nn.Parameter, offset: int) -> RankPart:
    shape, count = whole_shape(parameter), _count(parameter)
    return RankPart(
        shape=shape, numel=shape.numel(), count=count, dtype=parameter.dtype, offset=offset
    )


def _count(parameter: Tensor) -> int:
    """Elements of a rank's part, padding included."""
    return math.ceil(whole_shape(parameter).numel() / distributed.world_size())


def _own(parameter: nn.Parameter, part: RankPart) -> Tensor:
    """[up to part.count] flat: without the padding where the parameter is whole."""
    if is_partitioned(parameter):
        return partition(parameter).detach()
    return parameter.detach().reshape(-1)[distributed.rank() * part.count :][: part.count]


def _moved(parameter: nn.Parameter, store: Store, part: RankPart) -> None:
    parameter.stored = store, part
    own = partition(parameter) if is_partitioned(parameter) else parameter
    own.data = own.data.new_empty(0)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
