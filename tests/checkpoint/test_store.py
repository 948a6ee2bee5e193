"""Checkpoint folders: what is written, what damage is seen, what stays; signals and deadlines."""

import errno
import hashlib
import json
import os
import pickle
import signal
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gearshift.engine.checkpoint import resume, store
from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.interrupt import (
    REASONS,
    SIGNALS,
    Interrupt,
    agree_on_deadline,
    parse_deadline,
)
from gearshift.engine.config.schema import RunConfig


def made(folder: Path, step: int, **summary) -> Path:
    """A whole checkpoint with two files."""
    target = store.step_folder(folder, step)
    source = store.partial(target)
    source.mkdir(parents=True)
    weights = {"weights/a": torch.arange(100) / 7, "low/a": torch.arange(100).short()}
    name = "actor.rank0000.safetensors"
    files = {
        name: store.write_tensors(source / name, weights, {"a": [0, 100]}),
        "state.json": store.write_json(source / "state.json", {"about": {}}),
    }
    store.publish(target, {"step": step, "files": files, **summary})
    return target


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_are_safetensors(tmp_path):
    values = {
        "odd": torch.arange(3).short(),
        "wide": torch.randn(5),
        "half": torch.randn(7).bfloat16(),
        "view": torch.arange(12.0).view(3, 4).T,
        "none": torch.zeros(0),
    }
    entry = store.write_tensors(tmp_path / "x.safetensors", values, {"a": [1, 2]})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["notes"]) == {"a": [1, 2]}
        assert set(file.keys()) == set(values)
        for name, value in values.items():
            assert torch.equal(file.get_tensor(name), value.contiguous())
            assert file.get_tensor(name).dtype == value.dtype
        assert torch.equal(file.get_slice("wide")[1:3], values["wide"][1:3])


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "actor.rank0000.safetensors"
    os.truncate(path, path.stat().st_size - 10)


def flip(checkpoint: Path, name: str = "actor.rank0000.safetensors") -> None:
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes(content)


def remove(checkpoint: Path) -> None:
    (checkpoint / "actor.rank0000.safetensors").unlink()


def tear_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes()[:-30])


def change_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"step": ', '"step": 1'))


def other_format(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text()) | {"format": 7}
    del content["sha256"]
    (checkpoint / "manifest.json").write_text(json.dumps(store.seal(content)))


