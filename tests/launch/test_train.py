"""The main job from its command line: arguments, the run folder, resuming, one and two ranks."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from gearshift.engine.checkpoint import store
from gearshift.engine.cluster import distributed
from gearshift.engine.config import load as config_load
from gearshift.engine.roles import Actor, Reference
from gearshift.launch import train
from tests.tiny import job as tiny_job
from tests.tiny.on_ranks import free_port

PHASES = {"generate", "rewards", "logprobs", "ref", "values", "update_actor", "update_critic"}
HOST = distributed.host()
METRICS = {
    *(f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward")),
    *("objective/scores", "objective/kl_coef", "critic/vf_explained_var", "rewards/words/mean"),
    *(f"policy/{name}_avg" for name in ("approxkl", "clipfrac", "entropy")),
    *("loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var"),
    *("step", "episode", "lr", "actor/grad_norm", "critic/grad_norm"),
    *("rollout/logprob_error_mean", "rollout/logprob_error_max", "rollout/ratio_first_max"),
    *(f"response_length/{name}" for name in ("mean", "min", "max")),
    *("response/finished_fraction", "throughput/tokens_per_s"),
    *("throughput/generated_tokens_per_s", "timing_s/step", "timing_s/shift"),
    *(f"timing_s/{phase}" for phase in PHASES),
    *(f"memory_gb/{phase}" for phase in PHASES),
    *(f"states_gb/{phase}" for phase in PHASES),
    "timing_s/swap",
}
FOLDER = {
    *(
        "config.yaml",
        "console.log",
        "outcome.json",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
    ),
    *("ds_actor.json", "ds_critic.json", "ds_reference.json", "checkpoints", "export"),
}


# Arguments


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0
    assert "usage: deepspeed launch/train.py --config FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--local_rank=1", "--config", "a.yaml", "--ppo.lam", "0.9"],
        ["--config=a.yaml", "--ppo.lam", "0.9", "--local_rank", "1"],
        ["--config", "a.yaml", "--local-rank=1", "--ppo.lam", "0.9"],
    ],
)
def test_a_launcher_s_local_rank_is_dropped(argv):
    assert train.parse(argv) == ("a.yaml", ["--ppo.lam", "0.9"], False)


def test_print_config_shows_origins_and_loads_again(tmp_path, capsys):
    path = tiny_job.write(tmp_path)
    capsys.readouterr()  # the models' progress bars
    arguments = ["--config", str(path), "--ppo.kl_coef", "0.3", "--rewards.0.weight=2"]
    assert train.main([*arguments, "--print-config"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = [" ".join(line.split()) for line in told.out.splitlines()]
    assert {"kl_coef: 0.3 # command line", "weight: 2.0 # command line"} <= set(lines)
    assert {"max_new_tokens: 6 # run.yaml", "gamma: 1.0 # default"} <= set(lines)
    (tmp_path / "again.yaml").write_text(told.out)
    again = config_load.load(str(tmp_path / "again.yaml"), []).config
    assert again == config_load.load(str(path), arguments[2:]).config
    assert not (tmp_path / "run").exists()


# Who speaks


@pytest.mark.parametrize(
    ("rank", "error", "told", "waits"),
    [
        ("0", ValueError("ppo.lam=2:\n too large"), "gearshift: error: ppo.lam=2: too large\n", 0),
        ("1", ValueError("ppo.lam=2"), f"gearshift: error (rank 1 on {HOST}): ppo.lam=2\n", 1),
        ("0", RuntimeError("gloo: Connection closed by peer"), None, 1),
        ("1", RuntimeError("a fault"), None, 0),
    ],
)
def test_who_speaks_first(rank, error, told, waits, monkeypatch, capsys):
    """Told is what cannot be another rank's to tell; None: the error itself is raised."""

    def fail(argv):
        raise error

    slept = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("GEARSHIFT_TRACEBACK", raising=False)
    monkeypatch.setattr(train, "run", fail)
    monkeypatch.setattr(train.time, "sleep", slept.append)
    if told is None:
        with pytest.raises(RuntimeError, match=str(error)):
            train.main([])
    else:
        assert train.main([]) == 2
        assert capsys.readouterr().err == told
    assert len(slept) == waits


# One process


