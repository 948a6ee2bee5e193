"""What users get wrong: one line that names the fix, exit status 2, nothing half-written."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from gearshift.engine.checkpoint import store as checkpoint_store
from gearshift.engine.config import deepspeed as ds_config
from gearshift.launch import train
from tests.tiny import job as tiny_job
from tests.tiny import models as tiny
from tests.tiny import on_ranks


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a job that runs."""
    folder = tmp_path_factory.mktemp("job")
    tiny_job.write(folder)
    return folder


@pytest.fixture
def refused(job, tmp_path, capsys, monkeypatch):
    """refused(message, *overrides): runs the job with them and holds it to the house's rules."""
    tiny_job.alone(monkeypatch)

    def run(message: str, *overrides: object, folder: Path = tmp_path / "run") -> str:
        before, _ = contents(folder), capsys.readouterr()
        arguments = ["--config", str(job / "run.yaml"), "--run.dir", str(folder)]
        assert train.main([*arguments, *map(str, overrides)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("gearshift: error: ") and told.count("\n") == 1, told
        for part in message.split(" ... "):
            assert part in told
        assert "Traceback" not in told
        assert contents(folder) == before, "something was written"
        return told

    return run


def contents(folder: Path) -> dict[str, bytes] | None:
    if not folder.is_dir():
        return None
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bert_judge(folder: Path, positions: int) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "bert", vocab_size=tiny_job.VOCABULARY, num_attention_heads=1, num_labels=1,
        max_position_embeddings=positions, **sizes,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny.tokenizer(tiny_job.VOCABULARY).save_pretrained(folder)


def reward(folder: Path, body: str) -> str:
    """A reward file whose function has this body; what --rewards.0.function takes."""
    (folder / "wrong.py").write_text(f"def score(prompts, completions, **columns):\n    {body}\n")
    return f"{folder / 'wrong.py'}:score"


# The configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--ppo.kl_coeff", "1"], "ppo.kl_coeff: no such key; did you mean ppo.kl_coef?"),
        (["--run.steps", "many"], "run.steps='many': expected a whole number"),
        (["--ppo.gamma", "1.5"], "ppo.gamma=1.5: must be at most 1"),
        (["--rewards", "[]"], "rewards=[]: at least one is needed, as --rewards.0.function"),
        (["--data.sources", "[]"], "data.sources=[]: at least one is needed, as --data.sources"),
        (["--ppo.minibatch_size", "3"], "ppo.minibatch_size=3: must divide prompts_per_step"),
        (
            ["--sampling.min_new_tokens", "9"],
            "sampling.min_new_tokens=9: more than max_new_tokens=6",
        ),
        (["--sampling.stop", "[w4, '']"], "sampling.stop=['w4', '']: an empty string ends every"),
        (["--sampling.suppress_tokens", "[3, 16]"], "sampling.suppress_tokens=[16]: the actor has"),
        (
            ["--sampling.limit_key", "prompt"],
            "prompts.jsonl, row 0: sampling.limit_key=prompt: a prompt has 'w4 w5' in this column",
        ),
        (
            ["--data.sources.0.weight_key", "share"],
            "data.sources.0.weight_key=share: no such column in",
        ),
        (
            ["--eval.sources.0.path", "a.jsonl", "--eval.sources.0.weight_key", "w"],
            "eval.sources.0.weight_key=w: rows of data.sources alone have it",
        ),
        (["--sampling.suppress_tokens", str([*range(16)])], "names every token that the actor has"),
        (["--sampling.limit_key", "most"], "sampling.limit_key=most: no dataset has this column"),
        (["--sampling.temperature", "0"], "sampling.temperature=0: greedy ... above 0"),
        (["--ppo.kl_estimator", "k3"], "kl_estimator=k3 ... use k1, or kl_in=loss"),
        (["--ppo.kl_in", "loss"], "ppo.kl_estimator=k1 ... use k2 or k3"),
        (["--ppo.estimator", "rloo"], "samples_per_prompt=1: estimator=rloo compares several"),
        (["--run.trackers", "[wandbb]"], "run.trackers=wandbb: expected any of"),
        (
            ["--rewards.0.name", "critic"],
            "rewards.0.name=critic: must be ... none of actor",
        ),
        (["--rewards.0.kind", "http"], "rewards.0.urls: needed because rewards.0.kind=http"),
        (["--eval.every", "0"], "eval.every=0: must be at least 1"),
        (
            ["--eval.pass_at", "[1, 8]", "--eval.samples_per_prompt", "4"],
            "eval.pass_at=[1, 8]: 8 must be",
        ),
        (["--eval.pass_at", "[a]"], "eval.pass_at=['a']: expected a list of whole numbers"),
        (["--eval.sources.0.name", "a"], "eval.sources.0.path: give a file, folder or hub id"),
        (["--eval.best_by", "eval/a/scores"], "eval.best_by=eval/a/scores: needs eval.sources"),
        (
            ["--eval.sources.0.path", "a.jsonl", "--eval.best_by", "eval/a/score"],
            "eval.best_by=eval/a/score: no such figure; as eval/a/scores",
        ),
        (
            ["--eval.sources", "[{path: x/a.jsonl}, {path: y/a.jsonl}]"],
            "eval.sources.1.name=a: used before; each needs a name of its own",
        ),
        (
            ["--eval.rewards", "[{name: a, kind: model, path: x}]"],
            "eval.rewards.0.kind=model: reward models are loaded for the run's own rewards only",
        ),
    ],
)
def test_settings(refused, overrides, message):
    refused(message, *overrides)


