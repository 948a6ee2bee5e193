"""A critic whose adapters are on the actor's base: the same numbers, in less memory."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from gearshift.engine import assemble
from gearshift.engine.config.check import check
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
)
from gearshift.engine.gearbox.adapters import adapters
from gearshift.engine.models import lora
from gearshift.engine.models.cast import cast, check_bases
from gearshift.engine.models.files import CheckpointFiles
from gearshift.engine.models.load import load_model
from gearshift.engine.plan import planner
from gearshift.engine.plan.hardware import GPUS, Hardware
from gearshift.engine.zero.layout import whole_shape
from tests.models.share_on_ranks import config, judged, run, weights
from tests.models.test_lora import FAMILIES, SHAPE, WHOLE, adapted
from tests.tiny import models as tiny
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    models = tiny_run.write_models(tmp_path_factory.mktemp("models"))
    write_judge(models)
    return models


def write_judge(models) -> None:
    """Adapters of a reward model as peft writes them, and the model merged, by peft."""
    base = models / "policy"
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"])
    made = peft.get_peft_model(plain, settings)
    torch.manual_seed(5)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1.0 if "score" in name else 0.2)
    made.save_pretrained(models / "judge")
    made.merge_and_unload().save_pretrained(models / "merged")
    for name in ("judge", "merged"):
        tiny.tokenizer(tiny_run.VOCABULARY).save_pretrained(models / name)


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    """(what each rank saw, the folder)."""
    out = tmp_path_factory.mktemp("out")
    on_ranks.launch("models/share_on_ranks.py", models, out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)], out


@pytest.fixture(scope="module")
def alone(models):
    with tiny_run.alone():
        yield


def base_bytes(model) -> int:
    """Of the decoder's weights in float32."""
    body = AutoModelForCausalLM.from_pretrained(model).base_model
    return 4 * sum(p.numel() for p in body.parameters())


def test_two_ranks_compute_the_same_and_go_on_exactly(two_ranks):
    """Also a run that takes up the other one's checkpoint would: its files are the same."""
    for rank in two_ranks[0]:
        apart, shared = rank["apart"], rank["shared"]
        for part in ("begun", "straight", "resumed"):
            assert shared[part] == apart[part]
        assert shared["straight"] == shared["resumed"]
        kl = shared["begun"]["figures"][1]["objective/kl"]
        assert abs(kl) > 1e-3  # the adapters do something
    left, right = (
        sorted((two_ranks[1] / case).rglob("*.safetensors")) for case in ("apart", "shared")
    )
    assert [path.name for path in left] == [path.name for path in right] and len(left) == 4 + 4
    for one, other in zip(left, right, strict=True):
        values, theirs = load_file(one), load_file(other)
        assert values.keys() == theirs.keys()
        assert all(torch.equal(values[name], theirs[name]) for name in values)


def test_two_ranks_hold_the_base_once(two_ranks, models):
    """This rank's half of it, and nothing else, is what the critic no longer has."""
    for rank in two_ranks[0]:
        apart, shared = rank["apart"]["bytes"], rank["shared"]["bytes"]
        saved = apart.pop("critic weights") - shared.pop("critic weights")
        assert saved == pytest.approx(base_bytes(models / "policy") / 2, rel=0.01)
        assert shared == apart


def test_two_ranks_are_one_rank(two_ranks, models, alone):
    _, made = run(config(models, True), range(2))
    for step in range(2):
        close(two_ranks[0][0]["shared"]["begun"]["figures"][step], made["figures"][step])


def close(found: dict, expected: dict) -> None:
    keys = [k for k in expected if k.startswith(("loss/", "objective/", "policy/", "val/"))]
    assert len(keys) > 8
    for key in [*keys, "actor/grad_norm", "critic/grad_norm"]:
        assert found[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-4), key


