"""The short form of tests/crash.py: a two-rank run that is killed wherever it hurts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import crash as crash_script
from tests.tiny import job as tiny_job

CRASH = Path(__file__).resolve().parents[1] / "crash.py"


def crash(*arguments: object, timeout: float) -> dict:
    """What the script found out."""
    done = subprocess.run(
        [sys.executable, str(CRASH), *map(str, arguments)],
        env=tiny_job.environment(PYTHONPATH=str(CRASH.parent.parent)),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.stdout.strip().startswith("{") or done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_three_kills_lose_nothing(tmp_path):
    found = crash(3, "--keep", tmp_path / "home", timeout=600)
    assert found["killed"] == 3 and found["finished"] >= 1
    assert found["differing"] == found["behind"] == []


@pytest.mark.slow
def test_forty_kills_lose_nothing(tmp_path):
    """Every moment five times."""
    found = crash(40, "--keep", tmp_path / "home", "--seed", 1, timeout=3600)
    assert set(found["kills"].values()) == {5}
    assert found["differing"] == found["behind"] == []


# What the critic's recipe adds, and what masks and other losses compute.
RECIPE = {
    "ppo": {"lam_critic": 1.0, "lam_length_alpha": 0.5, "critic_epochs": 2}
    | {"critic_minibatch_size": 2, "critic_warmup_steps": 1, "policy_loss": "gspo"}
    | {"rollout_is_low": 0.5, "rollout_seq_high": 2.0, "rollout_max_error": 0.1}
}
# Ends at the same step only if it knows for how long nothing has risen.
ALONE = {
    "run": {"task": "critic", "steps": crash_script.STEPS + 3},
    "critic": {"patience": crash_script.STEPS - 1, "least_rise": 1e6},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [RECIPE, ALONE], ids=["recipe", "critic alone"])
def test_the_critics_recipe_loses_nothing(tmp_path, changes):
    told = json.dumps(changes)
    found = crash(4, "--keep", tmp_path / "home", "--changes", told, timeout=900)
    assert found["killed"] == 4 and found["finished"] >= 1
    assert found["differing"] == found["behind"] == []


LOSSY = """
import sys
from gearshift.engine.checkpoint import state as run_state
from tests import crash

whole = run_state.restore

def lossy(state, trainer, stateful):
    kept = trainer.kl.coef
    whole(state, trainer, stateful)
    trainer.kl.coef = kept

run_state.restore = lossy
sys.exit(crash.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_forgets_its_kl_coefficient_is_found_out(tmp_path):
    command = [sys.executable, "-c", LOSSY, "2", "--keep", str(tmp_path / "home")]
    environment = tiny_job.environment(PYTHONPATH=str(CRASH.parent.parent))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["differing"]