def test_held_out_prompts(refused, tmp_path):
    """They are read before any model, as those of training are."""
    source = "--eval.sources.0.path"
    refused("nowhere.jsonl: no such data file or folder", source, tmp_path / "nowhere.jsonl")
    path = tiny_job.write_rows(tmp_path / "a.jsonl", [{"prompt": "w4"}, {"prompt": 7}])
    refused("a.jsonl, row 1: prompt='7': must be a string", source, path)
    path = tiny_job.write_rows(tmp_path / "b.jsonl", [{"prompt": " ".join(["w4"] * 9)}])
    refused("b.jsonl: all its 1 prompts have more tokens than data.max_pro", source, path)
    refused(
        "b.jsonl, row 0: the prompt has 9 tokens, more", source, path, "--data.overlong", "error"
    )
    path = tiny_job.write_rows(tmp_path / "c.jsonl", [{"text": "w4"}])
    refused("eval.sources.0.prompt_key=prompt: no such column in", source, path)
    path = tiny_job.write_rows(tmp_path / "d.jsonl", [{"prompt": "w4"}])
    reward = "[{name: a, function: math_verify}]"
    pytest.importorskip("math_verify")
    refused("eval.sources.0: reward 'a': math_verify needs the dataset column 'answer'",
            source, path, "--eval.rewards", reward)  # fmt: skip
    refused("data.max_prompt_tokens=8 + eval.sampling.max_new_tokens=200 exceed the actor's",
            source, path, "--eval.sampling.max_new_tokens", 200)  # fmt: skip


