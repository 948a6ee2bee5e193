"""Which state of which trained role is where in each phase: the gearbox table, and who obeys it.

Weights stay on the device. What a role needs for its own update only, the optimizer's tensors and
the gradient buffers, may leave it meanwhile; `sleep` of a role says how far.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from gearshift.engine.zero.sleep import Arena, Exchange, Sleeper

Sleep = Literal["never", "gradients", "exchange", "always"]
Place = Literal["device", "host", "freed"]
Part = Literal["train", "yield", "wait", "stay"]

# From the most device memory to the least.
SLEEPS: tuple[Sleep, ...] = get_args(Sleep)


@dataclasses.dataclass(frozen=True)
class Where:
    """optimizer: master weights (or their low bits) and moments. gradients: the buffers of
    gradients and of their reduction, which hold nothing between two updates and are not copied."""

    optimizer: Place
    gradients: Place


# What a phase makes each role do: train; yield to the other one's training; or neither, in which
# case `stay` is the role that trained last and `wait` the other.
PARTS: dict[str, dict[str, Part]] = {
    "load": {"actor": "wait", "critic": "stay"},
    "generate": {"actor": "wait", "critic": "stay"},
    "rewards": {"actor": "wait", "critic": "stay"},
    "logprobs": {"actor": "wait", "critic": "stay"},
    "ref": {"actor": "wait", "critic": "stay"},
    "values": {"actor": "wait", "critic": "stay"},
    "update_actor": {"actor": "train", "critic": "yield"},
    "update_critic": {"actor": "yield", "critic": "train"},
    "update_joint": {"actor": "train", "critic": "train"},
    "save": {"actor": "wait", "critic": "stay"},
}

_HERE, _NO_BUFFERS = Where("device", "device"), Where("device", "freed")
_AWAY = Where("host", "freed")
GEARS: dict[Sleep, dict[Part, Where]] = {
    "never": {"train": _HERE, "yield": _HERE, "wait": _HERE, "stay": _HERE},
    "gradients": {"train": _HERE, "yield": _NO_BUFFERS, "wait": _NO_BUFFERS, "stay": _NO_BUFFERS},
    "exchange": {"train": _HERE, "yield": _AWAY, "wait": _AWAY, "stay": _NO_BUFFERS},
    "always": {"train": _HERE, "yield": _AWAY, "wait": _AWAY, "stay": _AWAY},
}


def where(phase: str, sleeps: Mapping[str, Sleep]) -> dict[str, Where]:
    """The row of a phase. sleeps: of the trained roles; a role without company always stays."""
    parts = PARTS[phase]
    found = {}
    for role, sleep in sleeps.items():
        alone = len(sleeps) == 1 and parts[role] != "train"
        found[role] = GEARS[sleep]["stay" if alone else parts[role]]
    return found


def phases(*, joint: bool) -> tuple[str, ...]:
    """The phases of a run, in their order. joint: actor and critic train on the same minibatches,
    which the metrics call update_actor."""
    left_out = {"update_actor", "update_critic"} if joint else {"update_joint"}
    return tuple(phase for phase in PARTS if phase not in left_out)


def host_bytes(
    sleeps: Mapping[str, Sleep], movable: Mapping[str, Iterable[int]], *, joint: bool
) -> int:
    """Host memory of the sleeping states: the fullest phase, and room to pass one another.

    movable: bytes of each tensor of a role's optimizer, once the moments exist.
    """
    sizes = {role: sum(movable[role]) for role in sleeps}
    rows = [where(phase, sleeps) for phase in phases(joint=joint)]
    fullest = max(sum(sizes[r] for r in row if row[r].optimizer == "host") for row in rows)
    sleeping = [r for r in sleeps if any(row[r].optimizer == "host" for row in rows)]
    largest = max((size for role in sleeping for size in movable[role]), default=0)
    return min(fullest + 2 * largest, sum(sizes[role] for role in sleeping))


def markdown(sleeps: Mapping[str, Sleep], *, joint: bool = False) -> str:
    """The table of a run, for people."""
    head = [f"{role} {what}" for role in sleeps for what in ("optimizer", "gradients")]
    lines = [f"| phase | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
    for phase in phases(joint=joint):
        row = where(phase, sleeps)
        cells = [p for r in sleeps for p in (row[r].optimizer, row[r].gradients)]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


class Residence:
    """Brings the trained roles' states where the table wants them.

    sleepers: of each trained role, see sleep.py. They share host memory, made when first needed.
    """

    def __init__(self, sleepers: Mapping[str, Any], *, joint: bool):
        self.sleepers, self.joint = dict(sleepers), joint
        self.sleeps = {name: sleeper.sleep for name, sleeper in sleepers.items()}
        self.exchange: Exchange | None = None
        for side, sleeper in enumerate(self.sleepers.values()):
            sleeper.side = side

    def enter(self, phase: str) -> int:
        """Moves what the phase wants elsewhere; returns the bytes moved, both ways together.

        Safe to repeat: after a fault on the way, what had moved is where it should be and the rest
        where it was.
        """
        both = self.joint and phase == "update_actor"
        row = where("update_joint" if both else phase, self.sleeps)
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
        """Bytes on the device now by role and what they are, as "actor moments"."""
        return {
            f"{role} {what}": size
            for role, sleeper in self.sleepers.items()
            for what, size in sleeper.device_bytes().items()
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
            size = host_bytes(self.sleeps, sizes, joint=self.joint)
            device = leaving[0].device
            self.exchange = Exchange(Arena(size, pinned=device.type == "cuda"), device)
        return self.exchange.run(leaving, coming)
