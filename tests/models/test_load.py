"""Loading: every tensor in its place, on one rank and in ZeRO-3 partitions, or one clear error."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma2Config,
)

from gearshift.engine.attention import packed
from gearshift.engine.config.assets import FILES, cache_dir
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import ModelConfig
from gearshift.engine.models.load import (
    attention_implementation,
    load_config,
    load_model,
    load_tokenizer,
)
from gearshift.engine.models.reading import hidden_states, lay_out
from gearshift.engine.zero.layers import place_buffers
from tests.tiny import models as tiny
from tests.tiny import on_ranks
from tests.tiny import run as tiny_run

PLAIN = {"zero_optimization": {"stage": 0}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tiny_run.write_models(tmp_path_factory.mktemp("models"))
    # Its experts are stored apart and fused on loading: only transformers' own loader knows how.
    torch.manual_seed(0)
    shape = tiny.llama_config(12).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range")
    shape = {name: shape[name] for name in names} | {"num_local_experts": 2}
    mixtral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape))
    mixtral.save_pretrained(directory / "renamed")
    tiny.save_policy(
        directory / "large",
        2048,
        hidden_size=256,
        intermediate_size=1024,
        head_dim=64,
        num_hidden_layers=24,
    )
    return directory


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    on_ranks.launch("models/load_on_ranks.py", models, out)
    return out


def load(path, role="policy", **options):
    return load_model(ModelConfig(path=str(path)), role, PLAIN, **options)


def copy(models, name, target):
    shutil.copytree(models / name, target)
    return target


def edit(path, change):
    """Rewrites model.safetensors after `change` of its tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["policy", "tied", "renamed"])
def test_every_rank_reads_the_checkpoint_as_transformers_does(models, two_ranks, name):
    ids = torch.arange(12).view(2, 6)
    model = AutoModelForCausalLM.from_pretrained(models / name)
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].log_softmax(-1)
        lm = load(models / name)
        with packed.padded(lm):
            alone = lm(ids).logits[:, :-1].log_softmax(-1)
    together = torch.load(two_ranks / "tables.pt")[name]
    torch.testing.assert_close(alone, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)


def test_no_rank_holds_a_whole_model_while_loading(two_ranks):
    """Measured: 0.53 of the model at the peak, of which 0.50 are the partitions."""
    for rank in range(2):
        figures = json.loads((two_ranks / f"rank{rank}.json").read_text())
        assert figures["whole"] > 90e6 and figures["samples"] > 20
        assert figures["held"] <= 0.51 * figures["whole"]
        assert figures["grown"] < 0.75 * figures["whole"], figures


def test_critic_heads(models, two_ranks):
    stored = load_file(models / "reward" / "model.safetensors")["score.weight"]
    weights = torch.load(two_ranks / "weights.pt")
    assert not weights["fresh"]["score.weight"].any()
    assert not weights["dropped"]["score.weight"].any()
    assert torch.equal(weights["kept"]["score.weight"], stored)
    for name in weights:
        assert not weights[name]["score.bias"].any()
        assert weights[name]["score.bias"].shape == (1,)
    alone = load(models / "reward", "critic").state_dict()
    assert alone.keys() == weights["kept"].keys()
    for name, value in alone.items():
        assert torch.equal(value, weights["kept"][name])


def test_a_wrong_head_is_refused_on_partitioned_weights(two_ranks):
    said = (two_ranks / "refusal.txt").read_text()
    assert "LlamaForCausalLM" in said and "differ from ours" in said and "\n" not in said


def test_reward_models_score_as_transformers_does(models):
    ids = torch.tensor([[1, 5, 7, 2]])
    own = load(models / "reward", "reward")
    expected = AutoModelForSequenceClassification.from_pretrained(models / "reward")
    with torch.no_grad(), packed.padded(own):
        torch.testing.assert_close(own(ids).logits, expected(ids).logits)


def test_tied_weights_stay_one_parameter(models):
    lm = load(models / "tied")
    assert "lm_head.weight" not in load_file(models / "tied" / "model.safetensors")
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    untied = load(models / "policy")
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


