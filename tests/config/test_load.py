"""Loading, overriding, dumping and checking a configuration, and its generated page."""

import dataclasses
from pathlib import Path

import pytest

from gearshift.engine.config import load as config_load
from gearshift.engine.config.check import check
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.keys import described, leaves
from gearshift.engine.config.load import load
from gearshift.engine.config.schema import Config
from gearshift.launch.docs import config as config_docs

RUNNABLE = [
    *("--actor.path", "model", "--rewards.0.function", "engine/rewards/total.py:score"),
    *("--data.sources.0.path", "prompts.jsonl"),
]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "run.yaml")

    return write


def refused(overrides: list[str], message: str, path: str | None = None) -> None:
    with pytest.raises(ConfigError, match=message):
        load(path, overrides)


# Values and origins


def test_nothing_given_is_all_defaults():
    resolved = load(None, [])
    assert resolved.config == Config()
    assert set(resolved.origin.values()) == {"default"}
    assert "actor.optimizer.lr" in resolved.origin


def test_precedence_and_origin(yaml_file):
    path = yaml_file("ppo:\n  kl_coef: 0.2\n  lam: 0.9\nrun: {steps: 7}\n")
    resolved = load(path, ["--ppo.kl_coef", "0.3", "--critic.optimizer.lr=2e-6"])
    ppo = resolved.config.ppo
    assert (ppo.kl_coef, ppo.lam, ppo.gamma) == (0.3, 0.9, 1.0)
    assert resolved.config.critic.optimizer.lr == 2e-6
    origin = resolved.origin
    assert origin["ppo.kl_coef"] == origin["critic.optimizer.lr"] == "command line"
    assert origin["ppo.lam"] == origin["run.steps"] == "run.yaml"
    assert origin["ppo.gamma"] == "default"


def test_every_leaf_has_an_origin(yaml_file):
    entries = "rewards: [{name: a}]\ndata: {sources: [{path: x}]}\n"
    entries += "eval: {sources: [{path: x}], rewards: [{name: a}]}\n"
    path = yaml_file(entries)
    found = load(path, ["--pretrain.sources.0.path", "y"]).origin
    sections = {"rewards", "data.sources", "pretrain.sources", "eval.sources", "eval.rewards"}
    assert set(found) == {key for key, _ in leaves(Config)} - sections


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1.0e-6", 1e-6), ("1", 1.0), ("'2e-6'", 2e-6), ("1E-6", 1e-6)],
)
def test_numbers_as_people_write_them(yaml_file, text, value):
    path = yaml_file(f"actor: {{optimizer: {{lr: {text}}}}}")
    lr = load(path, []).config.actor.optimizer.lr
    assert lr == value and isinstance(lr, float)


def test_lists_of_sections(yaml_file):
    path = yaml_file("rewards:\n  - name: a\n    weight: 1\n  - name: b\n")
    overrides = ["--rewards.1.weight", "3", "--rewards.2.name", "c"]
    resolved = load(path, overrides)
    assert [(r.name, r.weight) for r in resolved.config.rewards] == [("a", 1), ("b", 3), ("c", 1)]
    assert resolved.origin["rewards.0.weight"] == "run.yaml"
    assert resolved.origin["rewards.1.weight"] == "command line"
    assert resolved.origin["rewards.2.weight"] == "default"


def test_whole_lists_from_the_command_line(yaml_file):
    path = yaml_file("rewards: [{name: a}, {name: b}]\nrun: {trackers: [wandb]}")
    overrides = ["--run.trackers", "[tensorboard, trackio]", "--rewards", "[{name: z}]"]
    resolved = load(path, [*overrides, "--rewards.0.weight", "2"])
    assert resolved.config.run.trackers == ["tensorboard", "trackio"]
    assert [(r.name, r.weight) for r in resolved.config.rewards] == [("z", 2.0)]