def test_four_roles_are_on_one_base(two_ranks, models, alone):
    """At rest they take what the base takes, and the adapters and heads."""
    trainer, made = run(judged(models), range(1))
    merged = run(judged(models, "merged"), range(1))[1]
    close(merged["figures"][0], made["figures"][0])  # it judges as what peft has merged
    assert abs(made["figures"][0]["objective/scores"]) > 1e-2
    close(two_ranks[0][0]["judged"]["figures"][0], made["figures"][0])
    judges = trainer.roles.rewards._scorers.values()
    own = sum(
        4 * whole_shape(parameter).numel()
        for role in (trainer.actor, trainer.critic, *judges)
        for name, parameter in role.engine.module.named_parameters()
        if ".lora_" in name or ".score." in name
    )
    base = AutoModelForCausalLM.from_pretrained(models / "policy")
    least = 4 * sum(p.numel() for p in base.parameters())
    for held in (weights(trainer), sum(rank["judged"]["rest"] for rank in two_ranks[0])):
        assert least + own <= held <= 1.15 * least + own
    place = Hardware(
        gpu=GPUS["h100"], name="cpu", gpus_per_node=1, nodes=1, host_bytes=64e9, shared=True
    )
    planned = planner.plan(judged(models), cast(judged(models)), place)
    counted = sum(role.states.gpu["weights"] for role in planned.roles)
    assert counted == pytest.approx(weights(trainer), rel=0.01)


def sleeping(made):
    """Both roles' optimizers are away whenever they can be."""
    return replace(
        made,
        actor=replace(made.actor, sleep="always"),
        critic=replace(made.critic, sleep="always"),
    )


def split(made):
    optimizer = OptimizerConfig(name="split_adamw", lr=1e-2)
    return replace(
        made,
        actor=replace(made.actor, optimizer=optimizer),
        critic=replace(made.critic, optimizer=optimizer),
    )


def with_dora(made):
    lora = replace(made.actor.lora, dora=True)
    return replace(
        made, actor=replace(made.actor, lora=lora), critic=replace(made.critic, lora=lora)
    )


@pytest.mark.bits
@pytest.mark.parametrize(
    ("zero", "ppo", "change"),
    [
        ("zero0", {}, sleeping),
        pytest.param("zero2", {}, sleeping, marks=pytest.mark.slow),
        ("zero3", {"update": "joint"}, sleeping),
        ("zero3", {}, with_dora),
        pytest.param("zero1_bf16_split", {}, split, marks=pytest.mark.slow),
        ("zero3_bf16_split", {}, split),
        # DeepSpeed builds its CPU optimizer first.
        pytest.param("zero3_offload", {}, None, marks=pytest.mark.slow),
    ],
)
def test_alone_it_computes_the_same_and_holds_the_base_once(models, alone, zero, ppo, change):
    found, held = [], []
    for share in (False, True):
        made = config(models, share, zero, **ppo)
        trainer, numbers = run(change(made) if change else made, range(1))
        found.append(numbers)
        held.append(weights(trainer))
    assert found[0] == found[1]
    saved = base_bytes(models / "policy") / (2 if "bf16" in zero else 1)
    assert held[0] - held[1] == pytest.approx(saved, rel=0.01)


def test_the_base_is_read_once(models, alone, monkeypatch):
    reads, read = [], CheckpointFiles.read
    monkeypatch.setattr(CheckpointFiles, "read", lambda *a: reads.append(a[1]) or read(*a))
    for share in (True, False):
        reads.clear()
        made = config(models, share, "zero0")
        assemble.build(
            assemble.draw_up(replace(made, data=DataConfig(max_prompt_tokens=16))), 4, None
        )
        body = [name for name in reads if name.startswith("model.")]
        assert len(body) == len(set(body)) * (1 if share else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    """Also one whose critic is of another kind of class, and one whose tensors are renamed."""
    made = AutoConfig.for_model(family, **SHAPE | FAMILIES[family][0])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), attn="eager")
    actor = load_model(settings, "policy", WHOLE)
    lora.adapt(actor, adapted(family), WHOLE, seed=0)
    ids, values = torch.arange(12).view(2, 6), []
    for base in (None, actor):
        critic = load_model(settings, "critic", WHOLE, fresh_head=True, base=base)
        torch.nn.init.ones_(critic.score.weight)
        own = replace(adapted(family), task="TOKEN_CLS")
        lora.adapt(critic, own, WHOLE, seed=1)
        assert critic.score.weight.requires_grad
        for adapter in adapters(critic):
            torch.nn.init.constant_(adapter.b, 0.1)
        values.append(critic(ids).logits)
    assert torch.equal(*values)
    body = {id(p) for p in actor.parameters()}
    own = [name for name, p in critic.named_parameters() if id(p) not in body]
    assert own and all(".lora_" in name or name.startswith("score.") for name in own)