def test_dropout_is_off_everywhere(tmp_path):
    """As rates in the configuration, which attention reads, and in modules."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=16
    )
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.5
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    lm = load(tmp_path / "gpt2").train()
    dropouts = [part for part in lm.modules() if isinstance(part, nn.Dropout)]
    assert len(dropouts) == 4 and all(part.p == 0 for part in dropouts)
    rates = {name: value for name, value in vars(lm.config).items() if "drop" in name}
    assert len(rates) >= 3 and not any(rates.values())
    assert reads_the_same_twice(lm)

    tiny.save_policy(tmp_path / "llama", attention_dropout=0.5)
    assert reads_the_same_twice(load(tmp_path / "llama").train())


def reads_the_same_twice(lm) -> bool:
    """Padded and packed."""
    ids = torch.tensor([[1, 2, 3]])
    reading, places = lay_out(ids, torch.ones_like(ids, dtype=torch.bool), packs=True)
    same = torch.equal(*(hidden_states(lm, reading, places[0]) for _ in range(2)))
    with packed.padded(lm):
        return same and torch.equal(lm(ids).logits, lm(ids).logits)


def test_rows_lie_end_to_end_where_attention_is_left_to_us(models, caplog):
    assert packed.packs(load(models / "policy"))
    plain = ModelConfig(path=str(models / "policy"), attn="sdpa")
    assert not packed.packs(load_model(plain, "policy", PLAIN))
    assert not caplog.records


def test_rows_of_a_model_that_pools_by_itself_are_padded(tmp_path, caplog):
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1)
    bert = AutoConfig.for_model("bert", **sizes, num_attention_heads=2, num_labels=1)
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(tmp_path)
    assert not packed.packs(load(tmp_path, "reward"))
    assert "rows are padded" in caplog.text and "pools its tokens by itself" in caplog.text


def test_bf16_and_buffers(models):
    lm = load_model(
        ModelConfig(path=str(models / "policy")), "policy", PLAIN | {"bf16": {"enabled": True}}
    )
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    reference = AutoModelForCausalLM.from_pretrained(models / "policy")
    for name, buffer in reference.named_buffers():
        assert torch.equal(lm.get_buffer(name), buffer), name
    assert not lm.training and lm.config.use_cache is False


def test_a_missing_tensor_is_named(models, tmp_path):
    path = copy(models, "policy", tmp_path / "broken")
    edit(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing.*layers\.1\.mlp\.up_proj") as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_misshapen_tensor_is_named(models, tmp_path):
    path = copy(models, "policy", tmp_path / "broken")
    name = "model.layers.0.self_attn.q_proj.weight"
    edit(path, lambda tensors: tensors.update({name: torch.zeros(4, 16)}))
    with pytest.raises(ValueError, match=r"q_proj.weight is \[4, 16\], but .* makes it \[16, 16\]"):
        load(path)


@pytest.mark.parametrize("role", ["reward", "critic"])
def test_a_model_without_a_score_head_is_no_judge(models, role):
    """A zero head in its place would give every response the same score."""
    with pytest.raises(ValueError, match="has no score head: it is no reward model"):
        load(models / "policy", role)


def test_a_reward_model_of_several_labels_is_refused(tmp_path):
    path = tiny.save_reward(tmp_path / "three")
    edit(path, lambda tensors: tensors.update({"score.weight": torch.zeros(3, 16)}))
    with pytest.raises(ValueError, match=r"its score head has 3 labels \(score.weight\)"):
        load(path, "reward")


@pytest.mark.parametrize("name", ["score", "classifier", "value_head", "v_head.summary"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stored_head_is_kept_whatever_its_name(tmp_path, name, bias):
    path = tiny.save_reward(tmp_path / "own")
    stored = {f"{name}.weight": torch.randn(1, 16)} | (
        {f"{name}.bias": torch.ones(1)} if bias else {}
    )
    edit(path, lambda tensors: (tensors.pop("score.weight"), tensors.update(stored)))
    critic = load(path, "critic")
    assert torch.equal(critic.score.weight, stored[f"{name}.weight"])
    assert critic.score.bias.item() == bias
    if not bias:
        assert torch.equal(load(path, "reward").score.weight, stored[f"{name}.weight"])


def test_tensors_without_a_place_are_refused_or_said(models, tmp_path, caplog):
    path = copy(models, "policy", tmp_path / "more")
    edit(path, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 16)}))
    edit(
        path, lambda tensors: tensors.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(2)})
    )
    load(path)
    assert "1 of its tensors are left out (v_head.summary)" in caplog.text
    edit(path, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="no place for its tensor model.layers.2.mlp.up_proj"):
        load(path)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("fp8", r"\(quantization_config.quant_method=fp8\).*FineGrainedFP8Config\(dequantize=True"),
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)\)\.save_pretrained\('OUT'\)\"$"),
        ("gptq", "quant_method=gptq.*; give the checkpoint that it was made from"),
        ("bitsandbytes", "quant_method=bitsandbytes"),
    ],
)
def test_quantised_weights_are_refused_before_any_is_read(models, tmp_path, method, words):
    path = copy(models, "policy", tmp_path / method)
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words) as error:
        load_config(ModelConfig(path=str(path)), "policy")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_numbers_without_scales_are_refused(models, tmp_path, dtype):
    path, name = copy(models, "policy", tmp_path / "bare"), "model.layers.0.mlp.up_proj.weight"
    edit(path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{name} is stored as {str(dtype)[6:]}; give"):
        load(path)


@pytest.mark.parametrize("old", [True, False])
def test_the_text_model_of_a_vision_language_checkpoint_is_read(tmp_path, caplog, old):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28}
    heads["tie_word_embeddings"] = False  # what the whole says holds: its head is tied
    config = AutoConfig.for_model(
        "gemma3", text_config=text | heads, vision_config=sight | {"num_attention_heads": 2}
    )
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path, save_original_format=old)
    lm, ids = load(tmp_path), torch.tensor([[4, 5, 6]])
    with torch.no_grad(), packed.padded(lm):
        torch.testing.assert_close(lm(ids).logits, whole(ids).logits)
    assert lm.config.vocab_size == 16 and "vision_tower" in caplog.text
    assert load(tmp_path, "critic", fresh_head=True).score.weight.shape == (1, 16)


def test_a_head_that_comes_before_the_embedding_it_shares_is_read(tmp_path):
    """As RoBERTa's; the file has the embedding alone."""
    shape = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 20, "is_decoder": True}
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta", **shape)).eval()
    whole.save_pretrained(tmp_path)
    lm, ids = load(tmp_path), torch.tensor([[4, 5, 6]])
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    with torch.no_grad(), packed.padded(lm):
        torch.testing.assert_close(lm(ids).logits, whole(ids).logits)


