"""`gearshift export`: a checkpoint as Hugging Face directories, in one process."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from gearshift.engine.checkpoint import store
from gearshift.launch import cli, train
from tests.tiny import job as tiny_job

CLASSES = {"actor": AutoModelForCausalLM, "critic": AutoModelForTokenClassification}
SPLIT = {"name": "split_adamw", "lr": 1e-3}


@pytest.mark.parametrize("zero", ["zero0", "zero3_bf16_split"])
def test_a_checkpoint_is_what_the_run_exports(tmp_path, capsys, zero):
    roles = {role: {"deepspeed": f"{role}_{zero}.json"} for role in CLASSES}
    if "split" in zero:
        roles = {role: settings | {"optimizer": SPLIT} for role, settings in roles.items()}
    path = tiny_job.write(tmp_path, **roles)
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.alone(patch)
        assert train.main(["--config", str(path)]) == 0
    (tmp_path / "reward.py").unlink()  # an export asks for no reward
    checkpoint, out = tmp_path / "run" / "checkpoints" / "step_000002", tmp_path / "out"
    assert cli.main(["export", str(checkpoint), "--out", str(out)]) == 0
    assert f"exported {out / 'critic'}" in capsys.readouterr().out
    assert cli.main(["export", str(checkpoint), "--out", str(path)]) == 2
    assert f"--out='{path}': is a file; name a folder" in capsys.readouterr().err
    for role, auto in CLASSES.items():
        exact, info = auto.from_pretrained(out / role, output_loading_info=True)
        assert not any(info.values()), info
        trained = auto.from_pretrained(tmp_path / "run" / "export" / role).state_dict()
        for name, value in exact.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value.to(trained[name].dtype), trained[name]), name
        low = [torch.equal(v, v.bfloat16().float()) for v in exact.state_dict().values()]
        assert not all(low), "more than bfloat16 holds"
        assert AutoTokenizer.from_pretrained(out / role)("w5")["input_ids"] == [5]


def test_a_run_with_flash_attention_is_exported_without(tmp_path, capsys):
    """Which takes no float32, and is not installed on every machine."""
    path = tiny_job.write(tmp_path, actor={"deepspeed": "actor_zero3_bf16.json"})
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.alone(patch)
        assert train.main(["--config", str(path), "--run.export", "false"]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    state = json.loads((checkpoint / "state.json").read_text())
    state["about"]["config"]["actor"]["attn"] = "flash_attention_2"
    written = store.write_json(checkpoint / "new.json", state)
    (checkpoint / "new.json").rename(checkpoint / "state.json")
    manifest = json.loads((checkpoint / store.MANIFEST).read_text())
    manifest["files"]["state.json"] = written
    manifest.pop("sha256")
    (checkpoint / store.MANIFEST).write_text(json.dumps(store.seal(manifest)))
    assert cli.main(["export", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "actor")


def test_what_is_no_checkpoint(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}: has no manifest.json" in told and told.count("\n") == 1
