"""Exported directories: what anyone else's transformers makes of them."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from gearshift.engine.checkpoint.export import export, whole_weights
from gearshift.engine.config.schema import ModelConfig
from gearshift.engine.models.load import load_model
from tests.tiny import models as tiny
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run

CLASSES = {"actor": AutoModelForCausalLM, "critic": AutoModelForTokenClassification}
PLAIN = {"zero_optimization": {"stage": 0}}


@pytest.fixture(scope="module")
def exported():
    """OUT of save_on_ranks.py: a trained actor with tied weights, and its critic."""
    return on_ranks.outcome("checkpoint/save_on_ranks.py")


@pytest.mark.parametrize("role", CLASSES)
def test_partitioned_weights_reload_without_a_missing_or_unexpected_key(exported, role):
    model, info = CLASSES[role].from_pretrained(
        exported / "export" / role, output_loading_info=True
    )
    for problem, names in info.items():
        assert not names, (problem, names)
    ids = torch.arange(12).view(2, 6)
    expected = torch.load(exported / "tables.pt")[role]
    with torch.no_grad():
        logits = model.eval()(ids).logits
    found = logits[:, :-1].log_softmax(-1) if role == "actor" else logits[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0


def test_the_directory_is_ready_to_generate(exported):
    directory = exported / "export" / "actor"
    assert AutoTokenizer.from_pretrained(directory).eos_token == "<eos>"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.use_cache and model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (directory / "model.safetensors").exists()


def test_what_is_written_is_what_we_load_again(exported):
    """As a later run would: through our own loader, critic and all."""
    for role, kind in (("actor", "policy"), ("critic", "critic")):
        config = ModelConfig(path=str(exported / "export" / role))
        loaded = load_model(config, kind, PLAIN).state_dict()
        reloaded = CLASSES[role].from_pretrained(exported / "export" / role).state_dict()
        for name, value in reloaded.items():
            assert torch.equal(loaded[name], value), name


def test_weights_on_one_rank_without_partitions(tmp_path):
    models = tiny_run.write_models(tmp_path)
    lm = load_model(ModelConfig(path=str(models / "tied")), "policy", PLAIN)
    kept = whole_weights(lm)
    assert "lm_head.weight" not in kept
    for name, value in kept.items():
        assert torch.equal(value, lm.state_dict()[name])
        assert value.data_ptr() != lm.state_dict()[name].data_ptr()
    export(lm, AutoTokenizer.from_pretrained(models / "tied"), tmp_path / "again")
    assert lm.config.use_cache is False  # as the training loop had it
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in lm.state_dict().items())


def test_what_the_source_says_of_generation_goes_with_it(tmp_path, caplog):
    """Even where transformers would not save it: a temperature without sampling."""
    source = tiny.save_policy(tmp_path / "source")
    said = {"eos_token_id": [2, 5], "do_sample": False, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(said))
    lm = load_model(ModelConfig(path=str(source)), "policy", PLAIN)
    assert "generation_config.json asks for temperature=0.6; this run samples" in caplog.text
    export(lm, AutoTokenizer.from_pretrained(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said
