"""When a run saves and when it ends early: real one-rank jobs, disks and signals."""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gearshift.engine.checkpoint import export, store
from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.models import load as models
from gearshift.engine.zero import state as zero_state
from gearshift.launch import train
from tests.tiny import job as tiny_job
from tests.tiny import models as tiny

REWARD = """
import os
import signal
from pathlib import Path

calls = 0


def score(prompts, completions, **columns):
    global calls
    calls += 1
    {act}
    return [float(len(text.split())) for text in completions]
"""


def job(folder: Path, act: str = "pass", **run: object) -> Path:
    """A job whose reward does `act` at each step; `calls` counts the steps of this process."""
    path = tiny_job.write(folder, run={"steps": 3, "export": False} | run)
    (folder / "reward.py").write_text(REWARD.format(act=act))
    return path


def start(path: Path, *overrides: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.alone(patch)
        return train.main(["--config", str(path), *map(str, overrides)])


def saved(folder: Path) -> list[str]:
    return [path.name for path in store.steps(folder / "run" / "checkpoints")]


def figures(folder: Path) -> list[dict]:
    return tiny_job.learned(folder / "run")


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A small disk of its own at `folder`."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three steps without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(job(folder)) == 0
    return folder


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, capfd, name, whole):
    act = f"os.kill(os.getpid(), signal.{name}) if calls == 2 else None"
    path = job(tmp_path, act)
    assert start(path) == 0
    told = capfd.readouterr()
    assert f"ended by {name} after step 2; the same command goes on from there" in told.out
    assert f"{name}: ending after this step, with a checkpoint\n" in told.err
    assert saved(tmp_path) == ["step_000002"]
    assert [line["step"] for line in figures(tmp_path)] == [1, 2]
    assert start(path) == 0
    assert saved(tmp_path) == ["step_000002", "step_000003"]
    assert figures(tmp_path) == figures(whole)


def test_a_deadline_ends_the_run(tmp_path, capfd):
    path = job(tmp_path)
    assert start(path, "--run.save_by", time.strftime("%Y-%m-%d %H:%M")) == 0
    assert "ended by run.save_by after step 1" in capfd.readouterr().out
    assert saved(tmp_path) == ["step_000001"]
    assert start(path, "--run.save_by", "soon") == 2
    assert "run.save_by='soon': not a time" in capfd.readouterr().err
    assert start(path, "--run.save_by", "slurm-10") == 2
    assert "run.save_by='slurm-10': SLURM_JOB_END_TIME is not set" in capfd.readouterr().err


