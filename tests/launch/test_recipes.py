"""Every recipe loads, its plan is what docs/plan.md says, and the job script starts it."""

import os
import subprocess
from pathlib import Path

import pytest
import torch.distributed.run

from gearshift.engine.cluster.interrupt import parse_deadline
from gearshift.engine.config import check as config_check
from gearshift.engine.config import load as config_load
from gearshift.engine.plan.hardware import hardware
from gearshift.launch import train
from gearshift.launch.docs import plan as plan_docs

SLURM = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
ON_CPU = ("demo", "gsm8k_cpu")
FOUND = {
    path.relative_to(plan_docs.RECIPES).with_suffix("").as_posix()
    for path in plan_docs.RECIPES.rglob("*.yaml")
}
NAMES = sorted(FOUND - {*ON_CPU})


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_on_its_ranks(name):
    config = config_load.load(str(plan_docs.RECIPES / f"{name}.yaml"), []).config
    places = [place for recipe, *place in plan_docs.CASES if recipe == name]
    assert places, f"docs/plan.md says nothing of {name}"
    for _, gpus, nodes, _ in places:
        assert config_check.check(config, gpus * nodes) == []


@pytest.mark.parametrize("name", ON_CPU)
def test_a_recipe_for_a_cpu_is_valid(name):
    config = config_load.load(str(plan_docs.RECIPES / f"{name}.yaml"), []).config
    assert config_check.check(config, 1) == config_check.check(config, 2) == []


@pytest.mark.parametrize("case", plan_docs.CASES, ids=lambda case: f"{case[0]}-{case[-1]}")
def test_a_recipe_is_planned_as_documented(case):
    """The whole line: figures, verdict and advice."""
    name, *place = case
    assert plan_docs.row(name, hardware(*place)) in PAGE.read_text(encoding="utf-8").splitlines()


def run_slurm_script(folder: Path, srun: str, *arguments: str) -> subprocess.Popen:
    """The job script beside stand-ins of Slurm's commands; srun: what that does, in bash."""
    commands = {
        "srun": f'printf "%s\\n" "$@" > {folder}/arguments\n{srun}',
        "scontrol": 'printf "%s\\n" node7 node8',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(SLURM), *arguments]
    return subprocess.Popen(command, cwd=folder, env=os.environ | job | {"PATH": path})


def test_the_slurm_script_parses():
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0


def test_the_slurm_script_starts_a_valid_job_and_ends_as_it_does(tmp_path, monkeypatch):
    recipe = str(plan_docs.RECIPES / "70b_multinode.yaml")
    process = run_slurm_script(tmp_path, "exit 3", recipe, "--run.steps", "7")
    assert process.wait(30) == 3
    words = (tmp_path / "arguments").read_text().splitlines()
    script = words.index("launch/train.py")
    assert (SLURM.parent / "train.py").exists()
    path, overrides, _ = train.parse(words[script + 1 :])
    run = config_load.load(path, overrides).config.run
    assert (path, run.steps, run.save_by) == (recipe, 7, "slurm-10")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert parse_deadline(run.save_by, 0.0) == 400
    torchrun = torch.distributed.run.parse_args(words[words.index("torchrun") + 1 :])
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_id) == ("2", "8", "42")
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("c10d", "node7:29500")
