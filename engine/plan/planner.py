"""The memory and time plan of a run, from configurations alone: `gearshift plan`, and start-up.

It plans what the code does: states are where their DeepSpeed JSON puts them, and where the table of
zero/residence.py moves them in a phase; the KV cache gets what is left in generation. Bytes are per
rank, or per node of the host.
"""

import math
from bisect import bisect_left
from dataclasses import replace

from gearshift.engine.attention.cache import CPU_CACHE_GB, GPU_CACHE_SHARE
from gearshift.engine.config.schema import Config
from gearshift.engine.gearbox.spec import BUCKET_MB
from gearshift.engine.models.cast import Part, within_actor
from gearshift.engine.models.fused import fuses
from gearshift.engine.models.shapes import Shape, shape_of
from gearshift.engine.phase import Phase, update_of
from gearshift.engine.plan import bytes as model
from gearshift.engine.plan import seconds as plan_time
from gearshift.engine.plan.bytes import Zero
from gearshift.engine.plan.choice import choices
from gearshift.engine.plan.hardware import GB, Hardware
from gearshift.engine.plan.record import LATER, PhasePlan, Plan, Role, sleeps_of
from gearshift.engine.plan.seconds import Work
from gearshift.engine.zero import residence
from gearshift.kernels.head.projection import CPU_LOGITS_BYTES, CUDA_LOGITS_BYTES

TOLERANCE = 0.05  # of planned bytes; compare.py tells of larger deviations
_SHAPES: dict[tuple[str, str, str, bool], Shape] = {}


def plan(config: Config, parts: dict[str, Part], hardware: Hardware) -> Plan:
    """The Plan of a run: the fastest that fits of what the configuration leaves open.

    parts: of models.cast. Raises ConfigError where what they name cannot be read.
    """
    roles = tuple(_role(config, part, hardware) for part in parts.values())
    trained = [role.name for role in roles if role.trained]
    settled = choices(config, trained, shared=hardware.shared)
    plans = [_Planner(choice, roles, hardware).plan() for choice in settled]
    fitting = [made for made in plans if made.fits]
    if fitting:
        return min(fitting, key=_weighed_seconds)
    return min(plans, key=lambda made: made.peak.total)


def _weighed_seconds(made: Plan) -> float:
    """Of a step; a fifth more where less room is left than the plan may be off by."""
    tight = made.peak.total > (1 - TOLERANCE) * made.hardware.usable
    return made.step_seconds * (1.2 if tight else 1.0)


def _role(config: Config, part: Part, hardware: Hardware) -> Role:
    world, fused = hardware.world, not hardware.shared and fuses(part.hf_config, part.section.liger)
    zero = Zero.of(part.settings, fused=fused)
    # Made once of each text: a module takes seconds to make, and advice plans many times.
    key = part.hf_config.to_json_string(use_diff=False), part.kind, str(part.lora), part.still
    if key not in _SHAPES:
        with part.errors():
            _SHAPES[key] = shape_of(part.hf_config, part.kind, part.lora, still=part.still)
    shape = _SHAPES[key]
    on_base = part.base is not None
    if part.trained:
        optimizer = getattr(config, part.name).optimizer
        states = model.trained_states(shape, zero, world, optimizer, on_base=on_base)
    else:
        states = model.frozen_states(shape, zero, world, on_base=on_base)
    return Role(part=part, shape=shape, zero=zero, states=states)


def _forward_tokens(rows: int, length: int, most: int | None, budget: int | None) -> int:
    """The most that a forward over at most `rows` rows may read: shorter rows fill the budget."""
    tokens = min(rows, most or rows) * length
    return tokens if budget is None else min(tokens, max(budget, length))


