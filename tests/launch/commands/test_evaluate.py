"""`gearshift evaluate`: the figures of the loop, without a run."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift.launch import cli, train
from tests.tiny import job as tiny_job
from tests.tiny import models as tiny

JUDGE = """
import random

def score(prompts, completions, gold, **columns):
    return [len(text.split()) > g + random.random() for text, g in zip(completions, gold)]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that evaluated before its first and after its last step; its folder and its YAML."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "judge.py").write_text(JUDGE)
    rows = [{"prompt": " ".join(["w9"] * n), "gold": n} for n in (1, 2, 3)]
    tiny_job.write_rows(folder / "held.jsonl", rows)
    evaluation = {
        "sources": [{"path": str(folder / "held.jsonl")}],
        "rewards": [{"name": "long", "function": f"{folder / 'judge.py'}:score"}],
        "sampling": {"max_new_tokens": 5},
        "pass_at": [1, 4],
    }
    actor = {"optimizer": {"lr": 0.01, "schedule": "constant", "warmup": 0}}
    path = tiny_job.write(folder, eval=evaluation, actor=actor)
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.alone(patch)
        assert train.main(["--config", str(path)]) == 0
    return folder, path


def evaluate(path, out, *arguments: object) -> dict:
    assert (
        cli.main(["evaluate", "--config", str(path), "--out", str(out), *map(str, arguments)]) == 0
    )
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("model", "step"),
    [(None, 0), ("run/export/actor", 2), ("run/checkpoints/step_000002", 2)],
    ids=["actor.path", "export", "checkpoint"],
)
def test_the_figures_are_those_of_the_loop(finished, tmp_path, capsys, model, step):
    """Of the policy before the first step, and after the last: the same draws, so the same bits."""
    folder, path = finished
    words = ["--model", folder / model] if model else []
    capsys.readouterr()
    found = evaluate(path, tmp_path / "found.json", *words)
    lines = {line["step"]: line for line in tiny_job.learned(folder / "run")}
    expected = {key: value for key, value in lines[step].items() if key.startswith("eval/")}
    assert found["figures"] == expected and "eval/held/rewards/long/pass_at_4" in expected
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{key} {value:.6g}" for key, value in sorted(expected.items())]
    rows = map(json.loads, (folder / "run" / "samples.jsonl").read_text().splitlines())
    shown = [row for row in rows if row.get("eval") and row.pop("step") == step]
    assert found["samples"] == shown and len(shown) == 3


def test_an_adapter_of_peft_is_added(finished, tmp_path):
    folder, path = finished
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "policy"), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny.tokenizer(tiny_job.VOCABULARY).save_pretrained(tmp_path / "merged")
    found = [
        evaluate(path, tmp_path / "found.json", *words)["samples"]
        for words in (
            [],
            ["--model", tmp_path / "adapter"],
            # As the export of a run in 4 bit, whose YAML has this.
            [
                "--model",
                tmp_path / "merged",
                "--actor.lora.r",
                2,
                "--actor.lora.load_in_4bit",
                "true",
            ],
        )
    ]
    assert found[0] != found[1] == found[2]


def test_the_policy_has_moved(finished):
    """What is compared above differs between the steps."""
    first, *_, last = tiny_job.learned(finished[0] / "run")
    assert first["eval/held/response_length/mean"] != last["eval/held/response_length/mean"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--eval.sources", "[]"], "eval.sources=[]: nothing to evaluate on; as --eval.sources.0"),
        (["--eval.sampling.max_new_tokens", "999"], "max_new_tokens=999: with data.max_prompt_tok"),
        (["--model", "/nowhere"], "error: --model='/nowhere': no such directory"),
        (["--actor.lora.r", "2", "--actor.lora.load_in_4bit", "true"], "lora.load_in_4bit=true: "),
        (
            ["--eval.rewards.0.kind", "model", "--eval.rewards.0.path", "x"],
            "eval.rewards.0.kind=model: reward models are loaded for the run's own rewards only",
        ),
    ],
)
def test_mistakes_are_one_line(finished, capsys, words, told):
    assert cli.main(["evaluate", "--config", str(finished[1]), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
