"""Which state of which trained role is where in each phase: the gearbox table, and who obeys it.

Weights stay on the device. What a role needs for its own update only, the optimizer's tensors and
the gradient buffers, may leave it meanwhile; `sleep` of a role says how far.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gearshift.engine.phase import Phase, phases
from gearshift.engine.zero.sleep import Arena, Exchange, Sleeper

Sleep = Literal["never", "gradients", "exchange", "always"]  # from the most device memory
Place = Literal["device", "host", "freed"]
Part = Literal["train", "give_way", "wait", "stay"]


@dataclasses.dataclass(frozen=True)
class Where:
    """Where the state of one role is in a phase.

    optimizer: master weights (or their low bits) and moments. gradients: the buffers in which
    gradients add up and are reduced; between two updates they hold nothing, so they are freed.
    """

    optimizer: Place
    gradients: Place


def _part(role: str, phase: Phase, last: str) -> Part:
    """What a phase makes a role do: train; give way to the other one's training; or neither, in
    which case the role that trained last stays and the other waits."""
    if role in phase.trains:
        return "train"
    if phase.trains:
        return "give_way"
    return "stay" if role == last else "wait"


_HERE, _NO_BUFFERS = Where("device", "device"), Where("device", "freed")
_AWAY = Where("host", "freed")
GEARS: dict[Sleep, dict[Part, Where]] = {
    "never": {"train": _HERE, "give_way": _HERE, "wait": _HERE, "stay": _HERE},
    "gradients": {
        "train": _HERE,
        "give_way": _NO_BUFFERS,
        "wait": _NO_BUFFERS,
        "stay": _NO_BUFFERS,
    },
    "exchange": {"train": _HERE, "give_way": _AWAY, "wait": _AWAY, "stay": _NO_BUFFERS},
    "always": {"train": _HERE, "give_way": _AWAY, "wait": _AWAY, "stay": _AWAY},
}


def take_turns(sleeps: Mapping[str, Sleep], *, joint: bool) -> bool:
    """Whether states pass one another once a step, not twice: the role that trained last, whose
    states are there, trains first in the next step (Residence.order)."""
    return not joint and len(sleeps) == 2 and set(sleeps.values()) == {"exchange"}


def where(phase: Phase, sleeps: Mapping[str, Sleep], last: str = "critic") -> dict[str, Where]:
    """The row of a phase. sleeps: of the trained roles; a role without company always stays. last:
    the one that trained last."""
    parts = {role: _part(role, phase, last) for role in sleeps}
    if len(parts) == 1 and "train" not in parts.values():
        parts = dict.fromkeys(parts, "stay")
    return {role: GEARS[sleeps[role]][part] for role, part in parts.items()}


def host_bytes(
    sleeps: Mapping[str, Sleep], movable: Mapping[str, Iterable[float]], *, joint: bool
) -> float:
    """Host memory of the sleeping states: the fullest phase, and room to pass one another.

    movable: bytes of each tensor of a role's optimizer, once the moments exist.
    """
    sizes = {role: sum(movable[role]) for role in sleeps}
    rows = [where(phase, sleeps) for phase in phases(joint=joint)]
    fullest = max(sum(sizes[r] for r in row if row[r].optimizer == "host") for row in rows)
    sleeping = [r for r in sleeps if any(row[r].optimizer == "host" for row in rows)]
    largest = max((size for role in sleeping for size in movable[role]), default=0)
    return min(fullest + 2 * largest, sum(sizes[role] for role in sleeping))


class Residence:
    """Brings the trained roles' states where the table wants them.

    sleepers: of each trained role, see sleep.py. They share host memory, made when first needed.
    """

    def __init__(self, sleepers: Mapping[str, Any], *, joint: bool):
        self.sleepers, self.joint = dict(sleepers), joint
        self.sleeps = {name: sleeper.sleep for name, sleeper in sleepers.items()}
        self.exchange: Exchange | None = None
        self._last = "critic"
        for side, sleeper in enumerate(self.sleepers.values()):
            sleeper.side = side

    def order(self, steps_done: int) -> list[str]:
        """Who trains first in a step, and who then. The updates do not depend on each other; the
        masks of adapters' dropout, which all draw from one generator, depend on their order."""
        turned = take_turns(self.sleeps, joint=self.joint) and steps_done % 2
        return ["critic", "actor"] if turned else ["actor", "critic"]

    def enter(self, phase: Phase) -> int:
        """Moves what the phase wants elsewhere; returns the bytes moved, both ways together.

        Safe to repeat: after a fault on the way, what had moved is where it should be and the rest
        where it was.
        """
        row = where(phase.of_run(joint=self.joint), self.sleeps, self._last)
        if take_turns(self.sleeps, joint=self.joint) and phase.trains:
            (self._last,) = phase.trains
        for role, place in row.items():
            if place.gradients == "freed":
                self.sleepers[role].free_gradients()
        leaving = [self.sleepers[r] for r, place in row.items() if place.optimizer == "host"]
        coming = [self.sleepers[r] for r, place in row.items() if place.optimizer == "device"]
        moved = self._move(leaving, coming)
        for role, place in row.items():
            if place.gradients == "device":
                self.sleepers[role].make_gradients()
        return moved

    def device_bytes(self) -> dict[str, int]:
        """Bytes on the device now by role and what they are, as "actor moments"; those of a base
        that both have adapters on are the first role's."""
        seen: set[int] = set()
        return {
            f"{role} {what}": size
            for role, sleeper in self.sleepers.items()
            for what, size in sleeper.device_bytes(seen).items()
        }

    @property
    def host_bytes(self) -> int:
        """Host memory of the sleeping states, for the rest of the run."""
        return self.exchange.arena.memory.nbytes if self.exchange else 0

    def _move(self, leaving: list[Sleeper], coming: list[Sleeper]) -> int:
        if not leaving and self.exchange is None:
            return 0
        if self.exchange is None:
            sizes = {name: sleeper.sizes() for name, sleeper in self.sleepers.items()}
            size = int(host_bytes(self.sleeps, sizes, joint=self.joint))
            device = leaving[0].device
            self.exchange = Exchange(Arena(size, pinned=device.type == "cuda"), device)
        return self.exchange.run(leaving, coming)
