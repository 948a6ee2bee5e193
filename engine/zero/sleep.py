"""Sleep of a trained role: its optimizer's tensors go to host memory and come back.

A sleeping tensor is a view of host memory (pinned on CUDA), so whoever reads or writes it, as a
checkpoint does, finds the true values. DeepSpeed's own offload_states moves FusedAdam only and
copies one way at a time (seen in 0.19.8).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.zero import layout
from gearshift.engine.zero.pinned import Block
from gearshift.engine.zero.split_adamw import SplitAdamW

_ALIGNMENT = 512  # bytes: tensors start where any dtype may, as in torch's own allocators


class Arena:
    """Host memory of two roles that sleep in turns: two stacks, one from each end.

    Where one role's tensors come back while the other's leave, it need not hold both.
    """

    def __init__(self, size: int, *, pinned: bool):
        """size: bytes."""
        self._block, self.pinned = Block(size, pinned=pinned), pinned
        self.stacks: tuple[list[int], list[int]] = ([], [])  # bytes of each tensor

    @property
    def memory(self) -> Tensor:
        return self._block.memory

    @property
    def room(self) -> int:
        return self.memory.numel() - sum(map(sum, self.stacks))

    def next_place(self, side: int, like: Tensor) -> Tensor:
        """Where the next tensor of a side would lie, a view of the arena; not taken before push."""
        size, used = padded(like.nbytes), sum(self.stacks[side])
        assert size <= self.room, "the arena was made too small"
        start = used if side == 0 else self.memory.numel() - used - size
        return self.memory[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def push(self, side: int, size: int) -> None:
        self.stacks[side].append(padded(size))

    def pop(self, side: int) -> None:
        self.stacks[side].pop()

    def holds(self, tensor: Tensor) -> bool:
        return _storage(tensor) == _storage(self.memory)


class Sleeper:
    """The optimizer and the gradient buffers of one role's engine.

    engine: DeepSpeed's, at any ZeRO stage; its states move between two updates only. sleep: see
    residence.py; "auto" is "never" here, as a plan decides before. offloaded: DeepSpeed itself
    keeps the optimizer on the host. side: 0 or 1, this role's end of the arena.
    """

    def __init__(self, engine: Any, sleep: str, *, offloaded: bool = False):
        self.engine, self.side, self._offloaded = engine, 0, offloaded
        self.sleep = "never" if offloaded or sleep == "auto" else sleep
        self.device = torch.empty(0, device=engine.device).device  # "cuda" becomes "cuda:0"
        self.asleep: list[Tensor] = []  # in the order of the arena's stack
        self._zero = engine.optimizer
        self._inner = layout.inner_optimizer(self._zero)

    @property
    def awake(self) -> bool:
        return not self.asleep

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(what, tensor) of all that may leave: the master weights where they are no weights of the
        model, and the optimizer's state of each."""
        yield from (("master", master) for master in self._masters() if master.numel())
        for state in self._inner.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and value.numel() > 1:
                    yield ("low master bits" if name == "low" else "moments"), value

    def sizes(self) -> list[int]:
        """Bytes that each of `tensors` takes in the arena once the first update has made all."""
        sizes = [padded(master.nbytes) for master in self._masters()]
        for master in (group.master for group in layout.groups(self._zero)):
            if isinstance(self._inner, SplitAdamW):
                moment = self._inner.moments.itemsize * master.numel()
                sizes += [padded(2 * master.numel()), padded(moment), padded(moment)]
            else:
                sizes += [padded(master.nbytes)] * 2
        return sizes

    def relink(self) -> None:
        """Tells DeepSpeed that tensors have changed their places."""
        layout.relink(self._zero)

    def fetch_strays(self) -> None:
        """Brings moments to the device that are on the host outside the arena, of a role that is
        awake: loading a checkpoint makes them where the master weights are, which may be asleep."""
        for state in self._inner.state.values() if not self._offloaded else ():
            for value in state.values():
                if torch.is_tensor(value) and value.device != self.device and not self.asleep:
                    value.data = value.to(self.device)

    def free_gradients(self) -> None:
        """Gives the gradient buffers' memory back; views of them stay valid for make_gradients."""
        for buffer in (*layout.gradient_buffers(self._zero), *layout.reduce_buckets(self._zero)):
            buffer.untyped_storage().resize_(0)

    def make_gradients(self) -> None:
        """Zeros, as DeepSpeed makes them: a parameter without a gradient is not written."""
        for buffer in layout.gradient_buffers(self._zero):
            if _regrown(buffer):
                buffer.zero_()
        for buffer in layout.reduce_buckets(self._zero):
            _regrown(buffer)

    def device_bytes(self, seen: set[int]) -> dict[str, int]:
        """Bytes of storages on the device by what they are, under the planner's names.

        seen: addresses of storages that are counted already; gets those that are counted here.
        """
        found: dict[str, int] = {}

        def add(what: str, tensor: Tensor) -> None:
            storage, here = tensor.untyped_storage(), tensor.device.type == self.device.type
            if here and storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[what] = found.get(what, 0) + storage.nbytes()

        for parameter in self.engine.module.parameters():
            if not layout.is_partitioned(parameter):
                add("weights", parameter)
                continue
            if not layout.is_on_disk(parameter):
                add("weights", layout.partition(parameter))
            add("small weights, whole", parameter)
        for layer in self.engine.module.modules():
            for tensor in getattr(layer, "magnitudes", ()):  # of weights in 4 bit
                add("weights", tensor)
        for buffer in layout.reduce_buckets(self._zero):
            add("reduce buckets", buffer)
        if self._offloaded:
            return found
        asleep = {id(tensor) for tensor in self.asleep}
        for what, tensor in self.tensors():
            if id(tensor) not in asleep:
                add(what, tensor)
        for buffer in layout.gradient_buffers(self._zero):
            add("gradients", buffer)
        return found

    def _masters(self) -> list[Tensor]:
        """Master weights that are no weights of the model; those of stage 0 stay."""
        if not self.engine.zero_optimization_stage():
            return []
        weights = {_storage(layout.partition(p)) for p in self.engine.module.parameters()}
        masters = [group.master for group in layout.groups(self._zero)]
        return [master for master in masters if _storage(master) not in weights]


