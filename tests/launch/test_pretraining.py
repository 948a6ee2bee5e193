"""The critic alone, before a run: when it ends, what it leaves, and a run that starts from it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from gearshift.engine.config import load as config_load
from gearshift.engine.config.schema import CriticConfig
from gearshift.launch import cli, pretraining, train
from tests.tiny import job as tiny_job
from tests.tiny import on_ranks

FIGURE = "critic/vf_explained_var"
# The prompt alone decides: what is to be explained can be explained.
REWARD = """
def score(prompts, completions, gold, **columns):
    return [g - 3.5 for g in gold]
"""


def see(patience: pretraining.Patience, *values: float) -> list[bool]:
    return [(patience.see({FIGURE: value}), patience.over)[1] for value in values]


def test_patience_counts_steps_without_a_rise():
    patience = pretraining.Patience(CriticConfig(patience=2, least_rise=0.1))
    assert see(patience, -5.0, 0.1, 0.15, 0.25, 0.3) == [False] * 5  # 0.25 rises above 0.1
    assert see(patience, math.nan, math.nan, 0.2) == [False, False, True]
    assert "did not rise by 0.1 above 0.250 in 2 steps" in str(patience)


def test_patience_goes_on_where_it_was():
    patience = pretraining.Patience(CriticConfig(patience=3, least_rise=0.0))
    fresh = pretraining.Patience(CriticConfig(patience=3, least_rise=0.0))
    fresh.load_state_dict(json.loads(json.dumps(patience.state_dict())))
    assert fresh.best == -math.inf
    see(patience, 0.5, 0.4)
    fresh.load_state_dict(json.loads(json.dumps(patience.state_dict())))
    assert see(fresh, 0.45, 0.45) == see(patience, 0.45, 0.45) == [False, True]


def test_what_the_task_decides():
    given = ["--ppo.kl_controller", "adaptive", "--ppo.lam_critic", "0.9"]
    given += ["--eval.sources.0.path", "test.jsonl", "--eval.best_by", "eval/test/scores"]
    given += ["--ppo.dynamic_sampling", "2", "--ppo.samples_per_prompt", "2"]
    settled = pretraining.settle(config_load.load(None, given))
    ppo = settled.config.ppo
    assert (ppo.lam_critic, ppo.kl_coef, ppo.kl_controller) == (1.0, 0.0, "fixed")
    assert settled.origin["ppo.lam_critic"] == "run.task=critic"
    assert config_load.dump(settled).count("# run.task=critic") == 8
    assert (ppo.dynamic_sampling, settled.config.eval.sources) == (0, [])
    other = pretraining.settle(config_load.load(None, ["--reference.path", "x"]))
    assert other.config.ppo.kl_coef == 0.05


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a run of `gearshift critic` that ended by patience, and of its job."""
    folder = tmp_path_factory.mktemp("critic")
    rate = {"lr": 0.01, "schedule": "constant", "warmup": 0.0}
    config = tiny_job.write(
        folder,
        run={"steps": 60, "dir": str(folder / "critic"), "save_every": 5},
        critic={"patience": 4, "least_rise": 0.03, "optimizer": rate},
        ppo={"prompts_per_step": 16, "minibatch_size": 8, "micro_batch_size": 8, "epochs": 4}
        | {"value_clip": None},
    )
    (folder / "reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_job.alone(monkeypatch)
        assert cli.main(["critic", "--config", str(config)]) == 0
    return folder, config


def test_the_critic_learns_until_it_no_longer_improves(pretrained):
    folder, _ = pretrained
    figures = tiny_job.learned(folder / "critic")
    found = [step[FIGURE] for step in figures]
    assert 5 <= len(found) < 60
    assert max(found) > 0.5 > found[0]
    assert not any("policy/approxkl_avg" in step or "lr" in step for step in figures)
    assert all(step["objective/kl"] == 0 for step in figures)  # no reference
    (exported,) = (folder / "critic" / "export").iterdir()
    assert exported.name == "critic"
    assert AutoModelForTokenClassification.from_pretrained(exported).score.weight.any()
    state = json.loads(
        (folder / "critic" / "checkpoints" / f"step_{len(found):06d}" / "state.json").read_text()
    )
    assert state["roles"]["actor"]["global_steps"] == 0
    assert len(state["roles"]["actor"]["shapes"]) == 1 < len(state["roles"]["critic"]["shapes"])
    assert state["stateful"]["patience"]["waited"] == 4


def test_a_run_starts_from_it(pretrained, monkeypatch, tmp_path):
    folder, config = pretrained
    first = {}
    for name, path in (("cold", "null"), ("warm", folder / "critic" / "export" / "critic")):
        tiny_job.alone(monkeypatch)
        overrides = ["--run.dir", str(tmp_path / name), "--run.steps", "1"]
        assert train.main(["--config", str(config), *overrides, "--critic.path", str(path)]) == 0
        (first[name],) = tiny_job.learned(tmp_path / name)
    assert first["warm"][FIGURE] > 0.4 > first["cold"][FIGURE]
    assert "policy/approxkl_avg" in first["warm"]


def test_two_ranks_train_the_same_critic(pretrained, tmp_path):
    """Under ZeRO-3, to rounding: every figure of every step, the step at which it ends, weights."""
    folder, config = pretrained
    zero3 = [f"--{role}.deepspeed={role}_zero3.json" for role in ("actor", "critic")]
    words = ["--config", config, "--run.task=critic", f"--run.dir={tmp_path / 'two'}", *zero3]
    on_ranks.launch("launch/train_on_ranks.py", *words, "--run.save_every=0")
    alone, together = tiny_job.learned(folder / "critic"), tiny_job.learned(tmp_path / "two")
    assert len(alone) == len(together)
    for one, two in zip(alone, together, strict=True):
        ours = {key: value for key, value in one.items() if not key.startswith("batch/")}
        assert {key: two[key] for key in ours} == pytest.approx(ours, rel=1e-3, abs=1e-5)
    first, second = (
        load_file(place / "export/critic/model.safetensors")
        for place in (folder / "critic", tmp_path / "two")
    )
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=1e-4, rtol=0)


def test_it_says_when_it_has_nothing_left_to_do(pretrained, monkeypatch, capsys):
    _, config = pretrained
    tiny_job.alone(monkeypatch)
    assert cli.main(["critic", "--config", str(config)]) == 0
    assert "critic.patience: already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--config: missing; give a run's YAML"),
        (["--ppo.estimator", "reinforce_pp"], "run.task=critic: trains a critic, which ppo.est"),
        (["--critic.patience", "0"], "critic.patience=0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(pretrained, monkeypatch, tmp_path, capsys, words, told):
    _, config = pretrained
    tiny_job.alone(monkeypatch)
    given = ["--config", str(config), "--run.dir", str(tmp_path / "no"), *words] if words else []
    assert cli.main(["critic", *given]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_a_run_of_the_policy_is_no_run_of_the_critic(pretrained, monkeypatch, capsys):
    _, config = pretrained
    tiny_job.alone(monkeypatch)
    assert train.main(["--config", str(config)]) == 2
    assert "run.task" in capsys.readouterr().err
