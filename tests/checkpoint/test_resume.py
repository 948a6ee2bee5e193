"""Taking a run up elsewhere: on other numbers of ranks, under other ZeRO stages."""

import json
from dataclasses import replace

import pytest
import torch

from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.checkpoint import store
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import OptimizerConfig
from gearshift.engine.zero.state import whole
from tests.checkpoint.resume_on_ranks import STAGES, save, take_up, write_stage_1
from tests.checkpoint.save_on_ranks import Prompts, advance
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run

pytestmark = pytest.mark.bits

KINDS = ("weights", "exp_avg", "exp_avg_sq")


def content(checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together."""
    assert store.read_manifest(checkpoint)
    found = {}
    for role in ("actor", "critic"):
        files = sorted(checkpoint.glob(f"{role}.rank*.safetensors"))
        for kind in KINDS:
            found |= {f"{role}.{kind}.{name}": value for name, value in whole(files, kind)}
    return found


def same(one, two) -> None:
    one, two = content(one), content(two)
    assert one.keys() == two.keys() and len(one) > 6
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def close(figures: dict, expected: dict) -> None:
    """Equal but for the order of sums."""
    for key in ("loss/policy_avg", "loss/value_avg", "objective/scores", "objective/kl_coef"):
        assert figures[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    for key in ("actor/grad_norm", "critic/grad_norm", "lr", "critic/lr", "step", "episode"):
        assert figures[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.fixture(scope="module")
def two_ranks():
    """A run under ZeRO-3 on two ranks, and its checkpoint after two steps."""
    return on_ranks.outcome("checkpoint/save_on_ranks.py")


@pytest.fixture(scope="module")
def one_rank(two_ranks, tmp_path_factory):
    """That checkpoint taken up by this process: (its folder, what it found)."""
    out = tmp_path_factory.mktemp("one")
    with tiny_run.alone():
        source = two_ranks / "checkpoints" / "step_000002"
        return out, take_up(two_ranks.parent / "models", source, "zero3", out)


@pytest.fixture(scope="module")
def two_again(two_ranks, one_rank, tmp_path_factory):
    """What this process saved a step later, taken up by two ranks under every stage."""
    out = tmp_path_factory.mktemp("two")
    models = two_ranks.parent / "models"
    on_ranks.launch("checkpoint/resume_on_ranks.py", models, one_rank[0] / "step_000003", out)
    return out


def test_two_ranks_to_one(two_ranks, one_rank):
    out, found = one_rank
    same(two_ranks / "checkpoints" / "step_000002", out / "step_000002")
    close(found["figures"], torch.load(two_ranks / "whole.pt")["figures"][0])
    assert found["remarks"] == [
        "saved by 2 ranks, taken up by 1: weights, optimizers and data positions are exact, random "
        "generators are seeded anew"
    ]


@pytest.mark.parametrize("zero", STAGES)
def test_one_rank_to_two_under_any_stage(two_ranks, one_rank, two_again, zero):
    same(one_rank[0] / "step_000003", two_again / zero / "step_000003")
    figures = json.loads((two_again / f"{zero}.json").read_text())["figures"]
    close(figures, torch.load(two_ranks / "whole.pt")["figures"][1])


def test_stage_2_back_to_stage_3(two_again):
    same(two_again / "zero2" / "step_000003", two_again / "back" / "step_000003")
    same(two_again / "zero3" / "step_000004", two_again / "back" / "step_000004")


@pytest.mark.parametrize("zero", ["zero1", "zero0"])
def test_one_rank_without_partitions(two_ranks, tmp_path, zero):
    models = two_ranks.parent / "models"
    write_stage_1(models)
    source = two_ranks / "checkpoints" / "step_000002"
    with tiny_run.alone():
        found = take_up(models, source, zero, tmp_path)
    same(source, tmp_path / "step_000002")
    close(found["figures"], torch.load(two_ranks / "whole.pt")["figures"][0])


def goes_on(config, out) -> None:
    """Two steps, a checkpoint and a step are the same as the checkpoint taken up and a step."""
    trainer, stream = tiny_run.trainer(config), Prompts(config.ppo)
    advance(trainer, stream, 2)
    save(trainer, stream, out / "whole")
    advance(trainer, stream, 1)
    save(trainer, stream, out / "whole")
    other, stream = tiny_run.trainer(config), Prompts(config.ppo)
    checkpoint.load(out / "whole" / "step_000002", other, {"prompts": stream})
    advance(other, stream, 1)
    save(other, stream, out / "resumed")
    one, two = (store.read_manifest(out / w / "step_000003")["files"] for w in ("whole", "resumed"))
    assert one == two


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param("zero1_bf16", marks=pytest.mark.slow),
        "zero2_bf16",
        pytest.param("zero3_bf16", marks=pytest.mark.slow),
        "zero3_bf16_split",
    ],
)
def test_low_precision_goes_on_bit_for_bit(tmp_path, zero):
    models = tiny_run.write_models(tmp_path / "models")
    for role in ("actor", "critic"):
        settings = ds_config.load(f"{role}_zero2_bf16") | {"zero_optimization": {"stage": 1}}
        (models / f"{role}_zero1_bf16.json").write_text(json.dumps(settings))
    config = tiny_run.config(models, zero, "tied")
    if zero.endswith("split"):
        config = splitting(config)
    with tiny_run.alone():
        goes_on(config, tmp_path)


def splitting(config, **more):
    """With split masters in actor and critic, and these keys."""
    more |= {"optimizer": OptimizerConfig(name="split_adamw", moments="bf16", lr=1e-3, eps=1e-6)}
    roles = {role: replace(getattr(config, role), **more) for role in ("actor", "critic")}
    return replace(config, **roles)


def test_the_states_of_both_roles_are_not_taken_up_at_once(tmp_path, monkeypatch):
    """Where they exchange places, the device may hold those of one: the actor's, which come first,
    leave before the critic's."""
    models = tiny_run.write_models(tmp_path / "models")
    config = splitting(tiny_run.config(models, "zero3_bf16_split", "tied"), sleep="exchange")
    with tiny_run.alone():
        trainer, stream = tiny_run.trainer(config), Prompts(config.ppo)
        advance(trainer, stream, 1)
        save(trainer, stream, tmp_path)
        other, loading = tiny_run.trainer(config), checkpoint.zero_state.load
        sleepers, awake = other.residence.sleepers, []

        def watched(*given):
            awake.append([name for name, sleeper in sleepers.items() if sleeper.awake])
            loading(*given)

        monkeypatch.setattr(checkpoint.zero_state, "load", watched)
        checkpoint.load(tmp_path / "step_000001", other, {"prompts": stream})
    assert awake == [["actor", "critic"], ["critic"]]


@pytest.mark.slow
def test_an_optimizer_on_the_host_goes_on_bit_for_bit(tmp_path):
    """DeepSpeed compiles it on its first use on a machine."""
    models = tiny_run.write_models(tmp_path / "models")
    with tiny_run.alone():
        goes_on(tiny_run.config(models, "zero3_offload", "tied"), tmp_path)