class Exchange:
    """Moves whole tensors between a device and the arena, one each way at a time.

    On CUDA the two copies run at once, on streams of their own. A tensor changes place only after
    its copy is complete, so a failed copy leaves it where it was.
    """

    def __init__(self, arena: Arena, device: torch.device):
        self.arena, self.device, self.moved = arena, device, 0
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if arena.pinned else []

    @torch.no_grad()
    def run(self, leaving: list[Sleeper], coming: list[Sleeper]) -> int:
        """Returns the bytes moved, both ways together."""
        before = self.moved
        out = [(role, t) for role in leaving for t in self._still_here(role)]
        back = [(role, t) for role in coming for t in role.asleep]
        freed = 0  # bytes that have left the device less those that have come
        try:
            while out or back:
                goes = out[0] if out and padded(out[0][1].nbytes) <= self.arena.room else None
                comes = back[-1] if back and (not out or freed >= back[-1][1].nbytes) else None
                if goes is None and comes is None:
                    assert back, "the arena was made too small"
                    comes = back[-1]
                self._pass(goes, comes)
                freed += (goes[1].nbytes if goes else 0) - (comes[1].nbytes if comes else 0)
                out, back = out[bool(goes) :], back[: len(back) - bool(comes)]
        finally:
            for role in coming:
                role.fetch_strays()
            for role in (*leaving, *coming):
                role.relink()
        return self.moved - before

    def _still_here(self, role: Sleeper) -> list[Tensor]:
        """What has to leave. Tensors that something else replaced meanwhile, as loading a
        checkpoint does, leave anew, after all others have come back."""
        tensors = [tensor for _, tensor in role.tensors()]
        here = [tensor for tensor in tensors if not self.arena.holds(tensor)]
        if here and role.asleep:
            while role.asleep:
                self._pass(None, (role, role.asleep[-1]))
            here = tensors
        return here

    def _pass(self, goes: tuple | None, comes: tuple | None) -> None:
        """One tensor out of the device, one in, or both."""
        copies = []
        if goes:
            role, tensor = goes
            copies.append((tensor, self.arena.next_place(role.side, tensor)))
        if comes and self.arena.holds(comes[1]):
            copies.append((comes[1], torch.empty_like(comes[1], device=self.device)))
        self._copy(copies)
        for tensor, target in copies:
            tensor.data = target
            self.moved += target.nbytes
        if goes:
            goes[0].asleep.append(goes[1])
            self.arena.push(goes[0].side, goes[1].nbytes)
        if comes:
            comes[0].asleep.pop()
            self.arena.pop(comes[0].side)

    def _copy(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        current = torch.cuda.current_stream(self.device) if self._streams else None
        streams = self._streams or [None, None]
        for (source, target), stream in zip(copies, streams, strict=False):
            with torch.cuda.stream(stream) if stream else nullcontext():
                if stream:
                    stream.wait_stream(current)
                target.copy_(source, non_blocking=True)
        for stream in self._streams:
            stream.synchronize()


def padded(size: int) -> int:
    """Bytes that a tensor takes in the arena."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _regrown(buffer: Tensor) -> bool:
    """Gives a freed buffer its memory; False where it had it."""
    storage, size = buffer.untyped_storage(), buffer.nbytes
    if storage.nbytes():
        return False
    storage.resize_(size)
    return True
