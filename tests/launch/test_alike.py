"""Hosts that differ are refused by the first thing that differs, before a model loads."""

import re
import shutil

import pytest

from gearshift.engine import assemble
from gearshift.engine.cluster import distributed
from gearshift.engine.config import load as config_load
from gearshift.launch import alike
from tests.tiny import job as tiny_job


@pytest.fixture
def hosts(monkeypatch):
    """hosts(other): `compare` meets a second host, n1, whose facts are `other` of ours."""

    def meet(other) -> None:
        def gather(mine):
            return [mine, (("n1", other(dict(mine[1]))) if isinstance(mine, tuple) else "another")]

        monkeypatch.setattr(distributed, "all_gather_objects", gather)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "host", lambda: "n0")

    return meet


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("sampling.max_new_tokens", "7", "sampling.max_new_tokens: n0 has 6, n1 has 7; start"),
        ("critic.optimizer.lr", "0.5", "critic.optimizer.lr: n0 has 1e-06, n1 has 0.5; start"),
        ("torch", "2.0", r"torch: n0 has \S+, n1 has 2.0; start every host with the same"),
        ("gearshift/engine/ppo.py", "x", r"gearshift/engine/ppo.py: n0 has \d+ bytes, sha256 \w+"),
    ],
)
def test_settings_code_and_versions(tmp_path, hosts, key, value, told):
    config = config_load.load(str(tiny_job.write(tmp_path)), []).config
    hosts(lambda facts: facts | {key: value})
    with pytest.raises(ValueError, match=told):
        alike.check_programs(config)


def test_files_differ_by_what_is_in_them(tmp_path, hosts):
    """One byte of the prompts, of a reward's code, of a model's configuration."""
    folders = [tmp_path / name for name in ("a", "b")]
    config = config_load.load(str(tiny_job.write(tmp_path / "a")), []).config
    ours = alike.files(config, assemble.draw_up(config))
    keys = {key.split("=")[0] for key in ours}
    assert {"actor.path", "actor.tokenizer", "actor.deepspeed", "critic.deepspeed"} <= keys
    assert {"data.sources.0.path", "rewards.0.function"} <= keys
    shutil.copytree(*folders)
    same = {key.replace("/a/", "/b/"): value for key, value in ours.items()}

    def again() -> dict:
        settings = (folders[0] / "run.yaml").read_text().replace(str(folders[0]), str(folders[1]))
        (folders[1] / "run.yaml").write_text(settings)
        there = config_load.load(str(folders[1] / "run.yaml"), []).config
        return alike.files(there, assemble.draw_up(there))

    assert again() == same
    for name in ("prompts.jsonl", "reward.py", "policy/config.json"):
        file = folders[1] / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + b" ")  # the new line at the end
        differing = {key for key, value in again().items() if same[key] != value}
        assert differing == {key for key in same if key.endswith(name)}
        file.write_bytes(before)
    other = same | {"critic.deepspeed": "sha256 x"}
    hosts(lambda facts: other)
    with pytest.raises(ValueError, match=re.escape("critic.deepspeed: n0 has sha256 ")):
        alike.compare(same, "mend it")
    hosts(lambda facts: facts | {"one": "1", "two": "2"})
    with pytest.raises(ValueError, match=re.escape("one: n0 has absent, n1 has 1 (2 differ)")):
        alike.compare(same, "mend it")