def test_the_end_ids_of_a_generation_config_are_read(models, tmp_path, caplog):
    path = copy(models, "policy", tmp_path / "ends")
    stored = {"eos_token_id": [2, 4, 5], "top_p": 0.9, "suppress_tokens": [6]}
    (path / "generation_config.json").write_text(json.dumps(stored))
    assert load(path).generation_config.eos_token_id == [2, 4, 5]
    assert "asks for top_p=0.9, suppress_tokens=[6]; this run samples as its own" in caplog.text
    (path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json"):
        load(path)


def test_checkpoints_that_are_not_there(models, tmp_path):
    unsafe = copy(models, "policy", tmp_path / "pickled")
    (unsafe / "model.safetensors").rename(unsafe / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model.safetensors; convert"):
        load(unsafe)
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (unsafe / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is in the index but"):
        load(unsafe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such directory"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "absent.gguf")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(models / "policy" / "config.json", bare)
    with pytest.raises(ValueError, match="name the directory or hub id of one"):
        load_tokenizer(ModelConfig(path=str(bare)))


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "num_attention_heads", "\n", "'num_attention_heads' expected int, got str"),
        (
            "config.json",
            "num_attention_heads",
            5,
            "not a multiple of the number of attention heads",
        ),
        ("config.json", "head_dim", 0, "no AutoModelForCausalLM of it: "),
        (
            "generation_config.json",
            "eos_token_id",
            "",
            "eos_token_id='' is neither an id nor a list",
        ),
        ("generation_config.json", "eos_token_id", [{}], "eos_token_id=.* is neither an id nor a"),
        ("tokenizer.json", "model", None, "tokenizer=.*; name the directory or hub id of one"),
        ("tokenizer.json", "added_tokens", [[None]], "tokenizer=.*; name the directory or hub id"),
        ("tokenizer_config.json", "model_max_length", {}, "tokenizer=.*; name the directory or"),
    ],
)
def test_values_that_no_model_has_are_one_line(models, tmp_path, file, key, value, message):
    path = copy(models, "policy", tmp_path / "odd")
    settings = json.loads((path / file).read_text()) | {key: value}
    (path / file).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message) as error:
        load_tokenizer(ModelConfig(path=str(path)))
        load(path)
    assert "\n" not in str(error.value)