@pytest.mark.parametrize(
    ("actor", "critic", "message"),
    [
        ({"lora": LoraConfig()}, {}, "actor has no adapters, so all of its weights train; give a"),
        ({}, {"lora": LoraConfig()}, "critic has no adapters"),
        ({}, {"path": "tied"}, "critic is on .*tied, the actor on .*policy; give both"),
        ({}, {"revision": "x", "path": "policy"}, "critic is on .*policy@x"),
        ({"lora": LoraConfig(r=4, modules_to_save=["embed_tokens"])}, {},
         r"\['embed_tokens'\] of actor are whole modules"),
        ({}, {"deepspeed": "critic_zero0.json"},
         "zero_optimization.stage is 0 in critic.deepspeed and 3 in actor.deepspeed"),
        ({}, {"deepspeed": "critic_zero3_bf16.json"}, "bf16.enabled is True in critic.deepspeed"),
        ({}, {"deepspeed": "critic_zero3_offload.json"},
         "zero_optimization.offload_param.device is cpu in critic.deepspeed and None in actor"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(models, actor, critic, message):
    made = config(models, True)
    if "path" in critic:
        critic = critic | {"path": str(models / critic["path"])}
    made = replace(made, actor=replace(made.actor, **actor), critic=replace(made.critic, **critic))
    with pytest.raises(ConfigError, match=f"^critic.share_base=true: {message}"):
        check_bases(cast(made))


@pytest.mark.parametrize(
    ("offload", "other", "message"),
    [
        (
            {"device": "nvme", "nvme_path": "/tmp"},
            {},
            "DeepSpeed keeps each role's weights on a disk",
        ),
        (
            None,
            {"zero_hpz_partition_size": 2},
            "zero_hpz_partition_size=2 in actor.deepspeed makes",
        ),
    ],
)
def test_forms_of_weights_that_each_role_makes_are_refused(
    models, tmp_path, offload, other, message
):
    zero = {"stage": 3} | other | ({"offload_param": offload} if offload else {})
    path = tmp_path / "ds.json"
    plain = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    path.write_text(json.dumps(plain | {"gradient_clipping": 1.0, "zero_optimization": zero}))
    made = config(models, True)
    made = replace(
        made,
        actor=replace(made.actor, deepspeed=str(path)),
        critic=replace(made.critic, deepspeed=str(path)),
    )
    with pytest.raises(ConfigError, match=f"^critic.share_base=true: .*{message}"):
        check_bases(cast(made))


def test_a_critic_that_starts_from_a_reward_model_has_another_base(models):
    made = config(models, True)
    judge = replace(made.rewards[0], kind="model", path=str(models / "reward"))
    with pytest.raises(ConfigError, match="critic is on .*reward, the actor on"):
        check_bases(cast(replace(made, rewards=[judge])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "tied"}, "rewards.0 is on .*policy, the actor on .*tied; give both"),
        ({"lora": LoraConfig()}, "actor has no adapters, so all of its weights train"),
    ],
)
def test_a_judge_of_another_base_is_refused(models, change, message):
    made = judged(models)
    change = change | ({"path": str(models / change["path"])} if "path" in change else {})
    made = replace(
        made,
        actor=replace(made.actor, **change),
        critic=replace(made.critic, share_base=False, path=str(models / "policy")),
    )
    with pytest.raises(ConfigError, match=f"^rewards.0.path='.*judge': {message}"):
        check_bases(cast(made))


def test_a_judge_that_names_no_base_is_refused(models, tmp_path):
    file = shutil.copytree(models / "judge", tmp_path / "judge") / "adapter_config.json"
    about = json.loads(file.read_text()) | {"base_model_name_or_path": None}
    file.write_text(json.dumps(about))
    made = judged(models)
    made = replace(made, rewards=[replace(made.rewards[0], path=str(tmp_path / "judge"))])
    with pytest.raises(ConfigError, match="^rewards.0.path='.*judge': .* names no base model"):
        check_bases(cast(made))


def test_without_a_critic_nothing_is_shared(models):
    made = config(models, True, estimator="rloo", samples_per_prompt=2)
    made = replace(made, data=DataConfig(sources=[SourceConfig(path="x")]))
    with pytest.raises(ConfigError, match="^critic.share_base=true: needs a critic"):
        check(made)