DAMAGE = {
    truncate: r"actor.rank0000.safetensors has \d+ bytes, \d+ were written",
    flip: "actor.rank0000.safetensors is damaged: its checksum differs",
    remove: "actor.rank0000.safetensors is missing",
    tear_manifest: "manifest.json is damaged",
    change_manifest: "manifest.json is damaged",
    other_format: "has format 7, this version of Gearshift reads 1",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    folder = tmp_path / "run" / "checkpoints"
    first, last = made(folder, 1), made(folder, 2)
    run = RunConfig(dir=str(tmp_path / "run"))
    assert resume.choose(run) == (last, [])
    damage(last)
    chosen, (remark,) = resume.choose(run)
    assert chosen == first
    assert remark.startswith(f"{last}: ") and remark.endswith("; going on from step_000001")
    with pytest.raises(ValueError, match=DAMAGE[damage]) as refused:
        resume.choose(RunConfig(dir=str(tmp_path / "run"), resume=str(last)))
    assert str(refused.value).startswith(f"run.resume={str(last)!r}: ")
    damage(first)
    with pytest.raises(ValueError, match="run.resume=auto: no whole checkpoint: .*delete"):
        resume.choose(run)


def test_what_is_no_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    run = RunConfig(dir=str(tmp_path / "run"))
    assert resume.choose(run) == (None, [])
    last = made(folder, 9)
    store.partial(store.step_folder(folder, 10)).mkdir()
    (folder / "step_000011.stale").mkdir()
    assert store.steps(folder) == [last]
    assert resume.choose(run) == (last, [])
    assert resume.choose(RunConfig(dir=str(tmp_path / "run"), resume="none")) == (None, [])
    with pytest.raises(ValueError, match="no checkpoint there; use auto, none or the path"):
        resume.choose(RunConfig(resume=str(tmp_path / "absent")))


def test_a_checkpoint_that_one_host_misses_is_passed_over_by_all(tmp_path, monkeypatch):
    """Rank 0's list is everybody's, so that all ask about the same checkpoint."""
    first, last = (made(tmp_path / "run" / "checkpoints", step) for step in (1, 2))
    missing = ("n1", "no checkpoint there")
    answers = iter([[[first, last], []], [None, missing], [None, None]])  # of rank 0 and rank 1
    monkeypatch.setattr(distributed, "all_gather_objects", lambda mine: next(answers))
    chosen, remarks = resume.choose(RunConfig(dir=str(tmp_path / "run")))
    assert chosen == first
    assert remarks == [f"{last}: no checkpoint there (on n1); going on from step_000001"]


class Poison:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_foreign_folder_is_refused_and_nothing_in_it_runs(tmp_path):
    """As DeepSpeed writes: a pickle, which would run on loading."""
    foreign, touched = tmp_path / "global_step5", tmp_path / "touched"
    foreign.mkdir()
    poison = Poison()
    poison.path = touched
    for name in ("mp_rank_00_model_states.pt", "actor.rank0000.safetensors", "state.json"):
        (foreign / name).write_bytes(pickle.dumps(poison))
    with pytest.raises(ValueError, match=r"has no manifest.json: not a checkpoint of Gearshift"):
        resume.choose(RunConfig(resume=str(foreign)))
    (foreign / "manifest.json").write_bytes(pickle.dumps(poison))
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        resume.choose(RunConfig(resume=str(foreign)))
    assert not touched.exists()
    os.system(f"touch {touched}")
    assert touched.exists(), "the poison would have been seen"


def test_the_last_and_the_best_stay(tmp_path):
    for step, reward in enumerate([0.5, 2.0, None, 1.0, -1.0], start=1):
        made(tmp_path, step, reward=reward)
        store.prune(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_000002", "step_000004", "step_000005"]
    assert json.loads((tmp_path / "latest").read_text()) == {"checkpoint": "step_000005"}


def test_a_damaged_manifest_is_left_alone_and_does_not_count(tmp_path):
    for step in (1, 2, 3, 4):
        made(tmp_path, step, reward=float(step))
    for step in (2, 3):
        (tmp_path / f"step_{step:06d}" / "manifest.json").write_text("{")
    store.prune(tmp_path, 2)
    assert names(tmp_path) == ["latest", *(f"step_00000{step}" for step in (1, 2, 3, 4))]
    made(tmp_path, 5, reward=5.0)
    store.prune(tmp_path, 2)
    assert names(tmp_path) == ["latest", *(f"step_00000{step}" for step in (2, 3, 4, 5))]


def test_checkpoints_of_an_abandoned_continuation_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        made(tmp_path, step)
    aside = store.retire(tmp_path, 1)
    assert [path.name for path in aside] == ["step_000002.stale", "step_000003.stale"]
    assert store.steps(tmp_path) == [tmp_path / "step_000001"]
    made(tmp_path, 2, reward=None)
    store.prune(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_000001", "step_000002"]


def test_a_step_that_was_there_is_replaced_whole(tmp_path):
    made(tmp_path, 1, note="old")
    assert store.read_manifest(made(tmp_path, 1, note="new"))["note"] == "new"
    assert names(tmp_path) == ["latest", "step_000001"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_full(tmp_path):
    """A real one, of 64 kB: the error says so, and nothing takes the checkpoint's name."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OSError) as full:
            store.write_tensors(disk / "x", {"weights/a": torch.zeros(1 << 20)}, {})
        assert full.value.errno == errno.ENOSPC
        store.partial(store.step_folder(disk, 1)).mkdir()
        with pytest.raises(OSError, match="No space left"):
            store.publish(store.step_folder(disk, 1), {"files": {}})
        assert store.steps(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_file_is_overwritten(tmp_path):
    store.write_json(tmp_path / "x", 1)
    with pytest.raises(FileExistsError):
        store.write_json(tmp_path / "x", 2)


def test_ranks_that_do_not_finish(tmp_path):
    with pytest.raises(OSError, match=r"part did not appear within 0 s"):
        store.await_files([tmp_path / "part"], lambda: False, 0.01)
    with pytest.raises(OSError, match="another rank could not write its part"):
        store.await_files([tmp_path / "part"], lambda: True, 60)


SAVED = {
    "config": {"run": {"seed": 0, "steps": 2}, "ppo": {"lam": 0.95}, "rewards": [{"weight": 1.0}]},
    "deepspeed": {"actor": {"gradient_clipping": 1.0}},
    "tokenizer": "a",
}


def changed(**about) -> dict:
    return json.loads(json.dumps(SAVED)) | {"bases": {}} | about


def test_what_a_resumed_run_may_change(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"about": SAVED}))
    config = {"run": {"seed": 0, "steps": 9}, "ppo": {"lam": 0.95}, "rewards": [{"weight": 1.0}]}
    resume.check(tmp_path, changed(config=config), [])
    # Keys that the version which saved did not have.
    newer = config | {"run": config["run"] | {"task": "ppo"}, "ppo": {"lam": 0.95, "gamma": 1.0}}
    resume.check(tmp_path, changed(config=newer), [])
    config = {
        "run": {"seed": 0, "steps": 9},
        "ppo": {"lam": 0.9},
        "rewards": [{"weight": 1.0}, {"weight": 2.0}],
    }
    about = changed(config=config, deepspeed={"actor": {"gradient_clipping": 0.5}})
    with pytest.raises(ValueError) as refused:
        resume.check(tmp_path, about, [])
    assert (
        "was saved with other settings: ppo.lam: 0.95 -> 0.9, rewards.1.weight: null -> 2.0, "
        "actor.deepspeed gradient_clipping: 1.0 -> 0.5; restore them, accept "
        "them in run.resume_changed, or start a new run"
    ) in str(refused.value)
    resume.check(tmp_path, about, ["ppo.lam", "rewards.*", "actor.deepspeed"])
    with pytest.raises(ValueError, match="was saved with another tokenizer"):
        resume.check(tmp_path, changed(tokenizer="b"), ["*"])


@pytest.mark.parametrize(
    ("section", "key", "told"),
    [
        ({"run": {"seed": 1, "steps": 2}}, "run.seed", "0 -> 1"),
        ({"run": {"seed": 0, "steps": 2, "task": "critic"}}, "run.task", 'null -> "critic"'),
        ({"ppo": {"lam": 0.95, "prompts_per_step": 8}}, "ppo.prompts_per_step", "null -> 8"),
        ({"data": {"sources": [{"path": "new"}]}}, "data.sources.0.path", 'null -> "new"'),
    ],
)
def test_what_can_never_be_accepted_is_not_offered(tmp_path, section, key, told):
    (tmp_path / "state.json").write_text(json.dumps({"about": SAVED}))
    about = changed(config=SAVED["config"] | section)
    for accepted in ([], [key], ["*"]):
        with pytest.raises(ValueError) as refused:
            resume.check(tmp_path, about, accepted)
        expected = f"{key}: {told}; restore {key}, or start a new run"
        assert str(refused.value).endswith(expected)


NOW = datetime(2026, 11, 22, 21, 30).timestamp()


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("23:15", datetime(2026, 11, 22, 23, 15)),
        ("8:00", datetime(2026, 11, 23, 8, 0)),
        ("2026-12-24 18:00", datetime(2026, 12, 24, 18, 0)),
    ],
)
def test_deadlines(text, when):
    assert parse_deadline(text, NOW) == when.timestamp()


def test_a_deadline_before_slurm_s(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000")
    assert parse_deadline("slurm-10", NOW) == 1000000 - 600
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert parse_deadline("slurm-10", NOW) is None
    with pytest.raises(ValueError, match="run.save_by='noon': not a time; write 08:00"):
        parse_deadline("noon", NOW)
    assert parse_deadline(None, NOW) is None


def test_a_deadline_that_one_rank_knows_is_every_rank_s(monkeypatch):
    """deepspeed --hostfile passes SLURM_* to no other node."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    others: list[float | None] = [1000.0, 900.0, None]
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [value, *others])
    assert agree_on_deadline("slurm-10") == 900
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1400")
    assert agree_on_deadline("slurm-10") == 800
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    others[:] = [None]
    with pytest.raises(ValueError, match="SLURM_JOB_END_TIME is not set; give a time, as 08:00"):
        agree_on_deadline("slurm-10")
    assert agree_on_deadline(None) is None


def test_signals_ask_once_and_a_second_interrupt_ends_at_once(capfd):
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    interrupt = Interrupt(None, announce=True)
    interrupt.listen()
    try:
        assert interrupt.reason(1e9) == 0
        for name in ("SIGUSR1", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, name))
        assert REASONS[interrupt.reason(0)] == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    finally:
        interrupt.restore()
    assert capfd.readouterr().err == "SIGUSR1: ending after this step, with a checkpoint\n"
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in before}


def test_a_file_asks_where_no_signal_reaches(tmp_path):
    (tmp_path / "stop").touch()  # left by a run that was killed
    interrupt = Interrupt(None, announce=False, request=tmp_path / "stop")
    interrupt.listen()
    try:
        assert interrupt.reason(0) == 0
        (tmp_path / "stop").touch()
        assert REASONS[interrupt.reason(0)] == "the file `stop`"
    finally:
        interrupt.restore()
    assert not (tmp_path / "stop").exists()


def test_a_step_that_would_end_too_late_is_not_begun():
    soon = Interrupt(datetime.now().timestamp() + 60, announce=False)
    assert soon.reason(30) == 0
    assert REASONS[soon.reason(90)] == "run.save_by"