def test_a_missing_file(refused):
    refused("nowhere.yaml: no such configuration file", "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ppo: [1", "wrong.yaml: not valid YAML: ... line 1"),
        (b"ppo: {lam: \xff}", "wrong.yaml: not valid YAML"),
        (b"- 1", "wrong.yaml: must hold sections such as `ppo:`"),
    ],
)
def test_invalid_yaml(refused, tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_bytes(text)
    refused(message, "--config", tmp_path / "wrong.yaml")


def test_nothing_at_all(capsys):
    assert train.main([]) == 2
    assert "--config: missing; usage: deepspeed launch/train.py" in capsys.readouterr().err
    assert train.main(["--config"]) == 2
    assert "--config: give a YAML file" in capsys.readouterr().err


def test_more_ranks_than_prompts_divide_by(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused("ppo.prompts_per_step=4: must be a multiple of the 3 ranks")


# DeepSpeed's JSON


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_clipping": "auto"}, "gradient_clipping=auto: write the value"),
        ({"zero_optimisation": {}}, "zero_optimisation: no such key; did you mean zero_opt"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: ... set actor.optimizer"),
        ({"train_batch_size": 8}, "train_batch_size: ... set ppo.minibatch_size"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu=2: must be 1"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: must be 0, 1, 2 or 3"),
    ],
)
def test_deepspeed_json(refused, tmp_path, changes, message):
    settings = json.loads((ds_config.SHIPPED / "trained_zero0.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(settings | changes))
    refused(f"mine.json: {message}", "--actor.deepspeed", tmp_path / "mine.json")


def test_deepspeed_json_missing_or_broken(refused, tmp_path):
    refused("actor_zer0.json: no such DeepSpeed file", "--actor.deepspeed", "actor_zer0.json")
    (tmp_path / "mine.json").write_text("{,}")
    refused("mine.json: not JSON", "--actor.deepspeed", tmp_path / "mine.json")


# The run folder


def checkpoint(run: Path) -> Path:
    """A whole checkpoint of nothing."""
    target = checkpoint_store.step_folder(run / "checkpoints", 1)
    checkpoint_store.partial(target).mkdir(parents=True)
    checkpoint_store.publish(target, {"files": {}})
    return target


def test_a_folder_of_another_run(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    refused("holds another run; choose a new folder, or delete it")  # auto, but no checkpoint
    checkpoint(tmp_path / "run")
    refused("or delete it; run.resume=auto continues it", "--run.resume", "none")
    refused("holds another run; choose a new folder", "--run.resume", checkpoint(tmp_path))


def test_no_place_to_write(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    message = "cannot be written: ... choose another folder"
    refused(message, folder=tmp_path / "file" / "run")
    refused(message, folder=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_resuming_from_nowhere(refused, tmp_path):
    refused("no checkpoint there; use auto, none or the path", "--run.resume", tmp_path / "x")


def test_a_tracker_that_is_not_installed(refused, monkeypatch):
    find = importlib.util.find_spec
    absent = lambda name: None if name == "trackio" else find(name)
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    refused("'trackio' is not installed: pip install trackio", "--run.trackers", "[trackio]")


# Data


def test_missing_data(refused, tmp_path):
    refused("x.jsonl: no such data file or folder", "--data.sources.0.path", tmp_path / "x.jsonl")
    refused("no such file or folder", "--data.sources.0.path", "someone/prompts")


def test_wrong_column(refused):
    told = refused("prompt_key=question: no such column", "--data.sources.0.prompt_key", "question")
    assert "its columns are prompt, gold" in told


def test_empty_and_broken_data(refused, tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    refused("x.jsonl: has no rows", "--data.sources.0.path", tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"prompt": "w4"}\n{"prompt"\n')
    refused("x.jsonl, line 2: not JSON", "--data.sources.0.path", tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    refused("x.jsonl: not UTF-8 text", "--data.sources.0.path", tmp_path / "x.jsonl")
    tiny_job.write_rows(tmp_path / "x.jsonl", [{"prompt": 7}])
    refused("x.jsonl, row 0: prompt='7'", "--data.sources.0.path", tmp_path / "x.jsonl")
    answer = [{"messages": [{"role": "assistant", "content": "w4"}]}]
    tiny_job.write_rows(tmp_path / "x.jsonl", answer)
    refused("has no turn before the answer", "--data.sources.0.path", tmp_path / "x.jsonl")


def test_overlong_prompts(refused):
    short = ["--data.max_prompt_tokens", 1]
    refused("2 tokens, more than data.max_prompt_tokens=1; raise it, or data.overlong=drop",
            *short, "--data.overlong", "error")  # fmt: skip
    refused("all its 8 prompts have more tokens than data.max_prompt_tokens=1; raise it", *short)


def test_more_than_the_model_s_context(refused):
    refused("sampling.max_new_tokens=200 exceed the actor's context of 128; lower either",
            "--sampling.max_new_tokens", 200)  # fmt: skip


def test_a_critic_of_fewer_positions(refused, tmp_path):
    """Its reward model, whose rows are cut, starts a critic, whose rows are not."""
    tiny.save_reward(tmp_path / "judge", tiny_job.VOCABULARY, max_position_embeddings=12)
    judge = ["--rewards.0.kind", "model", "--rewards.0.path", tmp_path / "judge"]
    told = refused("sampling.max_new_tokens=6 exceed the critic's context of 12; lower", *judge)
    assert "or give another critic.path" in told


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_that_change_the_rotary_frequencies(refused, tmp_path, kind):
    factors = {"short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    own = {"original_max_position_embeddings": 12, **factors} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **own}
    count = 128 if kind == "longrope" else 12
    sizes = {"max_position_embeddings": count, "rope_parameters": rope}
    tiny.save_policy(tmp_path / "model", tiny_job.VOCABULARY, **sizes)
    message = "exceed the actor's context of 12, where its rotary frequencies change; lower either"
    refused(message, "--actor.path", tmp_path / "model")


def test_a_cache_below_one_sequence(refused):
    refused("rollout.kv_cache_gb=1e-06: one sequence of ... tokens needs ... raise it",
            "--rollout.kv_cache_gb", 1e-6)  # fmt: skip


def test_a_chat_without_a_template(refused, tmp_path):
    chat = [{"prompt": [{"role": "user", "content": "w4"}]}]
    path = tiny_job.write_rows(tmp_path / "chat.jsonl", chat)
    refused("tokenizer has no chat template; set actor.tokenizer", "--data.sources.0.path", path)


# Models


def test_missing_models(refused, tmp_path):
    refused("actor.path= ... no such directory", "--actor.path", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("actor.path= ... has no config.json", "--actor.path", tmp_path / "empty")
    refused("actor.path= ... x.gguf': no such file", "--actor.path", tmp_path / "x.gguf")
    refused("actor.path=shape:qwen2.5-0.5b: a shape has no weights; give",
            "--actor.path", "shape:qwen2.5-0.5b")  # fmt: skip


def test_missing_parts_of_a_model(refused, job, tmp_path):
    model = shutil.copytree(job / "policy", tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused("actor.tokenizer= ... no tokenizer is there", "--actor.path", model)
    (model / "model.safetensors").unlink()
    refused("actor.path= ... no model.safetensors", "--actor.path", model)


def test_broken_models(refused, job, tmp_path):
    model = shutil.copytree(job / "policy", tmp_path / "model")
    weights, index = model / "model.safetensors", model / "model.safetensors.index.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("actor.path= ... model.safetensors ... cut off or broken", "--actor.path", model)
    index.write_text("{}")
    refused("actor.path= ... index.json ... has no weight_map", "--actor.path", model)
    index.write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    refused("model-1.safetensors is in the index but not on disk", "--actor.path", model)


def test_a_broken_configuration(refused, job, tmp_path):
    model = shutil.copytree(job / "policy", tmp_path / "model")
    (model / "config.json").write_text("{,")
    refused("actor.path= ... not a valid JSON file", "--actor.path", model)
    shutil.copy(job / "policy" / "config.json", model)
    (model / "generation_config.json").write_text("{,")  # the reference reads it first
    refused("actor.path= ... generation_config.json: ", "--actor.path", model)


def test_a_family_without_a_critic(refused, job, tmp_path):
    """Granite has no class that gives a score, per token or sequence."""
    model = tmp_path / "model"
    shutil.copytree(job / "policy", model)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = AutoConfig.for_model("granite", vocab_size=16, num_attention_heads=2, **sizes)
    (model / "config.json").write_text(json.dumps(config.to_diff_dict()))
    message = "critic: no AutoModelForTokenClassification of granite ... or ppo.estimator=rloo"
    assert len(refused(message, "--actor.path", model)) < 400


def test_a_model_that_is_no_language_model(refused, job, tmp_path):
    model = shutil.copytree(job / "policy", tmp_path / "model")
    config = AutoConfig.for_model("t5", vocab_size=16, d_model=16, num_layers=1, num_heads=2)
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    refused("actor.path: no AutoModelForCausalLM of t5: ", "--actor.path", model)


def test_a_model_whose_head_is_not_one_product(refused, tmp_path):
    """BERT transforms its hidden states once more before the output embedding."""
    config = AutoConfig.for_model(
        "bert", vocab_size=tiny_job.VOCABULARY, hidden_size=8, num_attention_heads=1,
        intermediate_size=8, num_hidden_layers=1, is_decoder=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer(tiny_job.VOCABULARY).save_pretrained(tmp_path / "model")
    rloo = ["--ppo.estimator", "rloo", "--ppo.samples_per_prompt", "2", "--rollout.engine", "hf"]
    message = f"actor.path='{tmp_path / 'model'}': BertLMHeadModel makes its logits in a way"
    refused(message, "--actor.path", tmp_path / "model", "--ppo.kl_coef", "0", *rloo)


def test_code_of_a_checkpoint(refused, job, tmp_path):
    model = shutil.copytree(job / "policy", tmp_path / "model")
    settings = {"model_type": "nonesuch", "auto_map": {"AutoConfig": "code.C"}}
    (model / "config.json").write_text(json.dumps(settings))
    refused("actor.path= ... custom code ... ; trust_remote_code: true runs it",
            "--actor.path", model)  # fmt: skip


def test_attention_that_is_not_there(refused):
    refused("attn=flash_attention_9: ", "--actor.attn", "flash_attention_9")


def test_a_model_of_other_shapes(refused, job, tmp_path):
    model = shutil.copytree(job / "policy", tmp_path / "model")
    config = AutoConfig.from_pretrained(model)
    config.update({"intermediate_size": 64})
    config.save_pretrained(model)
    told = refused("mlp.gate_proj.weight is [32, 16], but config.json", "--actor.path", model)
    assert "makes it [64, 16]" in told


@pytest.mark.parametrize("role", ["reference", "critic"])
def test_vocabularies_that_differ(refused, tmp_path, role):
    tiny.save_policy(tmp_path / "small", 8)
    told = refused(f"{role}.path", f"--{role}.path", tmp_path / "small")
    assert "vocabulary of 8 is smaller than the actor's tokenizer (16 tokens)" in told


def test_tokens_that_the_model_has_no_row_for(refused, job, tmp_path):
    """Gemma 3's tokenizer has one, for images; what matters is whether a text has it."""
    model = shutil.copytree(job / "policy", tmp_path / "model")
    tiny.tokenizer(tiny_job.VOCABULARY + 2).save_pretrained(model)
    path = tiny_job.write_rows(tmp_path / "x.jsonl", [{"prompt": "w4"}, {"prompt": "w4 w16"}])
    asked, beyond = ["--actor.path", model], "='w4 w16': the tokenizer makes id 16 of it, and the"
    refused(f"x.jsonl, row 1: prompt{beyond}", *asked, "--data.sources.0.path", path)
    refused(f"x.jsonl, row 1: prompt{beyond}", *asked, "--eval.sources.0.path", path)
    texts = ["--ppo.ptx_coef", 1, "--pretrain.sources.0.path", path, "--pretrain.rows", 1]
    refused(f"x.jsonl, row 1: prompt{beyond}", *asked, *texts, "--pretrain.sources.0.prompt_key",
            "prompt")  # fmt: skip
    run = [
        "--config",
        str(job / "run.yaml"),
        "--run.dir",
        str(tmp_path / "done"),
        "--run.steps",
        "1",
    ]
    assert train.main([*run, *map(str, asked)]) == 0
    tokenizer = tiny.tokenizer(tiny_job.VOCABULARY)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(model)
    refused("actor.path: its vocabulary of 16 is smaller than the actor's tokenizer (17", *asked)


def test_a_reward_model_without_the_rows_that_pad_the_actor_s_vocabulary(refused, tmp_path):
    actor = tiny.save_policy(tmp_path / "padded", 64)
    tiny.tokenizer(tiny_job.VOCABULARY).save_pretrained(actor)
    tiny.save_reward(tmp_path / "judge", tiny_job.VOCABULARY)
    judge = ["--rewards.0.kind", "model", "--rewards.0.path", tmp_path / "judge"]
    told = refused(
        "rewards.0.path= ... its vocabulary of 16 is smaller", *judge, "--actor.path", actor
    )
    assert "any of 64 ids; pad it by model.resize_token_embeddings(64)" in told


def test_tokens_that_differ(refused, tmp_path):
    folder = tiny.save_policy(tmp_path / "other", tiny_job.VOCABULARY)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"w?"').replace('"w4"', '"w5"'))
    told = refused("reference.path= ... has 'w5' at 4", "--reference.path", folder)
    assert "the actor's at 5; use a model with the actor's tokenizer" in told


def test_a_reward_model_without_a_tokenizer(refused, tmp_path):
    tiny.save_reward(tmp_path / "judge", tiny_job.VOCABULARY)
    for file in (tmp_path / "judge").glob("tokenizer*"):
        file.unlink()
    judge = ["--rewards.0.kind", "model", "--rewards.0.path", tmp_path / "judge"]
    refused("rewards.0.tokenizer= ... no tokenizer is there", *judge)


def test_a_reward_model_of_fewer_positions(refused, tmp_path):
    bert_judge(tmp_path / "judge", positions=6)
    judge = ["--rewards.0.kind", "model", "--rewards.0.path", tmp_path / "judge"]
    told = refused("rewards.0.max_tokens=7: ", *judge, "--rewards.0.max_tokens", 7)
    assert "judge' has 6 positions; use 6 or fewer" in told


def test_a_reward_model_whose_template_takes_no_system_prompt(refused, tmp_path):
    tiny.save_reward(tmp_path / "judge", tiny_job.VOCABULARY, max_position_embeddings=4096)
    tokenizer = tiny.tokenizer(tiny_job.VOCABULARY)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    tokenizer.save_pretrained(tmp_path / "judge")
    judge = ["--rewards.0.kind", "model", "--rewards.0.path", tmp_path / "judge"]
    message = "rewards.0.chat_template=true: ... takes no data.system_prompt (no system role); set"
    refused(message, *judge, "--data.system_prompt", "be kind")


def test_more_tensor_parallel_ranks_than_there_are(refused):
    refused("rollout.tp=2: must divide the 1 ranks of a node; use one of [1]", "--rollout.tp", 2)


# Rewards


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere.py:score", "no file"),
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("reward.py", "write module:function or file.py:function"),
        ("{job}/reward.py:scores", "has no 'scores'; did you mean score?"),
    ],
)
def test_reward_functions_that_are_not_there(refused, job, function, message):
    refused(message, "--rewards.0.function", function.format(job=job))


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("texts", "its signature is (texts); write def reward(prompts, completions, **columns)"),
        ("completions, answer", "needs the dataset column 'answer'; columns: gold, prompt"),
    ],
)
def test_reward_functions_of_another_signature(refused, tmp_path, signature, message):
    (tmp_path / "wrong.py").write_text(f"def score({signature}):\n    return []\n")
    refused(message, "--rewards.0.function", f"{tmp_path / 'wrong.py'}:score")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {}['gold']", "reward 'words' raised KeyError: 'gold' (wrong.py:2); prompt"),
        ("return [0.0]", "reward 'words' returned 1 scores for 4 completions"),
        ("return [float('nan') for _ in prompts]", "reward 'words' is nan, not finite; prompt"),
        ("return ['good' for _ in prompts]", "reward 'words' is 'good', not a number; prompt"),
        ("return None", "reward 'words' returned NoneType: must return a list"),
    ],
)
def test_reward_functions_that_fail(refused, tmp_path, body, message):
    refused(message, "--rewards.0.function", reward(tmp_path, body))


def test_an_endpoint_that_is_down(refused):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    down = ["--rewards.0.kind", "http", "--rewards.0.urls", f"[{url}]", "--rewards.0.retries", 1]
    told = refused("reward 'words': no answer after 2 tries over", *down)
    assert "Connection refused" in told


# Not mistakes


def test_a_pad_token_that_is_the_end_token(job, tmp_path, capsys, monkeypatch):
    tiny_job.alone(monkeypatch)
    shutil.copytree(job / "policy", tmp_path / "model")
    tiny.tokenizer(tiny_job.VOCABULARY, pad="<eos>").save_pretrained(tmp_path / "model")
    overrides = ["--actor.path", tmp_path / "model", "--run.dir", tmp_path / "run"]
    overrides += ["--run.steps", 1, "--run.export", "false"]
    status = train.main(["--config", str(job / "run.yaml"), *map(str, overrides)])
    assert status == 0, capsys.readouterr().err


def test_a_reward_model_of_few_positions(job, tmp_path, capsys, caplog, monkeypatch):
    """Prompts of two tokens and responses of up to six, read by a BERT of four positions."""
    tiny_job.alone(monkeypatch)
    bert_judge(tmp_path / "judge", positions=4)
    overrides = ["--rewards.0.kind", "model", "--rewards.0.path", tmp_path / "judge"]
    overrides += ["--rewards.0.deepspeed", "frozen_zero3.json", "--run.dir", tmp_path / "run"]
    overrides += ["--run.steps", 1, "--run.export", "false"]
    status = train.main(["--config", str(job / "run.yaml"), *map(str, overrides)])
    assert status == 0, capsys.readouterr().err
    assert caplog.text.count("it reads the last 4 tokens of a row") == 1
    assert "is read without its beginning" in caplog.text  # a row was long enough to matter


# Processes


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        ("0", "rank 1 of n1 did not come in 2 s; 1 did, of "),
        pytest.param("1", "MASTER_ADDR=127.0.0.1: no answer to ", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_come(job, tmp_path, rank, told):
    """As where the other host has no configuration, no key, or an error of its own."""
    place = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": on_ranks.free_port(), "GEARSHIFT_HOSTS": "n0:1,n1:1"}
    command = [sys.executable, tiny_job.TRAIN, "--config", job / "run.yaml"]
    command += [f"--run.dir={tmp_path}/run", "--run.start_timeout_s", "2"]
    done = subprocess.run(
        command, env=tiny_job.environment(**place), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("gearshift: error") and told in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken(job, tmp_path):
    """As rank 0 of two meets it."""
    taken = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rank0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, tiny_job.TRAIN, "--config", job / "run.yaml", f"--run.dir={tmp_path}/run"],
        env=tiny_job.environment(**rank0, MASTER_PORT=str(taken.port)),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"MASTER_PORT={taken.port}: another job" in done.stderr
    assert "--master_port" in done.stderr
    assert not (tmp_path / "run").exists()