def test_options_are_a_mapping_of_any_values(yaml_file, tmp_path):
    file = yaml_file("data: {chat_template_kwargs: {enable_thinking: false, mode: 'a: b'}}")
    resolved = config_load.load(str(file), [])
    assert resolved.config.data.chat_template_kwargs == {"enable_thinking": False, "mode": "a: b"}
    (tmp_path / "again.yaml").write_text(config_load.dump(resolved))
    assert config_load.load(str(tmp_path / "again.yaml"), []).config == resolved.config
    typed = config_load.load(None, ["--data.chat_template_kwargs", "{a: 1}"])
    assert typed.config.data.chat_template_kwargs == {"a": 1}
    with pytest.raises(ConfigError, match=r"kwargs=\[1\]: expected names and values, as {a: 1}"):
        config_load.load(None, ["--data.chat_template_kwargs", "[1]"])


def test_strings_are_what_was_typed():
    overrides = ["--data.system_prompt", "Be kind: 'yes' # no", "--actor.revision", "1.0"]
    overrides += ["--ppo.missing_eos", "none", "--actor.path", "null", "--run.resume", "null"]
    config = load(None, [*overrides, "--ppo.score_shift", "-1.5"]).config
    assert config.data.system_prompt == "Be kind: 'yes' # no"
    assert (config.actor.revision, config.actor.path) == ("1.0", None)
    assert config.run.resume == "null"  # not optional, so a text like any other
    assert (config.ppo.missing_eos, config.ppo.score_shift) == ("none", -1.5)


def test_null_switches_an_optional_number_off(yaml_file):
    assert load(yaml_file("ppo: {value_clip: null}"), []).config.ppo.value_clip is None
    assert load(None, ["--ppo.value_clip", "null"]).config.ppo.value_clip is None


def test_empty_sections_and_files(yaml_file):
    assert load(yaml_file("ppo:\nrewards:\n"), []).config == Config()
    assert load(yaml_file("# nothing\n"), []).config == Config()


# Errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--ppo.kl_coeff", "1"], r"^ppo.kl_coeff: no such key; did you mean ppo.kl_coef\?"),
        (["--lr", "1"], "lr: .*actor.optimizer.lr or critic.optimizer.lr"),
        (["--reward.0.weight", "1"], r"did you mean rewards.0.weight\?"),
        (["--ppo.kl_coef.x", "1"], "ppo.kl_coef.x: no such key"),
        (["--ppo.kl_coef", "abc"], "^ppo.kl_coef='abc': expected a number$"),
        (["--ppo.dual_clip", "abc"], "expected a number or null"),
        (["--ppo.kl_coef", "{a: 1}"], "ppo.kl_coef=a section: expected a number"),
        (["--ppo.gamma", ".inf"], "ppo.gamma=inf: expected a number"),
        (["--ppo.gamma", "true"], "ppo.gamma=True: expected a number"),
        (["--run.steps", "1.5"], "run.steps=1.5: expected a whole number"),
        (["--run.steps", "true"], "run.steps=True: expected a whole number"),
        (["--run.export", "1"], "run.export=1: expected true or false"),
        (["--ppo.kl_in", "los"], r"kl_in='los': expected reward or loss; did you mean loss\?"),
        (["--run.trackers", "wandb"], r"run.trackers='wandb': expected a list of strings"),
        (["--run.trackers", "[1]"], "expected a list of strings"),
        (["--rewards", "[1]"], r"rewards=\[1\]: expected a list of sections"),
        (["--rewards", "{name: a}"], "rewards=a section: expected a list of sections"),
        (["--rewards.1.weight", "1"], "rewards.1: there are 0 entries, so the next is 0"),
        (["--ppo", "3"], "ppo=3: expected a section"),
        (["--ppo.kl_coef", "-1"], "^ppo.kl_coef=-1.0: must be at least 0$"),
        (["--actor.optimizer.lr", "-1"], "^actor.optimizer.lr=-1.0: must be at least 0$"),
        (["--rewards.0.timeout_s", "0"], "^rewards.0.timeout_s=0.0: must be above 0$"),
        (["--ppo.minibatch_size", "7"], "^ppo.minibatch_size=7: must divide"),
        (
            ["--ppo.rollout_is_low", "2", "--ppo.rollout_is_high", "1"],
            "^ppo.rollout_is_low=2.0: must be at most rollout_is_high = 1.0",
        ),
        (["--ppo.critic_minibatch_size", "48"], "^ppo.critic_minibatch_size=48: must divide"),
        (["--ppo.kl_coef"], "--ppo.kl_coef: has no value"),
        (["--ppo.kl_coef", "--ppo.lam", "1"], "--ppo.kl_coef: has no value"),
        (["ppo.kl_coef", "1"], "ppo.kl_coef: expected --section.key VALUE"),
        (["--run.trackers", "[a"], "--run.trackers: not valid YAML"),
    ],
)
def test_mistakes_on_the_command_line(overrides, message):
    refused(overrides, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo: {kl_coeff: 1}", r"ppo.kl_coeff: no such key; did you mean ppo.kl_coef\?"),
        ("pro: {kl_coef: 1}", r"pro: no such key"),
        ("run: {dir: a}\nppo: {lam: 1}\nrun: {steps: 2}", "run is given twice; .*line 3"),
        ("ppo:\n  lam: 1\n  lam: 0.5\n", "lam is given twice; .*line 3"),
        ("ppo: [1", "run.yaml: not valid YAML"),
        ("- 1", "must hold sections"),
        ("ppo: 3", "ppo=3: expected a section"),
        ("rewards: {name: a}", "rewards=a section: expected a list of sections"),
        ("run: {resume: off}", "run.resume=False: expected a string; put it in quotes"),
        ("actor: {revision: 1.5}", "expected a string or null; put it in quotes"),
        ("on: {a: 1}", "True: no such key"),
    ],
)
def test_mistakes_in_a_file(yaml_file, text, message):
    refused([], message, yaml_file(text))


