"""Trained roles sleep: no bit of what they learn depends on it, and their memory is really free."""

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gearshift.engine.phase import Phase, phases
from gearshift.engine.zero import residence, sleep
from tests.tiny import models as tiny
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run
from tests.zero import sleep_on_ranks as ranks_sleep

pytestmark = pytest.mark.bits


FAST = ("zero1_bf16", "zero3", "split2")


@functools.cache
def on_two_ranks(fast: bool) -> dict:
    """What sleep_on_ranks.py found on rank 0, in FAST's cases or in the others."""
    folder = Path(tempfile.mkdtemp(prefix="gearshift-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    cases = ",".join(case for case in ranks_sleep.CASES if (case in FAST) == fast)
    on_ranks.launch("zero/sleep_on_ranks.py", tiny_run.write_models(folder), folder, cases)
    return json.loads((folder / "rank0.json").read_text())


SLEPT = [
    pytest.param(case, how, marks=[] if case in FAST else pytest.mark.slow)
    for case, (_, _, sleeps) in ranks_sleep.CASES.items()
    for how in sleeps
]


@pytest.mark.parametrize(("case", "how"), SLEPT)
def test_a_run_that_sleeps_is_the_resident_run_to_the_bit(case, how):
    """Weights, master weights, moments and figures after two PPO steps, on two ranks."""
    found = on_two_ranks(case in FAST)[case][how]
    assert found["same"] == {"weights": True, "state": True, "figures": True}
    assert (found["host"] > 0) == (how != "gradients")


@pytest.mark.parametrize(("case", "how"), SLEPT)
def test_who_sleeps_holds_nothing_but_weights(case, how):
    """As the roles report it; and what a walk over all live tensors finds besides, such as the
    rollout, grows from the loaded models on as it does in the resident run: there is no copy."""
    found = on_two_ranks(case in FAST)[case]
    for phase, seen in found[how]["seen"].items():
        row = residence.where(Phase(phase), {"actor": how, "critic": how})
        for role, place in row.items():
            held = {what for what, size in seen["roles"].items() if what.startswith(role) and size}
            states = {what for what in held if "weights" not in what}
            if place.optimizer == "host":
                assert not states, (phase, states)
            elif place.gradients == "freed":
                assert not any("gradients" in s or "buckets" in s for s in states), (phase, states)
        grown = found["never"]["seen"][phase]["besides"] - found["never"]["besides"]
        # A role's states are 20 to 100 kB.
        assert seen["besides"] - found[how]["besides"] == pytest.approx(grown, abs=5_000), phase


def test_joint_updates_keep_both_awake():
    sleeps = {"actor": "always", "critic": "always"}
    assert all(
        p.optimizer == "device" for p in residence.where(Phase.UPDATE_JOINT, sleeps).values()
    )
    assert Phase.UPDATE_JOINT in phases(joint=True)
    assert Phase.UPDATE_CRITIC not in phases(joint=True)


def test_host_memory_holds_one_role_where_they_exchange():
    sizes = {"actor": [100, 100, 100], "critic": [80, 80, 80]}
    both, one = (
        residence.host_bytes({"actor": how, "critic": how}, sizes, joint=False)
        for how in ("always", "exchange")
    )
    assert (both, one) == (540, 500)
    large = {name: size * 100 for name, size in sizes.items()}
    turns = {"actor": "exchange", "critic": "exchange"}
    assert residence.host_bytes(turns, large, joint=False) == 30_000 + 2 * 100
    assert residence.host_bytes({"actor": "exchange"}, {"actor": [100]}, joint=False) == 0


def test_who_trained_last_trains_first(tmp_path):
    """Where both exchange: their states pass one another once a step, and the numbers are those of
    a run in which all is resident."""
    models, found = tiny_run.write_models(tmp_path / "models"), {}
    for how in ("exchange", "never"):
        with tiny_run.alone():
            trainer = tiny_run.trainer(ranks_sleep.settings(models, "zero3", {}, how))
            moved, order = [], []
            trainer.residence.enter = watched(trainer.residence, moved, order)
            figures = [trainer.step(tiny_run.prompts(trainer.ppo, step))[0] for step in range(3)]
        kept = ("loss/policy_avg", "loss/value_avg", "actor/grad_norm", "critic/grad_norm")
        found[how] = [[step[name] for name in kept] for step in figures]
        if how == "exchange":
            assert order == ["update_actor", "update_critic", "update_critic", "update_actor"] + [
                "update_actor",
                "update_critic",
            ]
            # The first step makes the moments; of each later one half the phases move nothing.
            assert [bool(size) for size in moved[2:]] == [False, True, False, True]
    assert found["exchange"] == found["never"]


def test_joint_updates_take_no_turns(tmp_path):
    """The critic's states are the larger: with tied weights it is the actor and a score head."""
    models = tiny_run.write_models(tmp_path / "models")
    config = ranks_sleep.settings(models, "zero3", {}, "exchange")
    critic = tiny.save_reward(tmp_path / "larger", hidden_size=96)
    config = tiny_run.with_critic(config, critic)
    with tiny_run.alone():
        trainer = tiny_run.trainer(replace(config, ppo=replace(config.ppo, update="joint")))
        for step in range(2):
            trainer.step(tiny_run.prompts(trainer.ppo, step))
        trainer.residence.enter(Phase.GENERATE)
        sleepers = trainer.residence.sleepers
        assert sleepers["critic"].awake and not sleepers["actor"].awake


def watched(place, moved, order):
    enter = place.enter

    def entering(phase):
        size = enter(phase)
        if phase.trains:
            moved.append(size)
            order.append(str(phase))
        return size

    return entering


def table(sleeps):
    """Of a run that trains its roles in turn, as docs/memory.md has it."""
    head = [f"{role} {what}" for role in sleeps for what in ("optimizer", "gradients")]
    lines = [f"| phase | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
    for phase in phases(joint=False):
        places = residence.where(phase, sleeps).values()
        cells = [cell for place in places for cell in (place.optimizer, place.gradients)]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_in_the_docs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text()
    for how in ("gradients", "exchange", "always"):
        assert table({"actor": how, "critic": how}) in page


@pytest.fixture
def trained(tmp_path):
    """A trainer of one rank after a PPO step, whose roles exchange places."""
    with tiny_run.alone():
        models = tiny_run.write_models(tmp_path)
        config = ranks_sleep.settings(models, "zero3", {}, "exchange")
        trainer = tiny_run.trainer(config)
        trainer.step(tiny_run.prompts(config.ppo, 0))
        yield trainer


def states(trainer) -> list[torch.Tensor]:
    sleepers = trainer.residence.sleepers.values()
    return [tensor.clone() for sleeper in sleepers for _, tensor in sleeper.tensors()]


def test_a_sleeping_state_can_be_read_and_written(trained):
    """As a checkpoint does, without waking anybody."""
    actor = trained.residence.sleepers["actor"]
    assert not actor.awake and trained.residence.sleepers["critic"].awake
    before = states(trained)
    with torch.no_grad():
        for _, tensor in actor.tensors():
            tensor.mul_(2)
    trained.residence.enter(Phase.UPDATE_ACTOR)
    assert actor.awake
    after = states(trained)
    count = len(actor.sizes())
    assert all(torch.equal(a, 2 * b) for a, b in zip(after[:count], before[:count], strict=True))
    assert all(map(torch.equal, after[count:], before[count:]))


@pytest.mark.parametrize("broken", [1, 2, 4])
def test_a_fault_on_the_way_loses_nothing(trained, monkeypatch, broken):
    """The copy of the nth piece fails; every state is where it was or where it should be, and the
    next attempt ends the move."""
    before, copy, calls = states(trained), sleep.Exchange._copy, []

    def failing(self, copies):
        calls.append(copies)
        if len(calls) == broken:
            raise RuntimeError("no memory")
        copy(self, copies)

    monkeypatch.setattr(sleep.Exchange, "_copy", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        trained.residence.enter(Phase.UPDATE_ACTOR)
    assert all(map(torch.equal, states(trained), before))
    trained.residence.enter(Phase.UPDATE_ACTOR)
    assert trained.residence.sleepers["actor"].awake
    assert all(map(torch.equal, states(trained), before))
    trained.residence.enter(Phase.UPDATE_CRITIC)
    assert all(map(torch.equal, states(trained), before))


def test_a_fault_inside_a_phase_leaves_a_run_that_goes_on(trained, monkeypatch):
    """A step whose update dies, and one after it that does not."""
    loss = type(trained.critic).loss
    monkeypatch.setattr(type(trained.critic), "loss", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.step(tiny_run.prompts(trained.ppo, 1))
    monkeypatch.setattr(type(trained.critic), "loss", loss)
    figures, _ = trained.step(tiny_run.prompts(trained.ppo, 2))
    assert figures["critic/grad_norm"] > 0


def test_replaced_states_are_found(trained):
    """Loading may put new tensors where sleeping ones were."""
    actor = trained.residence.sleepers["actor"]
    inner = trained.actor.engine.optimizer.optimizer
    for state in inner.state.values():
        state["exp_avg"] = torch.full_like(state["exp_avg"], 3.0)
    held = trained.residence.device_bytes()
    assert held["actor moments"] > 0  # the new ones are on the device
    trained.residence.enter(Phase.GENERATE)
    assert "actor moments" not in trained.residence.device_bytes()
    trained.residence.enter(Phase.UPDATE_ACTOR)
    moments = [s["exp_avg"] for s in inner.state.values()]
    assert all((m == 3.0).all() for m in moments) and actor.awake
