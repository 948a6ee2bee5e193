"""What a plan says: roles, phases, and whether the run fits."""

from collections.abc import Iterable
from dataclasses import dataclass

from gearshift.engine.config.schema import Config
from gearshift.engine.models.cast import Part
from gearshift.engine.models.shapes import Shape
from gearshift.engine.phase import Phase
from gearshift.engine.plan.bytes import States, Zero
from gearshift.engine.plan.hardware import Hardware
from gearshift.engine.zero import residence

LATER = ("moments", "low master bits", "whole")  # states that the first update makes


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of the run, as it is planned."""

    part: Part
    shape: Shape
    zero: Zero
    states: States

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def trained(self) -> bool:
        return self.part.trained

    @property
    def streamed(self) -> bool:
        """Whether its weights visit the device once per pass."""
        return not self.trained and self.zero.parameters != "gpu"


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """Bytes of a rank's GPU by what they are, of a node's host in all, and expected seconds."""

    name: str
    gpu: dict[str, float]
    host: float
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.gpu.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step is expected to take. refuse_reason: None where it fits.

    config: the run's, with every choice made that it leaves to the plan. most_tokens: the largest
    ppo.micro_batch_tokens that fits, 0 for none. kv_slots: sequences of full length that the cache
    of a TP group holds, at most kv_wanted. swap_seconds: of states on their way to and from the
    host.
    """

    config: Config
    hardware: Hardware
    roles: tuple[Role, ...]
    phases: tuple[PhasePlan, ...]
    tp: int
    most_tokens: int
    kv_slots: int
    kv_wanted: int
    swap_seconds: float
    refuse_reason: str | None

    @property
    def fits(self) -> bool:
        return self.refuse_reason is None

    @property
    def peak(self) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def step_seconds(self) -> float:
        done = sum(p.seconds for p in self.phases if p.name not in (Phase.LOAD, Phase.SAVE))
        return done + self.swap_seconds

    @property
    def sleeps(self) -> dict[str, residence.Sleep]:
        """Of the trained roles; an optimizer that DeepSpeed keeps on the host is there anyway."""
        return sleeps_of(self.config, self.roles)

    @property
    def told(self) -> str:
        """What was chosen for the trained roles, in a line."""
        chosen = {role.name: getattr(self.config, role.name) for role in self.roles if role.trained}
        ppo = self.config.ppo
        rows = f"at most {ppo.micro_batch_size} rows a micro-batch" if ppo.micro_batch_size else ""
        tokens = f"micro_batch_tokens={ppo.micro_tokens}" if ppo.micro_tokens else ""
        return "; ".join(
            f"{name} sleep={own.sleep}, recompute {'on' if own.gradient_checkpointing else 'off'}"
            for name, own in chosen.items()
        ) + "".join(f"; {said}" for said in (tokens, rows) if said)

    @property
    def assumed(self) -> str | None:
        """What was taken for granted about a model, in a line."""
        return next(filter(None, (role.part.assumption for role in self.roles)), None)

    def trained_bytes(self, phase: PhasePlan) -> float:
        """What actor and critic hold on the device in a phase, in every step but the first."""
        known = {f"{r.name} {what}" for r in self.roles if r.trained for what in r.states.gpu}
        return sum(size for what, size in phase.gpu.items() if what in known)

    def not_yet(self, phase: PhasePlan) -> float:
        """Bytes of a phase that its first time does without: AdamW makes a role's moments in its
        first update, after which ZeRO-3 keeps its small weights whole."""
        done: dict[str, tuple[str, ...]] = {
            Phase.UPDATE_ACTOR: ("actor",),
            Phase.UPDATE_CRITIC: ("actor", "critic"),
        }
        if self.config.ppo.update == "joint":
            done[Phase.UPDATE_ACTOR] = done[Phase.UPDATE_CRITIC]
        updated = done.get(phase.name, ())
        waiting = [r.name for r in self.roles if r.trained and r.name not in updated]
        return sum(
            size
            for what, size in phase.gpu.items()
            if what.startswith(tuple(f"{name} " for name in waiting)) and what.endswith(LATER)
        )


def sleeps_of(config: Config, roles: Iterable[Role]) -> dict[str, residence.Sleep]:
    """Of the trained roles; an optimizer that DeepSpeed keeps on the host never moves."""
    return {
        role.name: getattr(config, role.name).sleep if role.zero.optimizer == "gpu" else "never"
        for role in roles
        if role.trained
    }
