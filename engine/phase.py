"""The phases of a run, once: their names in figures, their order, and who trains in them."""

from enum import StrEnum


class Phase(StrEnum):
    """In the order of a run. The value names it in timing_s/, memory_gb/ and states_gb/."""

    LOAD = "load"
    GENERATE = "generate"
    REWARDS = "rewards"
    LOGPROBS = "logprobs"
    REFERENCE = "ref"
    VALUES = "values"
    UPDATE_ACTOR = "update_actor"
    UPDATE_CRITIC = "update_critic"
    UPDATE_JOINT = "update_joint"  # actor and critic on the same minibatches
    SAVE = "save"

    @property
    def planned(self) -> str:
        """As plans call it."""
        return "reference" if self is Phase.REFERENCE else self.value

    @property
    def trains(self) -> frozenset[str]:
        """The roles whose weights change."""
        return frozenset(_TRAINS.get(self, ()))

    def of_run(self, *, joint: bool) -> "Phase":
        """What the phase is where actor and critic train jointly; figures keep update_actor."""
        return Phase.UPDATE_JOINT if joint and self.trains else self


_TRAINS = {
    Phase.UPDATE_ACTOR: ("actor",),
    Phase.UPDATE_CRITIC: ("critic",),
    Phase.UPDATE_JOINT: ("actor", "critic"),
}


def update_of(role: str) -> Phase:
    """The phase in which a role trains alone."""
    return Phase(f"update_{role}")


def phases(*, joint: bool) -> tuple[Phase, ...]:
    """Those of a run, whose actor and critic train jointly or in turn."""
    left_out = {Phase.UPDATE_ACTOR, Phase.UPDATE_CRITIC} if joint else {Phase.UPDATE_JOINT}
    return tuple(phase for phase in Phase if phase not in left_out)