def _pieces(rows: int, length: int, tokens: int) -> int:
    """Forwards of at most `tokens` that read `rows` full rows."""
    return math.ceil(rows / (tokens // length))


class _Planner:
    def __init__(self, config: Config, roles: tuple[Role, ...], hardware: Hardware):
        self.config, self.roles, self.hw = config, roles, hardware
        self.by_name = {role.name: role for role in roles}
        self.actor = self.by_name["actor"]
        ppo = config.ppo
        rows = math.ceil(ppo.rows_per_step / hardware.world)
        length = config.data.max_prompt_tokens + config.sampling.max_new_tokens
        most = max(ppo.passes(role)[1] for role in ("actor", "critic"))
        self.together = update = math.ceil(most / hardware.world)  # rows of an optimizer step
        self.scored = _forward_tokens(rows, length, ppo.score_batch_size, ppo.score_tokens)
        self.learned = _forward_tokens(update, length, ppo.micro_batch_size, ppo.micro_tokens)
        self.several = _pieces(update, length, self.learned) > 1
        self.work = Work(
            rows=rows,
            prompt=config.data.max_prompt_tokens,
            response=config.sampling.max_new_tokens,
            score_pieces=_pieces(rows, length, self.scored),
        )
        self.sleeps, self.joint = sleeps_of(config, roles), ppo.update == "joint"
        self.host = self._host()
        self.tp = self._tp()

    def plan(self) -> Plan:
        generate, slots, wanted = self._generate()
        phases = [self._load(), generate, *self._scores(), *self._updates(), self._save()]
        trained = [role for role in self.roles if role.trained]
        moving = {r.name: sum(self._movable(r)) for r in trained}
        return Plan(
            config=self.config,
            hardware=self.hw,
            roles=self.roles,
            phases=tuple(phases),
            tp=self.tp,
            most_tokens=self._most_tokens(),
            kv_slots=slots,
            kv_wanted=wanted,
            swap_seconds=plan_time.swap_seconds(moving, self.sleeps, self.hw, joint=self.joint),
            refuse_reason=self._refusal(phases, slots),
        )

    def _resident(self, phase: Phase) -> dict[str, float]:
        """What is on the GPU in a phase: 'actor fp32 master' and so on."""
        kept = self._kept() if phase not in (Phase.LOAD, Phase.GENERATE) else {}
        return self._states(phase) | kept

    def _kept(self) -> dict[str, float]:
        """What rollout.weights=resident leaves on the GPU between generations."""
        rollout = self.config.rollout
        if rollout.weights != "resident":
            return {}
        kept = {"generation shards": self._shards()}
        if self._keeps_cache and not self.hw.shared:
            kept |= {"grouped weights": self._grouped(), "KV cache": rollout.kv_cache_gb * GB}
            kept["cuBLAS workspaces"] = self._workspaces()  # captured graphs use them
        return kept

    @property
    def _keeps_cache(self) -> bool:
        """Whether the KV cache stays between generations; it is then taken whole at once."""
        rollout = self.config.rollout
        return rollout.weights == "resident" and rollout.kv_cache_gb > 0

    def _workspaces(self) -> float:
        """What a streamed pass leaves: one of each of its threads, which are its micro-batches."""
        streamed = not self.hw.shared and any(role.streamed for role in self.roles)
        return float(self.hw.gpu.workspace * self.work.score_pieces * streamed)

    def _states(self, phase: Phase) -> dict[str, float]:
        """Those of the larger role where they take turns: either may have trained last."""
        turns = residence.take_turns(self.sleeps, joint=self.joint)
        lasts = ("critic", "actor") if turns else ("critic",)
        found = [self._states_after(phase, last) for last in lasts]
        return max(found, key=lambda states: sum(states.values()))

    def _states_after(self, phase: Phase, last: str) -> dict[str, float]:
        row = residence.where(phase.of_run(joint=self.joint), self.sleeps, last)
        found = {}
        for role in self.roles:
            for what, size in role.states.gpu.items():
                place = row.get(role.name)
                away = place and (
                    (model.is_optimizer(what) and place.optimizer != "device")
                    or (model.is_gradients(what) and place.gradients != "device")
                )
                if not away:
                    found[f"{role.name} {what}"] = size
        return found

    def _movable(self, role: Role) -> list[float]:
        return model.movable(role.shape, role.zero, self.hw.world, role.states)

    def _host(self) -> float:
        """Of a node: what DeepSpeed keeps there, and the room of those who sleep."""
        steady = sum(self._steady_host(role) for role in self.roles)
        movable = {name: self._movable(self.by_name[name]) for name in self.sleeps}
        asleep = residence.host_bytes(self.sleeps, movable, joint=self.joint)
        return self.hw.gpus_per_node * (steady + asleep)

    def _steady_host(self, role: Role) -> float:
        """Nothing is pinned on CPU."""
        rounding = role.states.host.get("pinned rounding", 0.0) if self.hw.shared else 0.0
        return role.states.steady_host - rounding

    def _tp(self) -> int:
        """As Gearbox chooses it: the least whose shards fill half of what is free."""
        if self.config.rollout.tp or self.hw.world == 1:
            return self.config.rollout.tp or 1
        if self.hw.shared:
            return 1
        resident = sum(self._resident(Phase.LOAD).values())
        node, free = self.hw.gpus_per_node, self.hw.usable - resident
        sizes = [size for size in range(1, node + 1) if node % size == 0]
        weights = self.actor.zero.size * self.actor.shape.total
        return next((size for size in sizes if weights / size <= free / 2), node)

    def _load(self) -> PhasePlan:
        resident = {
            f"{r.name} {what}": size for r in self.roles for what, size in r.states.gpu.items()
        }
        gpu = {what: size for what, size in resident.items() if not what.endswith(LATER)}
        read = sum(r.zero.size * r.shape.total for r in self.roles if not r.part.base)
        return PhasePlan(name=Phase.LOAD, gpu=gpu, host=self.host, seconds=read / plan_time.DISK)

    def _generate(self) -> tuple[PhasePlan, int, int]:
        actor, rollout, work = self.actor, self.config.rollout, self.work
        shape, size = actor.shape, actor.zero.size
        gpu = self._resident(Phase.GENERATE)
        gpu["generation shards"] = self._shards()
        if shape.packed:
            gpu["dequantised weight"] = float(size * max(shape.packed))
        if not self.hw.shared:
            gpu["grouped weights"] = self._grouped()
        staging = rollout.shift_bucket_mb or BUCKET_MB["cpu" if self.hw.shared else "cuda"]
        gpu["shift staging"] = staging * 2**20 * (self.hw.world > 1)
        prefill = model.scoring_activations(shape, actor.zero, rollout.max_batch_tokens)
        # Logits of the drawing rows in the model's dtype, and the sampler's fp32 form; where tokens
        # are banned one more, scaled and raised, and a mask.
        sampling = self.config.sampling
        banning = 9 * bool(sampling.suppress_tokens or sampling.min_new_tokens)
        drawing = min(rollout.max_sequences, work.rows * self.tp)
        logits = drawing * shape.vocabulary * (size + 4 + banning)
        gpu["prefill and logits"] = prefill + logits
        per_token = shape.kv_bytes_per_token(self.tp, size)
        sequence = math.ceil(work.length / rollout.block_size + 1) * rollout.block_size * per_token
        wanted = min(rollout.max_sequences, work.rows * self.tp)
        free = GPU_CACHE_SHARE * (self.hw.usable - sum(gpu.values()) + gpu["prefill and logits"])
        budget = rollout.kv_cache_gb * GB or (CPU_CACHE_GB * GB if self.hw.shared else free)
        slots = max(0, min(wanted, int(budget // sequence)))
        gpu["KV cache"] = float(budget if self._keeps_cache else slots * sequence)
        apart = bool(shape.adapted) and not self._merges
        seconds = plan_time.generate_seconds(
            shape, actor.zero, work, self.hw, self.tp, slots or wanted, dequantises=apart
        )
        if apart:
            seconds *= plan_time.UNMERGED
        made = PhasePlan(name=Phase.GENERATE, gpu=gpu, host=self.host, seconds=seconds)
        return made, slots, wanted

    def _grouped(self) -> float:
        """None where adapters stay beside the weights: rollout/engine.py."""
        actor = self.actor
        beside = actor.shape.adapted and not self._merges
        return 0.0 if beside else model.grouped_weights(actor.shape, self.tp, actor.zero.size)

    def _shards(self) -> float:
        """Zero where the generation gear has views of the weights, but for those that adapters are
        added to or that are dequantised."""
        zero, shape = self.actor.zero, self.actor.shape
        partitioned = zero.stage == 3 and self.hw.world > 1
        if not partitioned and self.tp == 1 and zero.parameters == "gpu":
            return float(zero.size * max(shape.adapted, sum(shape.packed)) * self._merges)
        return zero.size * shape.total / self.tp

    @property
    def _merges(self) -> bool:
        return self.config.actor.lora.generate != "unmerged"

    def _scores(self) -> list[PhasePlan]:
        own = (Phase.LOGPROBS, Phase.REFERENCE, Phase.VALUES)
        named = dict(zip(("actor", "reference", "critic"), own, strict=True))
        order = [r for r in self.roles if r.name not in named]
        order += [self.by_name[name] for name in named if name in self.by_name]
        made = [self._score(role, named.get(role.name, Phase.REWARDS)) for role in order]
        if within_actor(self.config):
            made.append(self._score(self.actor, Phase.REFERENCE))
        return made

    def _score(self, role: Role, phase: Phase) -> PhasePlan:
        ppo, work, zero, tokens = self.config.ppo, self.work, role.zero, self.scored
        if phase is Phase.REWARDS and role.part.section.batch_size:
            most = role.part.section.batch_size
            tokens = _forward_tokens(work.rows, work.length, most, ppo.score_tokens)
        gpu = self._resident(phase) | {"cuBLAS workspaces": self._workspaces()}
        if role.streamed:
            gpu["streamed weights"] = model.streamed_weights(role.shape, zero)
            gpu["paused forwards"] = model.paused_forwards(role.shape, zero, work.tokens)
        else:
            gpu["gathered weights"] = model.live_weights(role.shape, zero, self.hw.world)
        gpu["activations"] = model.scoring_activations(role.shape, zero, tokens)
        if role.shape.head:
            response = self._responses(tokens)
            gpu["logits chunk"] = model.logits_chunk(
                role.shape, zero, response, training=False, most=self._logits_bytes
            )
        seconds = plan_time.score_seconds(role.shape, zero, work, self.hw, streamed=role.streamed)
        return PhasePlan(name=phase.planned, gpu=gpu, host=self.host, seconds=seconds)

    def _updates(self) -> list[PhasePlan]:
        return [self._update(role) for role in self.roles if role.trained]

    def _update(self, role: Role) -> PhasePlan:
        zero, shape = role.zero, role.shape
        recompute = getattr(self.config, role.name).gradient_checkpointing
        phase = update_of(role.name)
        gpu = self._resident(phase) | self._update_parts(role, self.learned)
        work = self._training(role.name)
        seconds = plan_time.train_seconds(shape, zero, work, self.hw, recompute)
        return PhasePlan(name=phase, gpu=gpu, host=self.host, seconds=seconds)

    def _training(self, role: str) -> Work:
        """The work with the epochs of a role."""
        ppo, work = self.config.ppo, self.work
        epochs, size = ppo.passes(role)
        update = math.ceil(size / self.hw.world)
        pieces = work.rows // update * _pieces(update, work.length, self.learned)
        return replace(work, train_pieces=pieces, epochs=epochs, updates=ppo.updates(role))

    def _responses(self, tokens: int) -> int:
        """How many of a forward's tokens are of responses."""
        return math.ceil(tokens * self.work.response / self.work.length)

    def _update_parts(self, role: Role, tokens: int) -> dict[str, float]:
        """The larger of a backward over `tokens` and an optimizer step; they do not meet."""
        zero, shape, world = role.zero, role.shape, self.hw.world
        recompute = getattr(self.config, role.name).gradient_checkpointing
        backward = {
            "gathered weights": model.live_weights(shape, zero, world),
            "activations": model.training_activations(shape, zero, tokens, recompute),
            "logits chunk": model.logits_chunk(
                shape, zero, self._responses(tokens), training=True, most=self._logits_bytes
            ),
            "gradients in flight": model.reduce_transient(shape, zero, world, several=self.several),
        }
        step = {"optimizer step": model.step_transient(shape, zero, world)}
        if zero.optimizer != "gpu":
            step = {}
        return max(backward, step, key=lambda parts: sum(parts.values()))

    def _save(self) -> PhasePlan:
        trained = [role for role in self.roles if role.trained]
        exports = self.config.run.export
        whole = max(role.zero.size * role.shape.total for role in trained) if exports else 0.0
        written = sum(
            plan_time.save_seconds(r.shape, getattr(self.config, r.name).optimizer, self.hw)
            for r in trained
        )
        # Export: rank 0 holds the whole model on the host, and gathers a parameter at a time.
        gpu = self._resident(Phase.SAVE)
        if exports:
            gpu |= {"one parameter": 4.0 * max(self.actor.shape.numels)}
        return PhasePlan(name=Phase.SAVE, gpu=gpu, host=self.host + whole, seconds=written)

    def _untouched(self) -> float:
        """Of a node: pages of DeepSpeed's buckets that a model never fills, which a CPU rank
        therefore never gets."""
        kept = [role for role in self.roles if "reduce buckets" in role.states.gpu]
        spare = [r.zero.communication * (r.zero.reduce_bucket - r.shape.total) for r in kept]
        return self.hw.gpus_per_node * sum(size for size in spare if size > 0)

    @property
    def _logits_bytes(self) -> int:
        return CPU_LOGITS_BYTES if self.hw.shared else CUDA_LOGITS_BYTES

    def _most_tokens(self) -> int:
        trained = [role for role in self.roles if role.trained]
        rooms = {
            r.name: self.hw.usable - sum(self._resident(update_of(r.name)).values())
            for r in trained
        }

        def exceeds(tokens: int) -> bool:
            return any(sum(self._update_parts(r, tokens).values()) > rooms[r.name] for r in trained)

        longest = self.together * self.work.length
        return bisect_left(range(1, longest + 1), True, key=exceeds)

    def _refusal(self, phases: list[PhasePlan], slots: int) -> str | None:
        hardware, worst = self.hw, max(phases, key=lambda phase: phase.total)
        host = max(phases, key=lambda phase: phase.host)
        needs = [
            (worst.name, worst.total, "GPU", hardware.usable),
            (host.name, host.host, "host", hardware.usable_host),
        ]
        if hardware.shared:
            node = worst.total * hardware.gpus_per_node + worst.host - self._untouched()
            needs = [(worst.name, node, "host", hardware.usable_host)]
        for phase, needed, place, usable in needs:
            if needed > usable:
                return f"{phase} needs {needed / GB:.1f} GB of a {place}'s {usable / GB:.1f} usable"
        few = slots < 1 and not hardware.shared
        return "generate has no room for the KV cache of one sequence" if few else None