def test_critics_need_a_score_head_of_their_family(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    config = AutoConfig.for_model("bert", num_attention_heads=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no linear `score` head"):
        load(tmp_path, "critic", fresh_head=True)


def test_a_critic_of_a_family_whose_head_for_tokens_has_another_name(tmp_path):
    sizes = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = AutoConfig.for_model("gpt2", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load(tmp_path, "critic", fresh_head=True).score.weight.shape == (1, 8)


def test_critic_and_reward_have_one_label(models):
    assert load_config(ModelConfig(path=str(models / "policy")), "critic").num_labels == 1
    assert load_config(ModelConfig(path=str(models / "policy")), "reward").num_labels == 1


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_reads_as_transformers_reads_it(tmp_path, monkeypatch):
    source = cache_dir() / "smollm2" / next(iter(FILES["smollm2"]))
    if not source.exists():
        pytest.skip("needs an asset: gearshift fetch smollm2")
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path))
    config = ModelConfig(path=str(source))
    lm = load_model(config, "policy", PLAIN)
    (converted,) = (tmp_path / "converted").glob("*/model.safetensors")
    written = converted.stat().st_mtime_ns
    assert load_tokenizer(config).chat_template
    load_config(config, "policy")
    assert converted.stat().st_mtime_ns == written
    expected = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    ids = torch.tensor([[1, 9906, 856, 836]])
    with torch.no_grad(), packed.padded(lm):
        assert torch.equal(lm(ids).logits, expected(ids).logits)


def test_attention_that_would_lose_a_soft_cap_is_refused():
    config, half = Gemma2Config(attn_logit_softcapping=50.0), torch.bfloat16
    assert attention_implementation("auto", config, half) != "sdpa"
    assert attention_implementation("eager", config, half) == "eager"
    with pytest.raises(ValueError, match="attn='sdpa': gemma2 caps .*; use auto, eager or"):
        attention_implementation("sdpa", config, half)
    config.attn_logit_softcapping = None
    assert attention_implementation("sdpa", config, half) == "sdpa"


def test_auto_is_what_the_class_has(tmp_path):
    sizes = {"vocab_size": 16, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes)).save_pretrained(
        tmp_path
    )
    assert load(tmp_path).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn=sdpa: BloomForCausalLM does not support"):
        load_model(ModelConfig(path=str(tmp_path), attn="sdpa"), "policy", PLAIN)


def test_a_renamed_checkpoint_keeps_its_head_and_says_what_it_drops(models, tmp_path, caplog):
    path, head = copy(models, "renamed", tmp_path / "renamed"), torch.randn(1, 16)
    edit(path, lambda tensors: tensors.update({"v_head.summary.weight": head}))
    load(path)
    assert "1 of its tensors are left out (v_head.summary)" in caplog.text
    assert torch.equal(load(path, "critic").score.weight, head)
    edit(path, lambda tensors: tensors.update({"model.layers.2.mlp.x.weight": head}))
    with pytest.raises(ValueError, match="no place for its tensor model.layers.2.mlp.x.weight"):
        load(path)


def test_flash_attn_is_for_half_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    config = Gemma2Config(attn_logit_softcapping=None)
    assert attention_implementation("auto", config, torch.bfloat16) == "flash_attention_2"
    assert attention_implementation("auto", config, torch.float32) == "sdpa"
    with pytest.raises(ValueError, match="attn='flash_attention_2': flash-attn takes no .*float32"):
        attention_implementation("flash_attention_2", config, torch.float32)


def test_buffers_follow_the_engine():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    place_buffers(SimpleNamespace(module=module, device=torch.device("meta")))
    assert all(buffer.is_meta for buffer in module.buffers())
    assert not any(parameter.is_meta for parameter in module.parameters())
