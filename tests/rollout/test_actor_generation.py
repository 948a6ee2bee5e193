"""Actor.generate over several steps: one engine, what it keeps, and a fault in the middle."""

import copy
from dataclasses import replace

import pytest
import torch

from gearshift.engine.config.schema import RolloutConfig
from tests.tiny import run as tiny_run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with tiny_run.alone():
        yield tiny_run.write_models(tmp_path_factory.mktemp("models"))


def make_trainer(models, zero="zero0", **rollout):
    config = replace(tiny_run.config(models, zero), rollout=RolloutConfig(tp=1, **rollout))
    return tiny_run.trainer(config)


def training_state(actor) -> dict:
    """This rank's weights or parts of them, fp32 masters, moments and random numbers."""
    inner = getattr(actor.optimizer, "optimizer", actor.optimizer)
    masters = getattr(actor.optimizer, "fp32_partitioned_groups_flat", [])
    return {
        "weights": [getattr(p, "ds_tensor", p).detach().clone() for p in actor.lm.parameters()],
        "masters": [master.detach().clone() for master in masters],
        "moments": copy.deepcopy(list(inner.state.values())),
        "random": torch.get_rng_state(),
    }


def same(left, right) -> bool:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_cache_and_graphs_stay_across_optimizer_steps(models, zero):
    """Graphs run eagerly here, from the same fixed buffers: see test_graphs.py."""
    trainer = make_trainer(models, zero, weights="resident", kv_cache_gb=1e-4)
    other = make_trainer(models, zero)
    actor, engine = trainer.actor, trainer.actor.sampler
    engine._use_graphs = True
    held = []
    for step in range(3):
        prompts = tiny_run.prompts(trainer.config.ppo, step)
        rollouts = [t.actor.generate(prompts, trainer.config.sampling) for t in (trainer, other)]
        assert rollouts[0].response_ids.equal(rollouts[1].response_ids)
        layer = next(iter(engine._cache.layers.values()))
        graphs = engine._graphs
        held.append((graphs, graphs._numbers.data_ptr(), layer.key.data_ptr(), graphs.weights))
        for t in (trainer, other):
            t.step(prompts)  # generates once more, then changes the weights
        assert actor.sampler is engine and engine.kv_bytes > 0
        assert other.actor.sampler.kv_bytes == 0
    assert held[0] == held[1] == held[2]
    assert engine._graphs._replays


def test_graphs_of_weights_that_moved_are_dropped(models):
    trainer = make_trainer(models, weights="resident", kv_cache_gb=1e-4)
    engine, prompts = trainer.actor.sampler, tiny_run.prompts(trainer.config.ppo, 0)
    engine._use_graphs = True
    trainer.actor.generate(prompts, trainer.config.sampling)
    before = engine._graphs
    weight = trainer.actor.lm.model.norm.weight
    weight.data = weight.data.clone() * 3
    moved = trainer.actor.generate(prompts, trainer.config.sampling)
    assert engine._graphs is not before
    engine._use_graphs = False
    eager = trainer.actor.generate(prompts, trainer.config.sampling)
    assert moved.response_ids.equal(eager.response_ids)


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_a_fault_while_generating_leaves_training_intact_and_can_be_repeated(models, zero):
    trainer, untroubled = make_trainer(models, zero), make_trainer(models, zero)
    actor, ppo = trainer.actor, trainer.config.ppo
    for t in (trainer, untroubled):
        t.step(tiny_run.prompts(ppo, 0))
    before = training_state(actor)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:  # prompts are in the cache by then
            raise RuntimeError("the device fell off the bus")

    hook = actor.gearbox.module.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="fell off"):
        trainer.step(tiny_run.prompts(ppo, 1))
    assert same(training_state(actor), before)
    assert actor.sampler.kv_bytes == 0
    assert not any(p.numel() for p in actor.gearbox.module.parameters())
    hook.remove()
    for t in (trainer, untroubled):
        t.step(tiny_run.prompts(ppo, 1))
    assert same(training_state(actor), training_state(untroubled.actor))