def test_missing_file():
    refused([], "nowhere.yaml: no such configuration file", "nowhere.yaml")


# Dump


AWKWARD = ["", "null", "yes", "1e-6", "a: b # c", "'\"", "two\nlines", "\u2028\x7fé😀", "- x", "~"]


@pytest.mark.parametrize("text", AWKWARD)
def test_dump_keeps_awkward_strings(tmp_path, text):
    config = dataclasses.replace(
        Config(),
        data=dataclasses.replace(Config().data, system_prompt=text),
        sampling=dataclasses.replace(Config().sampling, stop=[text or "x", "x"]),
    )
    resolved = config_load.Resolved(config, load(None, []).origin)
    path = tmp_path / "config.yaml"
    path.write_text(config_load.dump(resolved), encoding="utf-8")
    assert load(str(path), []).config == config


def test_dump_shows_origins_and_loads_again(tmp_path, yaml_file):
    overrides = [*RUNNABLE, "--rewards.1.name", "b", "--actor.optimizer.lr", "3e-7"]
    resolved = load(yaml_file("ppo: {kl_coef: 0.2}"), overrides)
    text = config_load.dump(resolved)
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert load(str(path), []).config == resolved.config
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "kl_coef: 0.2 # run.yaml" in lines
    assert "lr: 3.0e-07 # command line" in lines
    assert "lam: 0.95 # default" in lines


# Checks across sections


