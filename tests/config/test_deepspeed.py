"""Every shipped DeepSpeed JSON loads and is what its name says; mistakes name their fix."""

import json
import logging

import pytest

from gearshift.engine.config import deepspeed as ds_config

FILES = sorted(ds_config.SHIPPED.glob("*.json"))
NAMES = [file.stem for file in FILES]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def test_the_names_that_defaults_and_recipes_use_are_there():
    wanted = {"trained_zero3", "trained_zero0", "frozen_zero3_cpu"}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_name_tells_the_truth(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    role, stage, *options = name.split("_")
    parsed = DeepSpeedConfig(ds_config.load(name))
    zero = parsed.zero_config
    assert role in ("trained", "frozen")
    assert set(options) <= {"bf16", "offload", "cpu", "nvme", "split"}
    assert zero.stage == int(stage.removeprefix("zero"))
    assert parsed.bfloat16_config.enabled == ("bf16" in options)
    split = "split" in options
    assert parsed.bfloat16_config.bf16_master_weights_and_grads == split
    assert parsed.bfloat16_config.bf16_optimizer_states == split
    assert not parsed.float16_config.enabled
    assert parsed.train_batch_size == parsed.train_micro_batch_size_per_gpu == 1
    device = next((option for option in ("cpu", "nvme") if option in options), None)
    offloads = "offload" in options
    params = device or ("cpu" if offloads and zero.stage == 3 else None)
    assert (zero.offload_param and zero.offload_param.device) == params
    assert (zero.offload_optimizer and zero.offload_optimizer.device) == (
        "cpu" if offloads else None
    )
    if role != "frozen":
        for offload in (zero.offload_param, zero.offload_optimizer):
            assert offload is None or offload.pin_memory
        assert parsed.gradient_clipping == 1.0
        assert (parsed.grad_accum_dtype or "fp32") == ("bf16" if split else "fp32")


@pytest.mark.parametrize("stage", ["zero0", "zero2_bf16", "zero2_bf16_offload", "zero3"])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_actor_and_critic_name_the_same_file(role, stage):
    file = ds_config.SHIPPED / f"trained_{stage}.json"
    for ending in ("", ".json"):
        assert ds_config.find(f"{role}_{stage}{ending}") == file
        assert ds_config.find(f"trained_{stage}{ending}") == file
    assert ds_config.load(f"{role}_{stage}") == ds_config.load(f"trained_{stage}")


class Recorder(dict):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_deepspeed_reads_every_key_we_accept():
    from deepspeed.runtime.config import DeepSpeedConfig

    config = Recorder(ds_config.load("trained_zero3"))
    DeepSpeedConfig(config)
    assert ds_config.KEYS - config.asked == set()


def test_find_prefers_a_file_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("actor_zero3.json", "trained_zero3.json"):
        assert ds_config.find(name).parent == ds_config.SHIPPED
        (tmp_path / name).write_text("{}")
        assert ds_config.find(name).resolve() == tmp_path / name


@pytest.mark.parametrize("name", ["critic_zero3_b16.json", "actor_zero3_b16", "trained_zero3_b16"])
def test_a_wrong_name_lists_the_files(name):
    with pytest.raises(ValueError, match=r"did you mean trained_zero3_bf16\? There are ") as told:
        ds_config.find(name)
    assert str(told.value).split("There are ")[1].split(", ") == NAMES
    for lost in ("actor_", "trained_", "reward_zero3"):
        with pytest.raises(ValueError, match="no such DeepSpeed file"):
            ds_config.find(lost)


def changed(tmp_path, base: str, **changes) -> str:
    """A copy of a shipped file; None removes a key, and zero_optimization is updated, not set."""
    config = json.loads((ds_config.SHIPPED / f"{base}.json").read_text())
    config["zero_optimization"] |= changes.pop("zero", {})
    config |= changes
    config = {key: value for key, value in config.items() if value is not None}
    path = tmp_path / f"{base}.json"
    path.write_text(json.dumps(config))
    return str(path)


TRAINED, FROZEN, ZERO0 = "trained_zero3", "frozen_zero3_cpu", "trained_zero0"


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (TRAINED, {"gradient_cliping": 1}, "did you mean gradient_clipping"),
        (TRAINED, {"optimizer": {"type": "AdamW"}}, "optimizer: .*actor.optimizer"),
        (TRAINED, {"scheduler": {}}, "scheduler: .*optimizer.schedule"),
        (TRAINED, {"activation_checkpointing": {}}, "activation_.*: .*set gradient_checkpoint"),
        (TRAINED, {"train_batch_size": 64}, "train_batch_size: .*ppo.minibatch_size"),
        (TRAINED, {"hybrid_engine": {"enabled": True}}, "hybrid_engine: .*rollout"),
        (TRAINED, {"train_micro_batch_size_per_gpu": 4}, "train_micro.*=4: must be 1"),
        (TRAINED, {"gradient_accumulation_steps": 8}, "gradient_accumulation_steps=8: must be 1"),
        (TRAINED, {"gradient_clipping": "auto"}, "gradient_clipping=auto: write the value"),
        (TRAINED, {"zero": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size=auto"),
        (TRAINED, {"gradient_clipping": None}, "gradient_clipping: missing"),
        (TRAINED, {"gradient_clipping": -1}, "gradient_clipping=-1: must be a number"),
        (TRAINED, {"zero_optimization": None}, "zero_optimization: missing"),
        (TRAINED, {"fp16": {"enabled": True}}, "fp16.enabled=true: .*bf16"),
        (TRAINED, {"bf16": True}, "bf16=True: must be an object"),
        (TRAINED, {"bf16": {"enable": True}}, "bf16.enable: no such key"),
        (TRAINED, {"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype=fp8"),
        (TRAINED, {"communication_data_type": "fp8"}, "communication_data_type"),
        (TRAINED, {"gradient_allreduce_op": "sum"}, "gradient_allreduce_op=sum"),
        (TRAINED, {"zero": {"stage": 4}}, "zero_optimization.stage=4"),
        (TRAINED, {"zero": {"stage": True}}, "zero_optimization.stage=True"),
        (TRAINED, {"zero": {"reduce_bucket_siz": 1}}, "did you mean reduce_bucket_size"),
        (TRAINED, {"zero": {"reduce_bucket_size": "big"}}, "reduce_bucket_size=big: .*integer"),
        (TRAINED, {"zero": {"offload_param": {"device": "gpu"}}}, "offload_param.device=gpu"),
        (ZERO0, {"zero": {"offload_param": {"device": "cpu"}}}, "offload_param: needs stage 3"),
        (ZERO0, {"zero": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: needs"),
        (FROZEN, {"zero": {"stage": 2}}, "stage=2: a frozen model needs stage 3 or 0"),
        (FROZEN, {"gradient_clipping": 1.0}, "gradient_clipping: a frozen model has no gradients"),
        (FROZEN, {"zero": {"reduce_bucket_size": 1}}, "reduce_bucket_size: a frozen model"),
    ],
)
def test_mistakes_name_file_key_and_fix(tmp_path, base, changes, message):
    with pytest.raises(ValueError, match=rf"^{base}.json: .*{message}"):
        ds_config.load(changed(tmp_path, base, **changes))


def test_frozen_can_be_told_against_the_name():
    assert ds_config.load("frozen_zero3", frozen=True) == ds_config.load("frozen_zero3")
    with pytest.raises(ValueError, match="a frozen model has no gradients"):
        ds_config.load("actor_zero3", frozen=True)
    with pytest.raises(ValueError, match="gradient_clipping: missing"):
        ds_config.load("frozen_zero3", frozen=False)


def test_broken_files(tmp_path):
    path = tmp_path / "x.json"
    for text, message in [
        ("{", "not JSON"),
        ("[]", "must hold one JSON object"),
        ('{"a": 1, "a": 2}', "a is given twice"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            ds_config.load(str(path))


def test_nvme_folder_must_exist(tmp_path):
    config = ds_config.load("frozen_zero3_nvme_bf16")
    config["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "absent")
    with pytest.raises(ValueError, match="offload_param.nvme_path=.*absent: no such folder"):
        ds_config.check_nvme(config)
    config["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    ds_config.check_nvme(config)
    ds_config.check_nvme(ds_config.load("frozen_zero3_cpu"))
