"""`gearshift plan`: verdicts, exit statuses, overrides, JSON, and mistakes."""

import json

import pytest
import yaml

from gearshift.engine import assemble
from gearshift.engine.config import load as config_load
from gearshift.launch import cli
from gearshift.launch.docs import plan as plan_docs
from tests.tiny import models as tiny

FROZEN = "frozen_zero3_cpu_bf16.json"


@pytest.fixture
def run_yaml(tmp_path):
    """Four models of 0.5B, without any file but this."""
    settings = {
        "actor": {"path": "shape:qwen2.5-0.5b", "deepspeed": "actor_zero3_bf16.json"},
        "critic": {"deepspeed": "critic_zero3_bf16.json"},
        "reference": {"deepspeed": FROZEN},
        "rewards": [
            {"name": "rm", "kind": "model", "path": "shape:qwen2.5-0.5b", "deepspeed": FROZEN}
        ],
        "ppo": {"prompts_per_step": 8, "minibatch_size": 8, "micro_batch_size": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def plan_json(capsys, *arguments: str) -> tuple[int, dict]:
    status = cli.main(["plan", "--json", *arguments])
    out = capsys.readouterr().out
    return status, json.loads(out[out.index("{\n") :])  # DeepSpeed may log its accelerator first


def test_a_run_that_fits(capsys, run_yaml):
    status, made = plan_json(capsys, "--config", run_yaml, "--gpu", "h100")
    assert (status, made["verdict"], made["reason"]) == (0, "FITS", None)
    assert {p["name"] for p in made["phases"]} == {
        *("load", "generate", "rewards", "reference", "logprobs", "values"),
        *("update_actor", "update_critic", "save"),
    }
    assert made["kv_slots"] == made["kv_slots_wanted"] == 8
    assert made["largest_micro_batch_tokens"] == 8 * 1024
    # The published count: 494,032,768 parameters with tied embeddings.
    assert made["roles"][0]["parameters"] == 494_032_768


def test_what_stays_between_generations_is_in_every_later_phase(capsys, run_yaml):
    """Shards, and with a cache of a given size that, too."""
    tp = ("--gpus", "8", "--rollout.tp", "2", "--ppo.micro_batch_size", "1")
    keep = ("--rollout.weights", "resident")
    for more, kept in (
        ((), ()),
        (keep, ("generation shards",)),
        ((*keep, "--rollout.kv_cache_gb", "3"), ("generation shards", "KV cache")),
    ):
        _, made = plan_json(capsys, "--config", run_yaml, *tp, *more)
        parts = {phase["name"]: phase["gpu"] for phase in made["phases"]}
        for name in ("rewards", "values", "update_actor", "update_critic", "save"):
            found = {what for what in ("generation shards", "KV cache") if what in parts[name]}
            assert found == set(kept), name
        assert "generation shards" not in parts["load"]
        if len(kept) == 2:
            assert parts["values"]["KV cache"] == 3e9


def test_the_critic_alone_has_no_optimizer_of_the_policy(capsys, run_yaml):
    """Nor a reference. Of the policy there are the weights, and buffers of DeepSpeed's."""
    _, made = plan_json(capsys, "--config", run_yaml, "--run.task", "critic")
    assert "reference" not in {role["name"] for role in made["roles"]}
    actor, critic = (role["gpu"] for role in made["roles"][:2])
    assert actor["weights"] > 0.98e9
    for what in ("fp32 master", "moments", "gradients"):
        assert actor[what] < 2e4 < 9e8 < critic[what]


def critic_of(capsys, folder, reward) -> tuple[int, int, str | None]:
    """Parameters of the critic and of the actor, and what was assumed."""
    settings = {
        "actor": {"path": str(folder / "actor")},
        "rewards": [{"name": "rm", "kind": "model", "path": str(reward)}],
        "data": {"max_prompt_tokens": 64},
        "sampling": {"max_new_tokens": 64},
        "ppo": {"prompts_per_step": 8, "minibatch_size": 8, "micro_batch_size": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    _, made = plan_json(capsys, "--config", str(path))
    sizes = {role["name"]: role["parameters"] for role in made["roles"]}
    return sizes["critic"], sizes["actor"], made["assumed"]


def test_the_critic_is_that_of_the_run(capsys, tmp_path):
    """A copy of the actor where the reward model reads other tokens, else of the reward model."""
    tiny.save_policy(tmp_path / "actor", 32, num_hidden_layers=4)
    own, other = tiny.save_reward(tmp_path / "own"), tiny.save_reward(tmp_path / "other")
    tiny.tokenizer(31).save_pretrained(other)
    sizes = {}
    for reward, start in ((other, tmp_path / "actor"), (own, own)):
        sizes[start], actor, assumed = critic_of(capsys, tmp_path, reward)
        assert assumed is None
        config = config_load.load(str(tmp_path / "run.yaml"), []).config
        run = assemble.draw_up(config).cast["critic"]
        assert run.source.path == str(start) and run.fresh_head == (start == tmp_path / "actor")
    # A scalar head and its bias in place of the vocabulary's.
    assert sizes[tmp_path / "actor"] == actor - 32 * 16 + 16 + 1
    assert sizes[own] < actor / 1.5


def test_a_critic_by_families_where_no_tokenizer_is_there(capsys, run_yaml):
    sizes = {}
    for reward in ("qwen2.5-1.5b", "qwen3-0.6b"):
        rewards = f"--rewards.0.path=shape:{reward}"
        _, made = plan_json(capsys, "--config", run_yaml, rewards)
        sizes[reward] = {role["name"]: role["parameters"] for role in made["roles"]}
        start, word = (reward, "the") if reward == "qwen2.5-1.5b" else ("qwen2.5-0.5b", "not the")
        assert f"to start from shape:{start}: tokenizers" in made["assumed"]
        assert f"(rm's is {word} actor's)" in made["assumed"]
        assert cli.main(["plan", "--config", run_yaml, rewards]) in (0, 3)
        assert made["assumed"] in capsys.readouterr().out
    assert sizes["qwen2.5-1.5b"]["critic"] > 1.5e9 > 0.6e9 > sizes["qwen3-0.6b"]["critic"]


def test_a_run_that_does_not_fit_says_what_to_change(capsys, run_yaml):
    large = ["--actor.path", "shape:llama3-8b", "--ppo.micro_batch_size=8"]
    status, made = plan_json(capsys, "--config", run_yaml, "--gpu", "rtx4090", *large)
    assert (status, made["verdict"]) == (3, "DOES NOT FIT")
    assert made["largest_micro_batch_tokens"] == 0
    assert "GB" in made["reason"] and made["change"]


def test_the_change_it_names_makes_the_run_fit(capsys, run_yaml):
    wide = ["--ppo.micro_batch_size=8", "--sampling.max_new_tokens=4096"]
    fixed = ["--actor.sleep=never", "--critic.sleep=never"]
    fixed += ["--actor.gradient_checkpointing=false", "--critic.gradient_checkpointing=false"]
    where = ["--config", run_yaml, "--gpu", "a100-40", *wide, *fixed]
    status, made = plan_json(capsys, *where)
    assert (status, made["change"]) == (3, "set ppo.micro_batch_size: 1")
    assert plan_json(capsys, *where, "--ppo.micro_batch_size=1")[0] == 0


def test_fewer_tokens_are_advised_where_tokens_were_given(capsys, run_yaml):
    """The longest row's: fewer would change nothing."""
    wide = ["--ppo.micro_batch_size=null", "--sampling.max_new_tokens=4096"]
    fixed = ["--actor.sleep=never", "--critic.sleep=never"]
    fixed += ["--actor.gradient_checkpointing=false", "--critic.gradient_checkpointing=false"]
    where = ["--config", run_yaml, "--gpu", "a100-40", *wide, *fixed]
    status, made = plan_json(capsys, *where, f"--ppo.micro_batch_tokens={8 * 4608}")
    assert (status, made["change"]) == (3, "set ppo.micro_batch_tokens: 4608")
    assert 4608 <= made["largest_micro_batch_tokens"] < 8 * 4608
    most = made["largest_micro_batch_tokens"]
    for tokens, expected in ((4608, 0), (most, 0), (8 * 4608, 3)):
        assert plan_json(capsys, *where, f"--ppo.micro_batch_tokens={tokens}")[0] == expected


def test_sleep_is_advised_where_it_was_forbidden(capsys, run_yaml):
    kept = ["--actor.sleep=never", "--critic.sleep=never", "--ppo.score_batch_size=1"]
    kept += ["--actor.gradient_checkpointing=true", "--critic.gradient_checkpointing=true"]
    longer = ["--data.max_prompt_tokens=4096", "--sampling.max_new_tokens=12000"]
    where = ["--config", run_yaml, "--gpu", "rtx4090", *longer]
    status, made = plan_json(capsys, *where, *kept)
    assert (status, made["change"]) == (3, "set sleep: auto on actor and critic")
    status, made = plan_json(capsys, *where, *kept[2:])
    assert status == 0 and made["sleep"]["actor"] in ("gradients", "exchange", "always")


def test_no_export_is_advised_where_the_host_cannot_hold_the_copy(capsys):
    """Four 7B models with fp32 moments: 14 bytes a trained parameter, on one H200 and 128 GB."""
    recipe = str(plan_docs.RECIPES / "7b_1xh200.yaml")
    shapes = [f"--{key}=shape:qwen2.5-7b" for key in ("actor.path", "critic.path")]
    shapes.append("--rewards.0.path=shape:qwen2.5-7b")
    fp32 = ["--actor.optimizer.moments=fp32", "--critic.optimizer.moments=fp32"]
    fp32 += [f"--{role}.deepspeed=trained_zero3_bf16_split.json" for role in ("actor", "critic")]
    where = ["--config", recipe, "--gpu", "h200", *shapes, *fp32]
    status, made = plan_json(capsys, *where, "--run.export=true")
    assert status == 3 and made["change"].startswith("set run.export: false")
    assert plan_json(capsys, *where)[0] == 0


def test_the_table_ends_with_the_verdict(capsys, run_yaml):
    assert cli.main(["plan", "--config", run_yaml, "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("FITS")
    assert "update_critic" in shown and "estimate until measured" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "h20"], "--gpu=h20: unknown; did you mean h200?"),
        (["--gpus", "0"], "--gpus=0: must be at least 1"),
        (["--actor.path", "shape:qwen2.5-8b"], "actor.path=shape:qwen2.5-8b: unknown; did"),
        (["--actor.path", "/no/such"], "path='/no/such': no such directory"),
        (["--ppo.micro_batch", "1"], "ppo.micro_batch"),
    ],
)
def test_mistakes_are_one_line(capsys, run_yaml, arguments, told):
    assert cli.main(["plan", "--config", run_yaml, *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