def run(path: Path, *overrides: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.alone(patch)
        return train.main(["--config", str(path), *map(str, overrides)])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a job that has run its two steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(tiny_job.write(folder)) == 0
    return folder


def check_folder(run: Path, ranks: int) -> None:
    assert {path.name for path in run.iterdir()} == FOLDER
    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert set(line) >= METRICS, sorted(METRICS - set(line))
        assert all(isinstance(value, (int, float)) for value in line.values()), line
    assert "timing_s/checkpoint" in metrics[1] and "timing_s/checkpoint" not in metrics[0]
    assert [line["episode"] for line in metrics] == [4, 8]
    first = lines(run / "samples.jsonl")[0]
    assert set(first) == {"step", "prompt", "response", "score"} and first["step"] == 1
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_000002"]
    assert json.loads((run / "environment.json").read_text())["ranks"] == ranks
    report = (run / "report.html").read_text()
    assert "words" in report and len(report) > 10_000


def test_the_run_folder(finished):
    folder = finished / "run"
    check_folder(folder, ranks=1)
    used = config_load.load(str(folder / "config.yaml"), []).config
    assert used == config_load.load(str(finished / "run.yaml"), []).config
    stage = json.loads((folder / "ds_actor.json").read_text())["zero_optimization"]["stage"]
    assert stage == 0


def test_the_exported_models_load(finished):
    export, before = finished / "run" / "export", finished / "policy"
    for name, auto in (
        ("actor", AutoModelForCausalLM),
        ("critic", AutoModelForTokenClassification),
    ):
        assert list((export / name).glob("*.safetensors"))
        model, info = auto.from_pretrained(export / name, output_loading_info=True)
        assert not any(info.values()), info
        assert model.config.use_cache
        tokenizer = AutoTokenizer.from_pretrained(export / name)
        assert tokenizer("w5 w6")["input_ids"] == [5, 6]
        start = AutoModelForCausalLM.from_pretrained(before).model.embed_tokens.weight
        assert not torch.equal(model.model.embed_tokens.weight, start), "it was trained"
        assert torch.allclose(model.model.embed_tokens.weight, start, atol=1e-3)


def test_the_folder_is_refused_or_continued(finished, capsys):
    before = (finished / "run" / "metrics.jsonl").read_bytes()
    path = finished / "run.yaml"
    assert run(path, "--run.resume", "none") == 2
    assert "holds another run" in capsys.readouterr().err
    assert (finished / "run" / "metrics.jsonl").read_bytes() == before

    assert run(path) == 0
    assert "run.steps=2: already done; raise it to go on" in capsys.readouterr().out
    assert (finished / "run" / "metrics.jsonl").read_bytes() == before

    assert run(path, "--run.steps", 3, "--run.seed", 1) == 2
    assert "was saved with other settings: run.seed: 0 -> 1; restore" in capsys.readouterr().err

    assert run(path, "--run.steps", 3) == 0
    assert "resumed from" in capsys.readouterr().out
    metrics = (finished / "run" / "metrics.jsonl").read_bytes()
    assert metrics.startswith(before)
    assert [line["step"] for line in lines(finished / "run" / "metrics.jsonl")] == [1, 2, 3]
    names = sorted(path.name for path in (finished / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_000002", "step_000003"]


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    """As where a launcher's ssh ended first: nobody reads what the rank prints."""
    job = tiny_job.write(tmp_path, run={"save_every": 1})
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(tiny_job.TRAIN), "--config", str(job)]
    done = subprocess.run(
        command, env=tiny_job.environment(), stdout=writer, stderr=writer, timeout=300
    )
    os.close(writer)
    assert done.returncode == 0
    assert [line["step"] for line in tiny_job.learned(tmp_path / "run")] == [1, 2]
    assert store.read_manifest(tmp_path / "run" / "checkpoints" / "step_000002")
    assert (tmp_path / "run" / "export" / "actor" / "config.json").exists()
    told = (tmp_path / "run" / "console.log").read_text()
    kinds = ("plan: fits", "prompts from", "step 1/2", "step 2/2", "exported", "report")
    assert all(f"\n{kind}" in f"\n{told}" for kind in kinds)


OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB"
EXHAUSTED = [  # where, the phase, and the key that helps
    (
        Actor,
        "loss",
        "update_actor",
        "set ppo.micro_batch_tokens to 20 (now 40), or actor.sleep and",
    ),
    (Reference, "logprobs", "ref", "set ppo.score_batch_tokens to 32 (now 64); "),
    (Actor, "generate", "generate", "set rollout.max_sequences to 128, or bound rollout.kv_cache"),
]


@pytest.mark.parametrize(("role", "method", "phase", "fix"), EXHAUSTED)
def test_a_gpu_without_memory_names_the_key_and_the_run_goes_on(
    role, method, phase, fix, tmp_path, monkeypatch, capsys
):
    """In the second step, of a run that saves each."""
    path = tiny_job.write(tmp_path, run={"save_every": 1, "export": False})
    keys = ("--ppo.micro_batch_tokens", 40, "--ppo.score_batch_tokens", 64)
    whole = getattr(role, method)

    def exhausted_in_step_2(self, *args, **kwargs):
        if (tmp_path / "run" / "metrics.jsonl").exists() and len(
            tiny_job.learned(tmp_path / "run")
        ):
            raise torch.OutOfMemoryError(OOM)
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(role, method, exhausted_in_step_2)
        assert run(path, *keys) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    said = f"gearshift: error: the GPU ran out of memory in {phase} (tried to allocate 2.00 GiB); "
    assert error.startswith(said + fix), error
    assert "Traceback" not in error
    smaller = ("--ppo.micro_batch_tokens", 20, "--ppo.score_batch_tokens", 32)
    assert run(path, *smaller, "--rollout.max_sequences", 128) == 0
    assert [line["step"] for line in tiny_job.learned(tmp_path / "run")] == [1, 2]


def test_a_checkpoint_without_a_critic(tmp_path, capsys):
    path = tiny_job.write(tmp_path, run={"steps": 1, "export": False})
    assert run(path, "--ppo.estimator", "reinforce_pp") == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == FOLDER - {"ds_critic.json", "export"}
    assert "loss/value_avg" not in lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert run(path, "--run.steps", 2) == 2
    told = 'was saved with other settings: ppo.estimator: "reinforce_pp" -> "gae"; restore'
    assert told in capsys.readouterr().err
    assert run(path, "--run.steps", 2, "--run.resume_changed", "[ppo.estimator]") == 2
    assert "has no critic; it was saved with another ppo.estimator" in capsys.readouterr().err


# Two ranks


def launched(command: list[str], timeout: int = 600) -> subprocess.CompletedProcess:
    """Runs a launcher and kills it with its ranks if they hang."""
    process = subprocess.Popen(
        command,
        env=tiny_job.environment(),
        cwd=tiny_job.TRAIN.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def deepspeed(*arguments: object) -> subprocess.CompletedProcess:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q"]
    launcher += ["--master_port", free_port()]
    return launched(
        [*launcher, "--num_accelerators", "2", str(tiny_job.TRAIN), *map(str, arguments)]
    )


def ours(out: str) -> list[str]:
    """Without what DeepSpeed's launcher says before and after our processes run."""
    return [line for line in out.splitlines() if not re.match(r"\[.*\] \[(WARNING|ERROR)\]", line)]


@pytest.fixture
def zero3(tmp_path):
    deepspeed = {role: {"deepspeed": f"{role}_zero3.json"} for role in ("actor", "critic")}
    return tiny_job.write(tmp_path, **deepspeed)


def test_two_ranks_under_deepspeed(zero3, tmp_path, finished):
    done = deepspeed("--config", zero3)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = ours(done.stdout)
    kinds = ("plan: fits", "prompts from", "first prompt", "step 1/2", "memory planned/measured")
    kinds += ("step 2/2", "exported", "report")
    assert len(said) == len(kinds)
    for line, kind in zip(said, kinds, strict=True):
        assert line.startswith(kind)
    check_folder(tmp_path / "run", ranks=2)
    alone = lines(finished / "run" / "metrics.jsonl")
    for line, single in zip(lines(tmp_path / "run" / "metrics.jsonl"), alone, strict=False):
        for key in ("objective/scores", "response_length/mean", "loss/value_avg"):
            assert line[key] == pytest.approx(single[key], rel=1e-4)


def test_a_mistake_under_deepspeed(zero3):
    done = deepspeed("--config", zero3, "--ppo.kl_coeff", "1")
    assert done.returncode == 2
    told = "gearshift: error: ppo.kl_coeff: no such key; did you mean ppo.kl_coef?\n"
    assert done.stderr == told, "once, not once a rank"
    assert ours(done.stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "told"),
    [
        ("second = int(os.environ['RANK'])", "error: reward 'words' returned 1 scores for 2 compl"),
        (
            "second = 1 // (1 - int(os.environ['RANK']))",
            f"error (rank 1 on {HOST}): rewards: words: function=",
        ),
    ],
    ids=["scores", "import"],
)
def test_a_mistake_of_the_second_rank_only(zero3, tmp_path, start, told):
    """Rank 0 is told of it, or meets it as a broken collective, of which nobody needs to hear."""
    body = f"import os\n\n{start}\n\ndef score(prompts, completions, **columns):\n"
    (tmp_path / "second.py").write_text(f"{body}    return [0.0] * (len(completions) - second)\n")
    done = deepspeed("--config", zero3, "--rewards.0.function", f"{tmp_path / 'second.py'}:score")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_under_torchrun(zero3, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = launched([*torchrun, str(tiny_job.TRAIN), "--config", str(zero3)])
    assert done.returncode == 0, done.stderr
    check_folder(tmp_path / "run", ranks=2)
    again = launched([*torchrun, str(tiny_job.TRAIN), "--config", str(zero3), "--run.steps=3"])
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
