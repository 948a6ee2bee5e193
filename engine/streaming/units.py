"""Which weights of a module come to the device together, and how many are there at once.

A unit is a layer, or another module's own parameters; see engine.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(eq=False)
class Unit:
    """Weights that come and go together."""

    index: int  # in the order of the module tree, which most forwards follow
    parameters: list[nn.Parameter]
    modules: list[nn.Module] = field(default_factory=list)  # whose forwards use them
    kept: bool = False  # to the end of a pass: used at more than one place


def cut(module: nn.Module) -> list[Unit]:
    """The units of a module, in order. Each parameter is in one unit, that of the first module that
    uses it: where others use it as well (tied embeddings), the unit stays to the end of a pass."""
    units: list[Unit] = []
    home: dict[nn.Parameter, Unit] = {}
    for user, parameters in _places(module):
        shared = {home[p].index for p in parameters if p in home}
        new = list(dict.fromkeys(p for p in parameters if p not in home))
        for index in sorted(shared):
            units[index].kept = True
            units[index].modules.append(user)
        if new:
            # What a module owns beside its submodules it may use before and after each of them.
            beside = any(user.children()) and len(new) != len(list(user.parameters()))
            units.append(Unit(len(units), new, [user], kept=beside))
            home |= dict.fromkeys(new, units[-1])
    return units


def most_at_once(sizes: Sequence[int], kept: Sequence[bool]) -> int:
    """The most that is on the device, given each unit's size: the one in use, the one on its way,
    and those before them that stay."""
    most = staying = 0
    for index, size in enumerate(sizes):
        most = max(most, staying + sum(sizes[index : index + 2]))
        staying += size * kept[index]
    return most


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """(module, the parameters its forward uses) in order: whole layers, else a module's own."""
    own = list(module.parameters(recurse=False))
    if own:
        yield module, own
    for child in module.children():
        if isinstance(module, _LISTS):
            yield child, list(child.parameters())
        else:
            yield from _places(child)
