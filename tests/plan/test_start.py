"""The plan at start-up: what fits starts, what cannot is refused, the rest is warned of."""

from dataclasses import replace

import pytest
import torch

from gearshift.engine.config import load as config_load
from gearshift.engine.models.cast import cast
from gearshift.engine.plan import start as plan_start
from gearshift.engine.plan.hardware import GB, GPUS, Hardware, hardware
from gearshift.launch import train
from gearshift.launch.docs.plan import offline
from tests.tiny import job as tiny_job

GIB = 2**30
# fp32 masters and moments: 16 bytes a parameter, and gradients.
PLAIN = [
    f"--{role}.{key}"
    for role in ("actor", "critic")
    for key in ("deepspeed=trained_zero3_bf16.json", "optimizer.name=adamw")
]


def recipe(name: str, *overrides: str):
    path, models = offline(name)
    return config_load.load(path, [*models, *overrides]).config


def plan_run(config, hardware: Hardware) -> plan_start.Start:
    return plan_start.plan_run(config, cast(config), hardware)


def machine(memory: float, host: float = 64 * GB, **changes) -> Hardware:
    gpu = replace(GPUS["rtx4090"], memory=memory)
    fields = {"gpus_per_node": 1, "nodes": 1, "host_bytes": host} | changes
    return Hardware(gpu=gpu, name="rtx4090", **fields)


def test_what_fits_starts_with_every_choice_made():
    start = plan_run(recipe("0.5b_24gb"), machine(23.5 * GIB))
    assert start.warning is None and start.said.startswith("plan: fits")
    chosen = start.plan.config
    assert chosen.actor.sleep != "auto" and chosen.critic.gradient_checkpointing is not None


def test_nodes_that_differ_are_planned_as_the_least_of_each():
    """Ranks that recompute and ranks that do not would wait for each other for ever."""
    one, other = machine(23.5 * GIB, host=64 * GB), machine(23.4 * GIB, host=128 * GB)
    agreed = plan_start.least([one, other])
    assert agreed == plan_start.least([other, one])
    assert (agreed.gpu.memory, agreed.host_bytes) == (23.4 * GIB, 64 * GB)


def test_what_cannot_fit_is_refused_unless_the_user_knows_better():
    config, small = recipe("0.5b_24gb"), machine(4 * GIB)
    with pytest.raises(ValueError, match="cannot fit: .* needs .* GB of a GPU's") as told:
        plan_run(config, small)
    assert "run.ignore_plan=true" in str(told.value) and "\n" not in str(told.value)
    allowed = replace(config, run=replace(config.run, ignore_plan=True))
    assert plan_run(allowed, small).warning.startswith("may not fit")


def test_what_only_the_reserve_forbids_is_warned_of():
    config = recipe("0.5b_24gb", *PLAIN, "--actor.sleep=never", "--critic.sleep=never")
    peak = plan_run(config, machine(23.5 * GIB)).plan.peak.total
    start = plan_run(config, machine(peak + 0.3 * GB))
    assert start.warning.startswith("may not fit") and start.plan.refuse_reason


def test_the_first_rung_that_fits_is_taken():
    """States that do not fit together exchange places; recomputing comes before what is slower."""
    split = [
        *(f"--{r}.deepspeed={r}_zero3_bf16_split.json" for r in ("actor", "critic")),
        *(f"--{r}.optimizer.name=split_adamw" for r in ("actor", "critic")),
        *(f"--{r}.optimizer.moments=bf16" for r in ("actor", "critic")),
        *(f"--{r}.gradient_checkpointing=null" for r in ("actor", "critic")),
    ]
    h200, config = hardware("h200", 1, 1, 256), recipe("7b_1xh200", *split)
    chosen = {}
    for micro in (1, 16):
        settled = replace(config, ppo=replace(config.ppo, micro_batch_size=micro))
        start = plan_run(settled, h200)
        assert start.plan.fits
        chosen[micro] = start.plan.config.actor
    assert not chosen[1].gradient_checkpointing and chosen[16].gradient_checkpointing
    assert chosen[16].sleep == "exchange"
    kept = recipe("7b_1xh200", *split, "--actor.sleep=never", "--critic.sleep=always")
    start = plan_run(kept, hardware("h200", 2, 1, 256))
    assert (start.plan.config.actor.sleep, start.plan.config.critic.sleep) == ("never", "always")


BY_THE_PLAN = {"micro_batch_size": None, "micro_batch_tokens": "auto"}
BY_THE_PLAN |= {"score_batch_size": None, "score_batch_tokens": "auto"}


def test_micro_batches_are_as_large_as_memory_allows():
    config = recipe("0.5b_24gb", *PLAIN)
    config = replace(config, ppo=replace(config.ppo, **BY_THE_PLAN))
    chosen = []
    for gib in (80, 16, 14):
        start = plan_run(config, machine(gib * GIB))
        ppo = start.plan.config.ppo
        assert start.warning is None and ppo.micro_batch_tokens <= start.plan.most_tokens
        assert f"micro_batch_tokens={ppo.micro_batch_tokens}" in start.plan.told
        assert ppo.score_batch_tokens == ppo.micro_batch_tokens
        chosen.append(ppo.micro_batch_tokens)
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) == 3


def test_micro_batches_that_a_user_gives_are_kept():
    config = recipe("0.5b_24gb", *PLAIN)
    for given in ({"micro_batch_tokens": 3000}, {"micro_batch_size": 2}):
        settled = replace(config, ppo=replace(config.ppo, **BY_THE_PLAN | given))
        ppo = plan_run(settled, machine(80 * GIB)).plan.config.ppo
        for name, value in {"micro_batch_tokens": "auto", **given}.items():
            assert getattr(ppo, name) == value
        assert isinstance(ppo.score_batch_tokens, int)


def test_cpu_ranks_share_the_memory_of_the_host():
    """And one memory is not left for itself."""
    config = recipe("0.5b_24gb", *PLAIN, "--ppo.micro_batch_size=1")
    large, small = (machine(h, host=h, shared=True) for h in (200 * GB, 20 * GB))
    assert plan_run(config, large).plan.config.actor.sleep == "never"
    with pytest.raises(ValueError, match="needs .* GB of a host's 20.0 usable"):
        plan_run(config, small)


def test_this_machine_is_what_the_process_has():
    found = plan_start.this_machine(torch.device("cpu"))
    assert found.shared and found.gpus_per_node == 1 and found.nodes == 1
    assert 0.5 * GB < found.usable == found.host_bytes <= plan_start.host_memory()


@pytest.mark.parametrize(
    ("product", "gib", "name"),
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA H100 NVL", 93.0, "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9.5, None),
        ("AMD Instinct MI300X", 191.0, None),
    ],
)
def test_gpus_are_known_by_the_drivers_name_and_memory(product, gib, name):
    assert plan_start.known_gpu(product, gib * GIB) == name


def test_a_run_that_cannot_fit_ends_before_a_model_loads(tmp_path, monkeypatch, capsys):
    tiny_job.alone(monkeypatch)
    path = tiny_job.write(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(plan_start, "host_memory", lambda: 1e5)
    assert train.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "cannot fit" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert train.main(["--config", str(path), "--run.ignore_plan", "true", "--run.steps", "1"]) == 0
    told = capsys.readouterr().out
    assert "may not fit" in told and "memory planned/measured" in told
