"""Spoils the files and settings of a job that runs, again and again: each must end in one line.

    PYTHONPATH=. python tests/fuzz.py [TRIES] [--seed S]

A try changes one thing: a setting, a row, or a JSON file of the model, the tokenizer or a
checkpoint. It must train, or end with status 2, one line and nothing written; never in a traceback
or after a minute. Prints what did not, and its seed; the exit status is 1 then.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import yaml

from gearshift.launch import train
from tests.tiny import job as tiny_job

JUNK: list[Any] = [None, True, -1, 0, 3, 10**9, 0.5, float("nan"), "", "x", "\ud800", [], [1], {}]
JUNK += [{"a": None}, "\n", "null", [[]], [None], {"role": "user"}, [{"role": "user"}], "é" * 5000]
SECONDS = 60


class Endless(BaseException):
    """Raised after SECONDS; not one of the errors that a run tells in a line."""


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every key and index in a tree of JSON values."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for name, value in inside:
        found.append((*path, name))
        found += places(value, (*path, name)) if isinstance(value, dict | list) else []
    return found


def spoil(tree: Any, rng: random.Random) -> str:
    """Gives one place of a tree another value, or takes it away; says which."""
    *sections, last = place = rng.choice(places(tree)[:400])
    for name in sections:
        tree = tree[name]
    if rng.random() < 0.2:
        del tree[last]
        return f"{place} deleted"
    tree[last] = value = rng.choice(JUNK)
    return f"{place} = {value!r:.60}"


def mutate(folder: Path, rng: random.Random) -> str:
    """Spoils one file of a job; says how."""
    texts = [*folder.glob("*.yaml"), *folder.glob("policy/*.json"), *folder.glob("*.jsonl")]
    texts += [*folder.glob("run/checkpoints/*/*.json")]
    file = rng.choice(sorted(texts))
    whole = file.read_text()
    if rng.random() < 0.1:
        file.write_text(whole[: rng.randrange(len(whole))])
        return f"{file.name} cut off"
    if file.suffix == ".yaml":
        tree = yaml.safe_load(whole)
        told = spoil(tree, rng)
        file.write_text(json.dumps(tree))  # JSON is YAML
    elif file.suffix == ".jsonl":
        tree = [json.loads(line) for line in whole.splitlines()]
        told = spoil(tree, rng)
        file.write_text("".join(json.dumps(row) + "\n" for row in tree))
    else:
        tree = json.loads(whole)
        told = spoil(tree, rng)
        file.write_text(json.dumps(tree))
    return f"{file.name}: {told}"


def attempt(folder: Path) -> str | None:
    """Runs the job; what is wrong with how it ended, None where it is fine."""
    before, told = contents(folder / "run"), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            status = train.main(["--config", str(folder / "run.yaml")])
    except Endless:
        trains = contents(folder / "run") - before and (folder / "run/metrics.jsonl").exists()
        return None if trains else "hangs"  # a change may ask for more steps
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)
    lines = [line for line in told.getvalue().splitlines() if "gearshift: error" in line]
    if status == 2 and (len(lines) != 1 or contents(folder / "run") != before):
        return f"status 2 with {len(lines)} lines, or something was written"
    return None if status in (0, 1, 2) else f"status {status}"


def contents(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tries", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Endless))
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        base = Path(scratch) / "job"
        base.mkdir()
        tiny_job.write(base, run={"steps": 1, "export": False})
        assert attempt(base) is None
        for seed in range(arguments.seed, arguments.seed + arguments.tries):
            rng, folder = random.Random(seed), base
            kept = Path(scratch) / "kept"
            shutil.copytree(base, kept)
            if rng.random() < 0.7:
                shutil.rmtree(folder / "run")  # else the checkpoint is continued
            change = mutate(folder, rng)
            fault = attempt(folder)
            if fault:
                wrong += 1
                print(f"seed {seed}: {change}: {fault}", flush=True)
            shutil.rmtree(base)
            kept.rename(base)
    print(f"{arguments.tries} tries, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
