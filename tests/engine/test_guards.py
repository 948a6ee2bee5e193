"""Guards: each fires on its planted fault, in real trainers of tiny models, and only then."""

import json
import math
from dataclasses import replace

import pytest
import torch

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import GuardConfig
from gearshift.engine.guards import Guards, GuardStop, is_due
from gearshift.engine.zero.unreached import GradientWatch
from gearshift.launch import train
from tests.tiny import job as tiny_job
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run
from tests.tiny.guarded import UPDATES, make, same, state, step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with tiny_run.alone():
        yield tiny_run.write_models(tmp_path_factory.mktemp("models"))


# The gradient of an optimizer step


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_poisoned_sample_drops_the_update_and_is_named(models, zero):
    trainer = make(models, zero)
    assert step(trainer)[1] == []
    before = list(state(trainer.actor))
    assert len(before) > 20  # weights, moments and schedule
    score = trainer.critic.values

    def poisoned(rollout):
        values, after = score(rollout)
        values[3, 0] = torch.nan
        return values, after

    trainer.critic.values = poisoned
    figures, alarms = step(trainer)
    # Whitening spreads it to every row's advantages, but the cause that is told is one row's value;
    # the critic meets the row in one minibatch of each epoch.
    dropped = {"actor": UPDATES, "critic": UPDATES // 2}
    assert figures["guards/skipped_updates"] == sum(dropped.values())
    assert not math.isfinite(figures["actor/grad_norm"])
    assert same(before, trainer.actor)
    for (role, count), alarm in zip(dropped.items(), alarms, strict=True):
        engine = getattr(trainer, role).engine
        assert (engine.global_steps, engine.skipped_steps) == (2 * UPDATES, count)
        assert getattr(trainer, role).schedule.last_epoch == 2 * UPDATES - count
        assert alarm.guard == "nonfinite" and not alarm.stop
        told = f"update of the {role} was dropped, its gradient is not finite: the values of row"
        assert told in alarm.text and 'prompt "w' in alarm.text
        assert f"lower {role}.optimizer.lr" in alarm.text
    rows = tiny_run.prompts(trainer.ppo, 1).row_ids
    assert f"row {int(rows[3])}, " in alarms[0].text

    trainer.critic.values = score
    figures, alarms = step(trainer)
    assert alarms == [] and figures["guards/skipped_updates"] == 0
    assert math.isfinite(figures["actor/grad_norm"])
    assert not same(before, trainer.actor)
    assert trainer.actor.schedule.last_epoch == 2 * UPDATES


def poison_loss(trainer) -> None:
    """A loss that is infinite and has a finite gradient."""
    loss = trainer.actor.loss

    def poisoned(micro, weights):
        found, stats = loss(micro, weights)
        return found + torch.where(micro.row_ids.eq(5).any(), torch.inf, 0.0), stats

    trainer.actor.loss = poisoned


def poison_backward(trainer) -> None:
    weight = trainer.actor.lm.model.layers[1].mlp.down_proj.weight
    weight.register_hook(lambda gradient: gradient * torch.inf)


def poison_forward(trainer) -> None:
    loss = trainer.actor.loss

    def poisoned(micro, weights):
        found, stats = loss(micro, weights)
        row = micro.response_mask.nonzero()[:, 0]
        bad = micro.row_ids[row] == 5
        stats["logprobs"] = torch.where(bad, torch.nan, stats["logprobs"])
        return found * torch.where(bad.any(), torch.nan, 1.0), stats

    trainer.actor.loss = poisoned


@pytest.mark.parametrize(
    ("plant", "zero", "told"),
    [
        (poison_forward, "zero0", "what the model computes of row 5, prompt"),
        (poison_loss, "zero3", "the loss of rows"),
        (poison_backward, "zero0", "the loss of every sample is finite, so it is the backward"),
    ],
)
def test_where_it_came_from(models, plant, zero, told):
    trainer = make(models, zero, epochs=1)
    before = list(state(trainer.actor))
    plant(trainer)
    trainer.critic = None
    figures, alarms = step(trainer)
    everywhere = plant is poison_backward
    assert figures["guards/skipped_updates"] == (2 if everywhere else 1)  # one minibatch has row 5
    assert same(before, trainer.actor) == everywhere
    assert len(alarms) == 1 and told in alarms[0].text


def test_dropped_updates_in_a_row_stop_the_run(models):
    trainer = make(models, guards={"nonfinite_steps": 2}, kl_controller="adaptive")
    score, coefficient = trainer.actor.logprobs, trainer.kl.coef
    trainer.actor.logprobs = lambda rollout: score(rollout) * torch.nan
    assert [alarm.stop for alarm in step(trainer)[1]] == [False, False]  # of actor and critic
    assert trainer.kl.coef == coefficient  # a KL that is no number moves nothing
    trainer.actor.logprobs = score
    assert step(trainer)[1] == []  # starts anew
    trainer.actor.logprobs = lambda rollout: score(rollout) * torch.nan
    assert not any(alarm.stop for alarm in step(trainer)[1])
    *_, last = step(trainer)[1]
    assert last.stop and "in 2 PPO steps in a row" in last.text
    assert "guards.nonfinite_steps" in last.text


def test_the_first_dropped_update_may_stop_the_run(models):
    trainer = make(models, guards={"nonfinite": "stop"})
    poison_backward(trainer)
    assert [alarm.stop for alarm in step(trainer)[1]] == [False, True]


# Parameters without a gradient


def cut(trainer) -> None:
    """A detach in the model's code: what lies before it in one layer no longer learns."""
    trainer.actor.lm.model.layers[0].mlp.register_forward_hook(lambda *args: args[-1].detach())


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_frozen_parameters_are_named_once(models, zero):
    trainer = make(models, zero)
    cut(trainer)
    _, alarms = step(trainer)
    (alarm,) = alarms
    assert alarm.guard == "frozen" and not alarm.stop
    assert "the actor has 4 trainable parameters without a gradient: " in alarm.text
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"):
        assert f"lm.model.layers.0.{name}.weight" in alarm.text
    assert step(trainer)[1] == []


def test_frozen_parameters_can_stop_the_run_before_the_first_update(models):
    trainer = make(models, guards={"frozen": "stop"})
    before = list(state(trainer.actor))
    cut(trainer)
    with pytest.raises(GuardStop, match="guard frozen: the actor has 4 trainable"):
        step(trainer)
    assert same(before, trainer.actor)


def test_parameters_that_should_not_train_are_not_missed():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[0].requires_grad_(False)
    watch = GradientWatch(module)
    module(torch.ones(1, 2)).sum().backward()
    assert watch.unreached(CPU) == []


# The figures of a step


def test_a_healthy_run_is_silent(models):
    """With every guard as eager as it can be, but for those that wait for a critic to learn."""
    eager = {name: 1 for name in ("negative_kl_steps", "entropy_steps", "no_eos_steps")} | {
        "constant_reward_steps": 1,
        "ratio_limit": 1e-4,
        "entropy_share": 0.5,
    }
    for zero in ("zero0", "zero3"):
        trainer = make(models, zero, guards=eager)
        for _ in range(3):
            figures, alarms = step(trainer)
            assert alarms == []
            assert figures["guards/skipped_updates"] == figures["guards/failed_rewards"] == 0


def dropout(trainer) -> None:
    def drop(module, arguments, output):
        return torch.nn.functional.dropout(output, 0.5, torch.is_grad_enabled())

    for layer in trainer.actor.lm.model.layers:
        layer.mlp.register_forward_hook(drop)


def never_ends(trainer) -> None:
    trainer.actor.sampler.eos_token_ids = [tiny_run.VOCABULARY]  # an id that the model has not


def wild_critic(trainer) -> None:
    with torch.no_grad():
        trainer.critic.model.score.weight.normal_(std=30.0)


def collapse(trainer) -> None:
    trainer.guards._first_entropy = None
    step(trainer)
    with torch.no_grad():
        trainer.actor.lm.lm_head.weight.mul_(40)


def alien_sampler(trainer) -> None:
    """Responses of another model, which the reference takes for its own."""
    models = trainer.actor.lm.name_or_path.rsplit("/", 1)[0]
    config = replace(trainer.config, actor=replace(trainer.config.actor, path=f"{models}/tied"))
    other = tiny_run.trainer(config)
    trainer.actor.generate = other.actor.generate
    trainer.roles.reference.logprobs = other.actor.logprobs


def constant(trainer) -> None:
    scores = trainer.roles.rewards.scores

    def flat(rollout, tokenizer):
        found = scores(rollout, tokenizer)
        return found._replace(total=torch.full_like(found.total, 0.7))

    trainer.roles.rewards.scores = flat


@pytest.mark.parametrize(
    ("guard", "plant", "told", "knobs"),
    [
        ("ratio", dropout, "away from 1 before any update", {}),
        ("no_eos", never_ends, "no response ended by itself", {"no_eos_steps": 2}),
        (
            "explained_variance",
            wild_critic,
            "the critic's explained variance is -",
            {"explained_variance_steps": 1, "explained_variance_after": 0},
        ),
        ("entropy", collapse, "nats per token", {"entropy_steps": 1}),
        ("negative_kl", alien_sampler, "the mean KL to the reference is -", {"rows": 32}),
        (
            "constant_reward",
            constant,
            "every score is 0.7",
            {"constant_reward_steps": 2},
        ),
    ],
)
def test_a_planted_fault_fires_its_guard(models, guard, plant, told, knobs):
    rows = knobs.pop("rows", 8)
    trainer = make(models, guards=knobs, epochs=1, minibatch_size=rows, prompts_per_step=rows)
    plant(trainer)
    trainer.guards.drain()
    steps = getattr(trainer.guards.guards, f"{guard}_steps", 1)
    for _ in range(steps - 1):
        assert not [a for a in step(trainer)[1] if a.guard == guard]
    (alarm,) = (a for a in step(trainer)[1] if a.guard == guard)
    assert told in alarm.text and not alarm.stop
    assert "; " in alarm.text and "." in alarm.text.split("; ", 1)[1]  # cause and knob


FIGURES = {
    "step": 30.0,
    "objective/kl": 1.0,
    "objective/kl_std": 4.0,
    "objective/scores": 0.5,
    "objective/scores_std": 0.2,
    "policy/entropy_avg": 2.0,
    "rollout/ratio_first_max": 0.02,
    "response/finished_fraction": 0.5,
    "critic/vf_explained_var": 0.3,
}


def fired(guards: Guards, **figures: float) -> list[str]:
    guards.watch(FIGURES | {name.replace("__", "/"): value for name, value in figures.items()})
    return [alarm.guard for alarm in guards.drain()]


def test_bounds(models):
    config = tiny_run.config(models)  # 8 rows a step
    half, whole = (Guards(config, None, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert fired(half) == [] and fired(whole) == ["ratio"]
    assert fired(half, rollout__ratio_first_max=1.1) == ["ratio"]
    once = GuardConfig(negative_kl_steps=1, explained_variance_steps=1)
    guards = Guards(replace(config, guards=once), None, torch.bfloat16)
    # Four standard errors of eight responses are 4 * 4 / sqrt(8) = 5.66 nats.
    assert fired(guards, objective__kl=-5.6) == []
    assert fired(guards, objective__kl=-5.7) == ["negative_kl"]
    assert fired(guards, objective__kl=-0.009, objective__kl_std=0.0) == []  # rounding
    assert fired(guards, critic__vf_explained_var=-0.1) == ["explained_variance"]
    assert fired(guards, critic__vf_explained_var=-0.1, step=20) == []
    assert fired(guards, critic__vf_explained_var=math.nan) == []  # constant returns
    assert fired(guards, policy__entropy_avg=math.nan) == []


BROKEN = {
    "ratio": {"rollout__ratio_first_max": 2.0},
    "negative_kl": {"objective__kl": -9.0},
    "entropy": {"policy__entropy_avg": 0.1},
    "explained_variance": {"critic__vf_explained_var": -1.0},
    "no_eos": {"response__finished_fraction": 0.0},
    "constant_reward": {"objective__scores_std": 0.0},
}


@pytest.mark.parametrize("guard", BROKEN)
def test_actions(models, guard):
    stops = {}
    for action in ("ignore", "warn", "stop"):
        knobs = {guard: action} | ({} if guard == "ratio" else {f"{guard}_steps": 1})
        config = replace(tiny_run.config(models), guards=GuardConfig(**knobs))
        guards = Guards(config, None, torch.bfloat16)
        assert fired(guards) == []
        guards.watch(FIGURES | {n.replace("__", "/"): v for n, v in BROKEN[guard].items()})
        stops[action] = [alarm.stop for alarm in guards.drain() if alarm.guard == guard]
    assert stops == {"ignore": [], "warn": [False], "stop": [True]}


def test_what_spans_steps_is_saved(models):
    config = replace(tiny_run.config(models), guards=GuardConfig(entropy_steps=3, no_eos_steps=2))
    guards = Guards(config, None, torch.bfloat16)
    assert fired(guards) == []
    low = {"policy__entropy_avg": 0.19, "response__finished_fraction": 0.0}
    assert fired(guards, **low) == []
    resumed = Guards(config, None, torch.bfloat16)
    resumed.load_state_dict(json.loads(json.dumps(guards.state_dict())))
    assert fired(resumed, **low) == fired(guards, **low) == ["no_eos"]
    assert fired(resumed, **low) == fired(guards, **low) == ["entropy"]
    assert fired(Guards(config, None, torch.bfloat16), **low) == []  # has no first entropy


def test_a_lasting_fault_is_told_ever_more_rarely():
    assert [n for n in range(100) if is_due(n, 5)] == [5, 10, 20, 40, 80]
    assert [n for n in range(20) if is_due(n, 1)] == [1, 2, 4, 8, 16]


# A run


def test_a_run_that_is_stopped(tmp_path, monkeypatch, capsys):
    """One line and status 1; its figures stay and the step is not saved."""
    tiny_job.alone(monkeypatch)
    path = tiny_job.write(tmp_path, run={"steps": 3})
    (tmp_path / "reward.py").write_text("def score(completions, **columns):\n    return [1] * 4\n")
    overrides = ["--guards.constant_reward", "stop", "--guards.constant_reward_steps", "2"]
    overrides += ["--guards.no_eos", "warn", "--guards.no_eos_steps", "1", "--run.save_every", "1"]
    overrides += ["--sampling.max_new_tokens", "1"]
    capsys.readouterr()
    assert train.main(["--config", str(path), *overrides]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("gearshift: error: guard constant_reward: every score is 1 for 2")
    assert told.err.count("\n") == 1
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["guards/skipped_updates"] == 0
    saved = sorted(folder.name for folder in (tmp_path / "run/checkpoints").glob("step_*"))
    assert saved == ["step_000001"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm=false",
        ),
    ],
)
def test_settings_that_would_let_it_through_are_refused(tmp_path, changes, told):
    settings = json.loads((ds_config.SHIPPED / "trained_zero0.json").read_text()) | changes
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=told):
        ds_config.load(str(tmp_path / "mine.json"))


# Two ranks


def test_ranks_decide_alike(models, tmp_path):
    """The second rank's sample, reward and parameters: see guards_on_ranks.py."""
    on_ranks.launch("engine/guards_on_ranks.py", models, tmp_path)
    files = [tmp_path / f"rank{rank}.jsonl" for rank in range(2)]
    first, second = ([json.loads(x) for x in file.read_text().splitlines()] for file in files)
    assert [line["case"] for line in first] == ["reward", "nonfinite", "frozen"]
    for one, two in zip(first, second, strict=True):
        assert one["figures"] == two["figures"] and one["alarms"] == two["alarms"]
    reward, nonfinite, frozen = first
    assert reward["figures"] == {"guards/failed_rewards": 1, "guards/skipped_updates": 0}
    assert "raised ZeroDivisionError" in reward["alarms"][0] and len(reward["alarms"]) == 1
    assert reward["scores_mean"] == pytest.approx(second[0]["mean_of_others"])
    assert nonfinite["figures"]["guards/skipped_updates"] == UPDATES + UPDATES // 2
    assert nonfinite["unchanged"] and second[1]["unchanged"]
    # Its prompts are 1, 3, 5, 7 of the second step's eight.
    assert f"the values of row {8 + 5}, prompt" in nonfinite["alarms"][0]
    assert len(frozen["alarms"]) == 1
    assert "the actor has 1 trainable parameters without a gradient" in frozen["alarms"][0]
    assert "lm.model.layers.1.mlp.up_proj.weight" in frozen["alarms"][0]
    # Reached on the second rank only is reached.
    assert frozen["unreached"] == second[2]["unreached"] == ["2.weight"]
