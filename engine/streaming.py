"""A frozen model whose weights live on the host or on a disk, and visit the device once per pass.

DeepSpeed fetches an offloaded weight for every micro-batch. Here all micro-batches of a pass go
through the model together, layer by layer: a layer's weights come once, from this rank's 1/N of
them and an all-gather between the ranks, and the next layer's come while this one computes. On the
device are two layers, what is used at several places (tied embeddings), and the pass's hidden
states. Each micro-batch is the model's own forward, which a hook stops where it needs weights that
have not come (lockstep.py): any transformers model will do, and its results are the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine import distributed
from gearshift.engine.lockstep import Lockstep
from gearshift.engine.shards import Shard, take_over, total_bytes

T = TypeVar("T")


@dataclass(eq=False)
class Unit:
    """Weights that come and go together: a layer's, or another module's own."""

    index: int  # in the order of the module tree, which is the forward's
    shards: dict[nn.Parameter, Shard]
    kept: bool = False  # to the end of the pass: used at more than one place
    present: bool = False
    came: bool = False  # in this pass
    visits: int = 0  # micro-batches that have been through it in this pass

    @property
    def nbytes(self) -> int:
        return total_bytes(self.shards.values())


@dataclass
class Traffic:
    """What this rank brought from host or disk to the device."""

    passes: int = 0
    bytes_moved: int = 0
    shard_bytes: int = 0  # of this rank's part of the model: the least that a pass must bring

    @property
    def ratio(self) -> float:
        """Bytes moved over the least: 1.0 where each weight came once per pass."""
        return self.bytes_moved / (self.passes * self.shard_bytes)


@dataclass
class _Coming:
    """A unit on its way to the device."""

    whole: list[Tensor] = field(default_factory=list)  # [world size * part] of each parameter
    works: list[Any] = field(default_factory=list)


class StreamedEngine:
    """Stands where a DeepSpeed engine would; a call is one forward without gradients.

    module: partitioned by ZeRO-3 into host memory or spilled (shards.py); its partitions are taken
    over. Collective: every rank makes as many passes, of one micro-batch or more.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module.eval(), device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lockstep: Lockstep | None = None
        self._ahead: dict[int, _Coming] = {}
        self.units = self._hook(take_over(module))
        self.traffic = Traffic(shard_bytes=sum(unit.nbytes for unit in self.units))
        module.to(device)  # buffers; the parameters have no data

    def eval(self) -> "StreamedEngine":
        return self

    def __call__(self, *inputs: Any) -> Any:
        return self.together([lambda: self.module(*inputs)])[0]

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """One pass: the results of calls that use the module, in order."""
        assert self._lockstep is None, "a pass inside a pass"
        self._lockstep = Lockstep(calls, self._setting)
        try:
            with torch.no_grad():
                results = self._lockstep.run(self._bring)
        finally:
            self._lockstep = None
            self._ahead.clear()
            for unit in self.units:
                self._drop(unit)
                unit.came = False
        self.traffic.passes += 1
        return results

    @contextmanager
    def _setting(self) -> Iterator[None]:
        """What a thread starts without."""
        with torch.no_grad(), torch.cuda.device(self.device) if self._copies else nullcontext():
            yield

    def _hook(self, shards: dict[nn.Parameter, Shard]) -> list[Unit]:
        units: list[Unit] = []
        home: dict[nn.Parameter, Unit] = {}
        for module, parameters in _places(self.module):
            used = {home[p] for p in parameters if p in home}
            for unit in used:
                unit.kept = True
            new = {p: shards[p] for p in parameters if p not in home}
            if new:
                # Parameters beside submodules are in use while those run.
                beside = any(module.children()) and len(new) != len(list(module.parameters()))
                unit = Unit(len(units), new, kept=beside)
                units.append(unit)
                used.add(unit)
                home |= dict.fromkeys(new, unit)
            for unit in used:
                module.register_forward_pre_hook(lambda *_, unit=unit: self._visit(unit))
                module.register_forward_hook(lambda *_, unit=unit: self._leave(unit))
        for parameter, unit in home.items():
            parameter.lender = lambda unit=unit: self._visit(unit)
        return units

    def _visit(self, unit: Unit) -> None:
        """A micro-batch needs the unit, and goes on when the weights are there."""
        if not unit.present:
            self._lockstep.wait_for(unit.index)

    def _leave(self, unit: Unit) -> None:
        unit.visits += 1
        if unit.visits == self._lockstep.size and not unit.kept:
            self._drop(unit)

    def _drop(self, unit: Unit) -> None:
        unit.present, unit.visits = False, 0
        for parameter in unit.shards:
            parameter.data = parameter.new_empty(0)

    def _bring(self, index: int) -> None:
        """Makes a unit present and sends for the next ones."""
        unit = self.units[index]
        coming = self._ahead.pop(index, None) or self._send(unit)
        for work in coming.works:
            work.wait()
        if self._copies:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        for (parameter, shard), whole in zip(unit.shards.items(), coming.whole, strict=True):
            parameter.data = whole[: shard.numel].view(shard.shape)
        unit.present = unit.came = True
        following = [u for u in self.units[index + 1 :] if not u.came][:2]
        if following and following[0].index not in self._ahead:
            self._ahead[following[0].index] = self._send(following[0])
        for shard in following[-1].shards.values() if following else ():
            shard.prefetch()  # from a disk: it takes longer than the way to the device

    def _send(self, unit: Unit) -> _Coming:
        """Copies this rank's part to the device and gathers the others'; on CUDA, in background."""
        coming, size, rank = _Coming(), distributed.world_size(), distributed.rank()
        for shard in unit.shards.values():
            whole = torch.empty(shard.part * size, dtype=shard.dtype, device=self.device)
            coming.whole.append(whole)
        if self._copies:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            for shard, whole in zip(unit.shards.values(), coming.whole, strict=True):
                mine = whole.narrow(0, rank * shard.part, shard.part)
                mine.copy_(shard.read(), non_blocking=True)
                if size > 1:
                    work = dist.all_gather_into_tensor(whole, mine, async_op=True)
                    coming.works.append(work)
        self.traffic.bytes_moved += unit.nbytes
        return coming


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """(module, the parameters its forward uses) in order: whole layers, else a module's own."""
    own = list(module.parameters(recurse=False))
    if own:
        yield module, own
    for child in module.children():
        if isinstance(module, nn.ModuleList):
            yield child, list(child.parameters())
        else:
            yield from _places(child)
