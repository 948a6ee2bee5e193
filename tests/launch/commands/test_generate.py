"""`gearshift generate`: what it prints, and what it refuses."""

import io
import shutil

import peft
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from gearshift.launch import cli
from tests.tiny import models as tiny

PROMPTS = ["w4 w5 w6", "w7", "w9 w4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("model"), 16, initializer_range=0.2)


@pytest.fixture
def generate(model, capsys):
    """Runs the command; returns its lines."""
    capsys.readouterr()

    def run(*arguments: object) -> list[str]:
        status = cli.main(["generate", "--model", str(model), *map(str, arguments)])
        told = capsys.readouterr()
        assert status == 0, told.err
        return told.out.splitlines()

    return run


@torch.no_grad()
def expected(model, prompt: str, length: int) -> str:
    """What transformers makes of it, greedily."""
    tokenizer = tiny.tokenizer(16)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    out = lm.generate(ids, do_sample=False, max_new_tokens=length)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_responses_are_those_of_transformers(generate, model):
    greedy = ["--temperature", 0, "--max-new-tokens", 12]
    assert generate(*greedy, *PROMPTS) == [f"{p} -> {expected(model, p, 12)}" for p in PROMPTS]


def test_an_adapter_of_peft_is_added(generate, model, tmp_path, capsys):
    """By the base that it names, or the one that is given."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    greedy = ["--temperature", 0, "--max-new-tokens", 8]
    told = [f"{p} -> {expected(tmp_path / 'merged', p, 8)}" for p in PROMPTS]
    assert told != generate(*greedy, *PROMPTS)
    assert generate("--adapter", tmp_path / "adapter", *greedy, *PROMPTS) == told
    arguments = ["generate", "--adapter", str(tmp_path / "adapter"), *map(str, greedy), *PROMPTS]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == told
    assert cli.main(["generate", "--adapter", str(model), "w4"]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


def test_prompts_from_standard_input(generate, monkeypatch):
    greedy = ["--temperature", 0, "--max-new-tokens", 4]
    given = generate(*greedy, *PROMPTS)
    monkeypatch.setattr("sys.stdin", io.StringIO("w4 w5 w6\n\nw7\nw9 w4"))
    assert generate(*greedy) == given


def test_samples_depend_on_the_seed(generate):
    def responses(*arguments: object) -> list[str]:
        return [line.split(" -> ")[1] for line in generate("--samples", 6, *arguments, "w4 w5")]

    first = responses("--seed", 1)
    assert len(first) == 6 and len(set(first)) > 1
    assert responses("--seed", 1) == first
    assert responses("--seed", 2) != first
    assert len(set(responses("--top-k", 1))) == 1


def test_chats_are_wrapped_by_the_template(tmp_path, capsys):
    folder = tiny.save_policy(tmp_path / "chat", 16, initializer_range=0.2)
    tokenizer = tiny.tokenizer(16)
    tokenizer.chat_template = "{% for m in messages %}w8 {{ m['content'] }} w9{% endfor %}"
    tokenizer.save_pretrained(folder)
    greedy = ["generate", "--model", str(folder), "--temperature", "0", "--max-new-tokens", "8"]
    assert cli.main([*greedy, "--chat", "w4"]) == cli.main([*greedy, "w8 w4 w9"]) == 0
    chat, plain = (line.split(" -> ")[1] for line in capsys.readouterr().out.splitlines())
    assert chat == plain == expected(folder, "w8 w4 w9", 8)


def test_prompts_are_encoded_as_in_training(tmp_path, capsys):
    """Without the end token that some tokenizers put behind every text."""
    folder = tiny.save_policy(tmp_path / "ends", 16, initializer_range=0.2)
    tokenizer = tiny.tokenizer(16)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    tokenizer.save_pretrained(folder)
    arguments = ["--temperature", "0", "--max-new-tokens", "8", "w4 w5"]
    assert cli.main(["generate", "--model", str(folder), *arguments]) == 0
    assert capsys.readouterr().out == f"w4 w5 -> {expected(folder, 'w4 w5', 8)}\n"


def test_a_model_that_the_paged_engine_cannot_run(tmp_path, capsys):
    """The same choice as in training."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = tiny.save_policy(tmp_path / "moving", 16, initializer_range=0.2, rope_parameters=rope)
    arguments = ["--temperature", "0", "--max-new-tokens", "8", "w4 w5"]
    assert cli.main(["generate", "--model", str(folder), *arguments]) == 0
    assert capsys.readouterr().out == f"w4 w5 -> {expected(folder, 'w4 w5', 8)}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere", "x"], "--model='/nowhere': no such directory"),
        (["--chat", "w4"], "--chat: the model's tokenizer has no chat template"),
        (["--temperature", "-1", "w4"], "error: --temperature=-1.0: must be at least 0"),
        (["--top-p", "0", "w4"], "error: --top-p=0.0: must be above 0"),
        (["--max-new-tokens", "128", "w4"], "--max-new-tokens=128: a prompt has 1 tokens and the"),
        ([""], "prompts='': the tokenizer makes no token of it"),
        (["--max-new-tokens", "0", "w4"], "error: --max-new-tokens=0: must be at least 1"),
        ([], "prompts: give a text, or lines on standard input"),
        (["--samples", "0", "w4"], "--samples=0: must be at least 1"),
        ([" ".join(["w4"] * 128)], "prompts: a prompt has 128 tokens and the model 128 positions"),
    ],
)
def test_mistakes(model, arguments, message, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["generate", "--model", str(model), *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gearshift: error: ") and told.err.count("\n") == 1
    assert message in told.err


def test_ids_that_the_model_has_no_row_for(model, tmp_path, capsys):
    """As of a tokenizer with tokens that were added for another model of the family."""
    shutil.copytree(model, tmp_path / "model")
    tiny.tokenizer(18).save_pretrained(tmp_path / "model")
    assert cli.main(["generate", "--model", str(tmp_path / "model"), "w4 w17"]) == 2
    told = capsys.readouterr().err
    assert "prompt='w4 w17': the tokenizer makes id 17 of it, and the model has rows for 16" in told
    assert cli.main(["generate", "--model", str(tmp_path / "model"), "w4 w15"]) == 0


def test_a_model_that_fills_in_words_writes_none(tmp_path, capsys):
    config = AutoConfig.for_model("bert", vocab_size=16, hidden_size=8, num_attention_heads=1)
    config.save_pretrained(tmp_path)
    tiny.tokenizer(16).save_pretrained(tmp_path)
    assert cli.main(["generate", "--model", str(tmp_path), "w4"]) == 2
    assert "bert reads what follows a token, too: it writes no text" in capsys.readouterr().err


def test_folders_that_hold_more_or_other_things(model, tmp_path, capsys):
    both = shutil.copytree(model, tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    assert cli.main(["generate", "--model", str(both), "w4"]) == 2
    assert f"holds adapters; give it as --adapter {both}" in capsys.readouterr().err
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / "state.json").write_text("{}")
    assert cli.main(["generate", "--model", str(tmp_path / "step_000001"), "w4"]) == 2
    assert "it is a checkpoint: gearshift export" in capsys.readouterr().err