@pytest.mark.parametrize("background", (True, False))
def test_steps_between_checkpoints(tmp_path, background):
    path = job(tmp_path, steps=5, save_every=2, keep_checkpoints=5, async_save=background)
    assert start(path) == 0
    assert saved(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    assert [line["step"] for line in figures(tmp_path)] == [1, 2, 3, 4, 5]


def test_no_checkpoint_where_none_is_wanted(tmp_path):
    assert start(job(tmp_path, steps=1, save_every=0, save_last=False)) == 0
    assert saved(tmp_path) == []


def test_minutes_between_checkpoints(tmp_path):
    assert start(job(tmp_path), "--run.save_minutes", 1e-6, "--run.keep_checkpoints", 9) == 0
    assert saved(tmp_path) == ["step_000001", "step_000002", "step_000003"]


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_is_full_for_a_while(tmp_path, capfd, background, whole):
    """The second step makes room, and the checkpoint that could not be is made then."""
    held = tmp_path / "run" / "checkpoints" / "filler"
    act = f"Path({str(held)!r}).unlink() if calls == 3 else None"
    with disk(held.parent, "size=400k"):
        held.write_bytes(bytes(300_000))
        assert start(job(tmp_path, act, save_every=1, async_save=background)) == 0
        (told,) = (line for line in capfd.readouterr().out.splitlines() if "warning" in line)
        assert told.startswith("warning: checkpoint step_000001 not written, the run goes on: ")
        assert "[Errno 28] No space left on device" in told
        assert saved(tmp_path) == ["step_000003"]
    assert figures(tmp_path) == figures(whole)


def test_a_fault_does_not_lose_the_checkpoint_under_way(tmp_path, capfd, monkeypatch):
    """The third step's reward fails while a thread still writes the second step's state."""

    def slowly(*arguments, write=store.write_tensors):
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(store, "write_tensors", slowly)
    path = job(tmp_path, "assert calls < 3, 'third'", save_every=2)
    assert start(path) == 2
    assert "third" in capfd.readouterr().err
    assert saved(tmp_path) == ["step_000002"]


def test_a_step_that_a_guard_stops_is_not_saved_in_place_of_one_that_failed(
    tmp_path, capfd, monkeypatch
):
    """The disk refuses the first step's checkpoint; every score is 1."""

    calls = []

    def refuse_once(*arguments, write=store.write_tensors):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("no disk")
        return write(*arguments)

    monkeypatch.setattr(store, "write_tensors", refuse_once)
    path = job(tmp_path, "return [1.0] * len(completions)", save_every=1)
    stop = ("--guards.constant_reward", "stop", "--guards.constant_reward_steps", 2)
    assert start(path, *stop) == 1
    assert "guard constant_reward" in capfd.readouterr().err
    assert saved(tmp_path) == []


def test_a_copy_of_the_state_is_let_go_once_it_is_written(tmp_path):
    done = []

    def watch(job, write=checkpoint._write_part):
        write(job)
        done.append(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_write_part", watch)
        assert start(job(tmp_path, save_every=2)) == 0
    assert [entry.copied and not entry.tensors for entry in done] == [True, True]


def test_a_run_without_a_checkpoint_yet_begins_again(tmp_path, capfd, whole):
    path = job(tmp_path)
    assert start(path) == 0
    for step in store.steps(tmp_path / "run" / "checkpoints"):  # as if killed before it was there
        step.rename(store.partial(step))
    capfd.readouterr()
    assert start(path, "--ppo.lam", 0.5) == 2
    assert "holds another run; choose a new folder, or delete it" in capfd.readouterr().err
    assert start(path, "--run.steps", 3) == 0
    assert "has no checkpoint yet; the run begins again" in capfd.readouterr().out
    assert saved(tmp_path) == ["step_000003"]
    assert figures(tmp_path) == figures(whole)


def test_a_folder_for_checkpoints_that_is_read_only(tmp_path, capfd, whole):
    with disk(tmp_path / "run" / "checkpoints", "size=400k,ro"):
        assert start(job(tmp_path, save_every=1)) == 0
        told = [line for line in capfd.readouterr().out.splitlines() if "warning" in line]
        assert len(told) == 1 and "Read-only file system" in told[0]
    assert figures(tmp_path) == figures(whole)


def test_no_memory_for_a_copy_is_said_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("gearshift.engine.checkpoint.save._COPY_SHARE", 0.0)
    assert start(job(tmp_path, save_every=1)) == 0
    assert capfd.readouterr().out.count("run.async_save: no room for a copy") == 1
    assert saved(tmp_path) == ["step_000002", "step_000003"]


def test_loading_saving_and_exporting_are_progress(tmp_path, monkeypatch):
    """Each may take longer than run.hang_timeout_s, piece by piece."""
    counts, places = Counter(), (models, store, zero_state, export)
    for place in places:
        monkeypatch.setattr(place, "beat", lambda name=place.__name__: counts.update([name]))
    path = job(tmp_path, steps=1, async_save=False)
    assert start(path) == start(path, "--run.steps", 2, "--run.export", "true") == 0
    assert all(counts[place.__name__] > 10 for place in places), counts


def test_a_finished_checkpoint_in_a_new_folder_is_exported_there(tmp_path, capfd):
    path = job(tmp_path, steps=1)
    assert start(path) == 0
    last, new = tmp_path / "run" / "checkpoints" / "step_000001", tmp_path / "new"
    assert start(path, "--run.dir", new, "--run.resume", last, "--run.export", "true") == 0
    assert "already done" in capfd.readouterr().out
    found = {entry.name for entry in new.iterdir()}
    assert found >= {"config.yaml", "export", "metrics.jsonl", "report.html"}


def test_another_model_or_tokenizer_is_refused(tmp_path, capfd):
    path = job(tmp_path, steps=1)
    assert start(path) == 0
    other = tiny.save_policy(tmp_path / "other", tiny_job.VOCABULARY, hidden_size=32, head_dim=8)
    more = "--run.steps", 2, "--actor.path", other
    capfd.readouterr()
    assert start(path, *more) == 2
    old, new = json.dumps(str(tmp_path / "policy")), json.dumps(str(other))
    assert f"other settings: actor.path: {old} -> {new}; restore" in capfd.readouterr().err
    assert start(path, *more, "--run.resume_changed", "[actor.path]") == 2
    told = capfd.readouterr().err
    assert "is of another actor: lm.lm_head.weight is [16, 16] there and [16, 32] in" in told
    words = json.loads((tmp_path / "policy" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w14"], vocabulary["w15"] = vocabulary["w15"], vocabulary["w14"]
    (tmp_path / "policy" / "tokenizer.json").write_text(json.dumps(words))
    assert start(path, "--run.steps", 2) == 2
    assert "was saved with another tokenizer" in capfd.readouterr().err
    assert saved(tmp_path) == ["step_000001"]


def test_a_dataset_that_was_moved_goes_on(tmp_path, capfd, whole):
    path = job(tmp_path, "os.kill(os.getpid(), signal.SIGUSR1) if calls == 2 else None")
    assert start(path) == 0
    moved = (tmp_path / "prompts.jsonl").rename(tmp_path / "moved.jsonl")
    more = "--data.sources.0.path", moved
    assert start(path, *more) == 2
    assert "accept them in run.resume_changed" in capfd.readouterr().err
    accept = "--run.resume_changed", "[data.sources.*]"
    rows = moved.read_text()
    moved.write_text(rows.replace("w4 w5", "w5 w4"))
    assert start(path, *more, *accept) == 2
    assert "its 8 rows are not the 8 of the checkpoint's" in capfd.readouterr().err
    moved.write_text(rows)
    assert start(path, *more, *accept) == 0
    assert figures(tmp_path) == figures(whole)


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path, capfd, whole):
    path = job(tmp_path, save_every=1, keep_checkpoints=3)
    assert start(path) == 0
    first = tmp_path / "run" / "checkpoints" / "step_000001"
    assert start(path, "--run.resume", first, "--run.steps", 2) == 0
    told = capfd.readouterr().out
    assert "set aside " in told and "step_000003.stale: this run replaces it" in told
    assert saved(tmp_path) == ["step_000001", "step_000002"]
    assert [line["step"] for line in figures(tmp_path)] == [1, 2]
    assert start(path) == 0
    assert saved(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.stale"))


def test_an_optimizer_on_a_disk_is_refused_early(tmp_path, capfd):
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)},
        },
    }
    (tmp_path / "nvme.json").write_text(json.dumps(settings))
    assert start(job(tmp_path), "--actor.deepspeed", tmp_path / "nvme.json") == 2
    assert (
        "actor.deepspeed: zero_optimization.offload_optimizer.device=nvme: checkpoints do not"
        in (capfd.readouterr().err)
    )
