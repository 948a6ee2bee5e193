"""A frozen model whose weights live on the host or on a disk, and visit the device once per pass.

DeepSpeed fetches an offloaded weight for every micro-batch. Here all micro-batches of a pass go
through the model together, layer by layer: a layer's weights come once, from this rank's 1/N of
them and an all-gather between the ranks, and the next layer's come while this one computes. On the
device are two layers, what is used at several places (tied embeddings), and the pass's hidden
states. Each micro-batch is the model's own forward, which a hook stops where it needs weights that
have not come (lockstep.py): any transformers model will do, and its results are the same to
rounding (a product may sum in another order where its operands lie elsewhere in memory).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.streaming import units
from gearshift.engine.streaming.lockstep import Lockstep
from gearshift.engine.streaming.store import RankPart, take_over, unit_bytes

T = TypeVar("T")


class _Lending(dict):
    """A module's parameters, which come when one is read: `lend(parameter)` sees to it."""

    def __init__(self, parameters: dict[str, nn.Parameter], lend: Callable):
        super().__init__(parameters)
        self._lend = lend

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        self._lend(parameter)
        return parameter


@dataclass(eq=False)
class _Guest:
    """A unit's weights and where they are in a pass."""

    unit: units.Unit
    parts: list[RankPart]
    present: bool = False
    came: bool = False  # in this pass
    called: bool = False  # in this pass: somebody needed it
    idle: bool = False  # nobody needed it in the last pass
    users: set[threading.Thread] = field(default_factory=set)  # that have been through it

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass
class Traffic:
    """What this rank brought from host or disk to the device."""

    passes: int = 0
    bytes_moved: int = 0
    least_bytes: int = 0  # of this rank's part of the weights that each pass used

    def __sub__(self, other: "Traffic") -> "Traffic":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Traffic(*(mine - theirs for mine, theirs in pairs))

    @property
    def ratio(self) -> float:
        """Bytes moved over the least: 1.0 where each weight came once per pass."""
        return self.bytes_moved / self.least_bytes


@dataclass
class _Coming:
    """A unit on its way to the device."""

    whole: list[Tensor] = field(default_factory=list)  # [world size * count] of each parameter
    works: list[Any] = field(default_factory=list)


class StreamedEngine:
    """Stands where a DeepSpeed engine would; a call is one forward without gradients.

    module: partitioned by ZeRO-3, its partitions in a store (store.py), which are taken over.
    Collective: every rank makes as many passes, of one micro-batch or more, and its forwards use
    the units in the same order; inside a unit, as the experts of a layer, they may differ.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module.eval(), device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stream: Any = None  # of the pass
        self._lockstep: Any = None  # a Lockstep while a pass goes on
        self._ahead: dict[int, _Coming] = {}
        self.store, parts = take_over(module)
        self.guests = [_Guest(u, [parts[p] for p in u.parameters]) for u in units.cut(module)]
        self._home = {p: guest for guest in self.guests for p in guest.unit.parameters}
        self.store.begin(max(unit_bytes(guest.parts) for guest in self.guests))
        self.traffic = Traffic()
        module.to(device)  # buffers; the parameters have no data
        self._hook()

    def eval(self) -> "StreamedEngine":
        return self

    def __call__(self, *inputs: Any) -> Any:
        return self.together([lambda: self.module(*inputs)])[0]

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """One pass: the results of calls that use the module, in order."""
        assert self._lockstep is None, "a pass inside a pass"
        self._lockstep = Lockstep(calls, self._setting)
        if self._copies:
            self._stream = torch.cuda.current_stream(self.device)
        try:
            with torch.no_grad():
                results = self._lockstep.run(self._bring)
        finally:
            self._lockstep = None
            self._recall()
        self.traffic.passes += 1
        for guest in self.guests:
            self.traffic.least_bytes += guest.nbytes * guest.called
            guest.idle, guest.called = not guest.called, False
        return results

    @contextmanager
    def _setting(self) -> Iterator[None]:
        """What holds in the thread that makes the pass, for the threads of its calls: no gradients,
        and on CUDA the same device and stream. All are settings of a thread."""
        with torch.no_grad(), ExitStack() as stack:
            if self._copies:
                # The device first: leaving the stream alone would make a context on the first GPU.
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            yield

    def _hook(self) -> None:
        for guest in self.guests:
            for module in guest.unit.modules:
                module.register_forward_pre_hook(lambda *_, guest=guest: self._visit(guest))
                module.register_forward_hook(lambda *_, guest=guest: self._leave(guest))
        for module in self.module.modules():
            # Some models read a parameter where no module is called: a table, a tied head.
            module._parameters = _Lending(module._parameters, self._lend)

    def _lend(self, parameter: nn.Parameter | None) -> None:
        if self._lockstep and self._lockstep.is_mine() and parameter is not None:
            self._visit(self._home[parameter])

    def _visit(self, guest: _Guest) -> None:
        """A micro-batch needs the unit, and goes on when the weights are there."""
        guest.called = True
        if not guest.present:
            self._lockstep.wait_for(guest.unit.index)

    def _leave(self, guest: _Guest) -> None:
        guest.users.add(threading.current_thread())
        if len(guest.users) == self._lockstep.size and not guest.unit.kept:
            self._drop(guest)

    def _drop(self, guest: _Guest) -> None:
        guest.present = False
        guest.users.clear()
        for parameter in guest.unit.parameters:
            parameter.data = parameter.new_empty(0)

    def _recall(self) -> None:
        """Nothing stays on the device, after a failure neither."""
        if self._copies:
            # Memory that is given back must not be written to any more.
            for work in (work for coming in self._ahead.values() for work in coming.works):
                work.wait()
            self._stream.wait_stream(self._copies)
        self._ahead.clear()
        for guest in self.guests:
            self._drop(guest)
            guest.came = False

    def _bring(self, index: int) -> None:
        """Makes a unit present and sends for the next ones."""
        guest = self.guests[index]
        guest.unit.kept |= guest.came  # used again after all were through: it stays from now on
        coming = self._ahead.pop(index, None) or self._send(guest)
        for work in coming.works:
            work.wait()
        if self._copies:
            self._stream.wait_stream(self._copies)
        for p, part, whole in zip(guest.unit.parameters, guest.parts, coming.whole, strict=True):
            p.data = whole[: part.numel].view(part.shape)
        guest.present = guest.came = True
        following = [g for g in self.guests[index + 1 :] if not (g.came or g.idle)][:2]
        if following and following[0].unit.index not in self._ahead:
            self._ahead[following[0].unit.index] = self._send(following[0])
        if len(following) > 1:
            self.store.ahead(following[1].parts)  # a disk takes longer than the way to the device
        beat()

    def _send(self, guest: _Guest) -> _Coming:
        """Copies this rank's part to the device and gathers the others'; on CUDA, in background."""
        coming, size, rank = _Coming(), distributed.world_size(), distributed.rank()
        for part in guest.parts:
            whole = torch.empty(part.count * size, dtype=part.dtype, device=self.device)
            coming.whole.append(whole)
        values = self.store.read(guest.parts)
        if self._copies:
            self._copies.wait_stream(self._stream)
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            for part, value, whole in zip(guest.parts, values, coming.whole, strict=True):
                mine = whole.narrow(0, rank * part.count, part.count)
                mine.copy_(value, non_blocking=True)
                if size > 1:
                    work = dist.all_gather_into_tensor(whole, mine, async_op=True)
                    coming.works.append(work)
            self.store.copied(guest.parts)
        self.traffic.bytes_moved += guest.nbytes
        return coming