def test_a_runnable_configuration_has_no_warnings():
    assert check(load(None, RUNNABLE).config, world_size=4) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--actor.path", "null"], "actor.path=null"),
        (["--run.dir", "\n"], r"run.dir='\\n': is no name of a folder; as runs/mine"),
        (["--run.dir", " "], "run.dir=' ': is no name of a folder"),
        (["--rewards", "[]"], r"rewards=\[\]: at least one"),
        (["--data.sources", "[]"], r"data.sources=\[\]: at least one"),
        (["--data.sources.0.path", ""], "data.sources.0.path: give a file"),
        (["--rewards.0.kind", "http"], "rewards.0.urls: needed because rewards.0.kind=http"),
        (["--rewards.0.kind", "model"], "rewards.0.path: needed"),
        (["--rewards.0.function", "null"], "rewards.0.function: needed"),
        (["--rewards.1.function", "a:b"], "rewards.1.name=reward: used before"),
        (["--run.trackers", "[wandbb]"], "run.trackers=wandbb: expected any of"),
        (["--sampling.temperature", "0"], "sampling.temperature=0: greedy"),
        (["--ppo.ptx_coef", "0.1"], r"pretrain.sources=\[\]: needed because ppo.ptx_coef=0.1"),
        (
            ["--ppo.estimator", "reinforce_pp", "--ppo.critic_warmup_steps", "2"],
            "critic_warmup_steps=2: needs a critic",
        ),
        (
            ["--ppo.estimator", "reinforce_pp", "--ppo.update", "joint"],
            "ppo.update=joint: needs a critic",
        ),
        (
            ["--ppo.estimator", "reinforce_pp", "--ppo.bootstrap_truncated", "true"],
            "bootstrap_truncated=true: needs a critic",
        ),
        (
            ["--ppo.estimator", "reinforce_pp", "--ppo.lam_critic", "1"],
            "ppo.lam_critic=1.0: needs a critic, .* or null",
        ),
        (
            ["--ppo.estimator", "reinforce_pp", "--ppo.critic_epochs", "2"],
            "ppo.critic_epochs=2: needs a critic, .* or null",
        ),
        (
            ["--ppo.update", "joint", "--ppo.critic_minibatch_size", "32"],
            "ppo.critic_minibatch_size=32: ppo.update=joint trains both .*; use separate, or null",
        ),
        (["--ppo.critic_minibatch_size", "2"], "critic_minibatch_size=2: must be a multiple of"),
        (
            ["--ppo.policy_loss", "sapo", "--ppo.dual_clip", "3"],
            "ppo.dual_clip=3.0: ppo.policy_loss=sapo has none; use ppo, or null",
        ),
        (
            ["--ppo.policy_loss", "dr_grpo", "--ppo.loss_aggregation", "token_mean"],
            "ppo.loss_aggregation=token_mean: ppo.policy_loss=dr_grpo divides by rows x",
        ),
        (["--ppo.kl_in", "loss"], "ppo.kl_estimator=k1: .*use k2 or k3"),
        (["--ppo.prompts_per_step", "63", "--ppo.minibatch_size", "63"], "multiple of the 4 ranks"),
        (
            ["--ppo.ptx_coef=1", "--pretrain.sources.0.path=x", "--pretrain.rows=6"],
            "pretrain.rows=6: must be a multiple of the 4 ranks",
        ),
    ],
)
def test_sections_that_do_not_fit(overrides, message):
    config = load(None, [*RUNNABLE, *overrides]).config
    with pytest.raises(ConfigError, match=message):
        check(config, world_size=4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--sampling.top_p", "0.9"], "sampling.top_p=0.9"),
        (["--sampling.top_k", "5"], "sampling.top_k=5"),
        (["--pretrain.sources.0.path", "x"], "pretrain.sources: not read"),
        (["--ppo.vf_coef", "0.1"], "ppo.vf_coef=0.1: has no effect"),
        (
            ["--eval.sampling.temperature", "0", "--eval.pass_at", "[2]"],
            "eval.sampling.temperature=0: the samples of a prompt are all alike",
        ),
        (["--rewards.0.weight", "0"], "every weight is 0"),
        (["--ppo.policy_loss", "gspo"], "gspo was published with 3e-4"),
        (["--ppo.old_logprobs", "rollout", "--ppo.rollout_seq_low", "0.5"], "ppo.rollout_seq_low"),
        (["--data.system_prompt", "x", "--data.chat_template", "never"], "data.system_prompt"),
    ],
)
def test_warnings(overrides, message):
    found = check(load(None, [*RUNNABLE, *overrides]).config)
    assert len(found) == 1 and message in found[0]


# The page


def test_the_page_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    text = page.read_text(encoding="utf-8")
    assert text == config_docs.document(text), "run: gearshift config-docs"


def test_every_key_is_documented():
    page = config_docs.document()
    for key, entry in leaves(Config):
        if described(entry.type).startswith("a list of sections"):
            continue
        assert entry.metadata["description"], key
        assert f"| `{key.split('.')[-1]}` |" in page
    assert "| `lr` | `1e-06` | a number, at least 0 | peak learning rate |" in page
