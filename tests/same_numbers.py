"""What six tiny runs compute, to the bit: shows that a change alters no number.

    PYTHONPATH=. python tests/same_numbers.py record BEFORE.json     before the change
    PYTHONPATH=. python tests/same_numbers.py record AFTER.json      after it
    PYTHONPATH=. python tests/same_numbers.py compare BEFORE.json AFTER.json

A record holds the lines of metrics.jsonl without what measures the machine, and the sha256 of every
exported weight file. Both records have to come from one machine: processors round differently.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tiny import job as tiny_job


def zero3(kind: str = "", **actor) -> dict:
    names = {role: {"deepspeed": f"{role}_zero3{kind}.json"} for role in ("actor", "critic")}
    names["actor"] |= actor
    return names


SPLIT = {"optimizer": {"name": "split_adamw"}}
TEXT = {"sources": [{"path": "TEXT"}], "max_tokens": 8, "rows": 4}

# Ranks, the steps after which a start ends, and what differs from the job of tiny_job.
CASES: dict[str, tuple[int, tuple[int, ...], dict]] = {
    "fp32, two ranks, text, adaptive KL": (
        2,
        (3,),
        zero3()
        | {"ppo": {"ptx_coef": 0.3, "kl_controller": "adaptive", "epochs": 2}}
        | {"pretrain": TEXT},
    ),
    "bf16 split AdamW, one rank": (
        1,
        (3,),
        {role: value | SPLIT for role, value in zero3("_bf16_split").items()},
    ),
    "bf16 split AdamW, two ranks, tp 2": (
        2,
        (3,),
        {role: value | SPLIT for role, value in zero3("_bf16_split").items()}
        | {"rollout": {"tp": 2}},
    ),
    "rloo, one rank": (1, (3,), {"ppo": {"estimator": "rloo", "samples_per_prompt": 2}}),
    "streamed reference, two ranks": (
        2,
        (3,),
        zero3() | {"reference": {"deepspeed": "frozen_zero3_cpu.json"}},
    ),
    "resumed in the middle, joint update": (
        1,
        (2, 4),
        zero3() | {"run": {"save_every": 1}, "ppo": {"update": "joint", "target_kl": 0.5}},
    ),
}


def run(folder: Path, ranks: int, ends: tuple[int, ...], changes: dict) -> dict:
    """Trains in `folder`, once up to each of `ends`; returns what was computed."""
    (folder / "text.txt").write_text("w4 w5 w6 w7 w8 w9 w10 w11\n" * 8)
    written = json.loads(json.dumps(changes).replace("TEXT", str(folder / "text.txt")))
    config = tiny_job.write(folder, **written)
    for end in ends:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", str(tiny_job.TRAIN), "--config", str(config)]
        command += ["--run.steps", str(end)]
        done = subprocess.run(
            command, env=tiny_job.environment(), capture_output=True, text=True, timeout=900
        )
        if done.returncode:
            sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    files = sorted((folder / "run" / "export").rglob("*.safetensors"))
    return {
        "metrics": tiny_job.learned(folder / "run"),
        "weights": {
            file.relative_to(folder / "run").as_posix(): hashlib.sha256(
                file.read_bytes()
            ).hexdigest()
            for file in files
        },
    }


def record(out: Path) -> None:
    found = {}
    for name, (ranks, ends, changes) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="gearshift-") as folder:
            found[name] = run(Path(folder), ranks, ends, changes)
        print(f"{name}: {len(found[name]['metrics'])} steps", flush=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def differences(one: dict, two: dict) -> list[str]:
    """The runs, figures and files in which two records differ."""
    found = [f"{name}: only in one record" for name in one.keys() ^ two.keys()]
    for name in one.keys() & two.keys():
        before, after = one[name], two[name]
        if len(before["metrics"]) != len(after["metrics"]):
            found.append(f"{name}: other numbers of steps")
        for step, pair in enumerate(zip(before["metrics"], after["metrics"], strict=False), 1):
            keys = pair[0].keys() | pair[1].keys()
            changed = [key for key in sorted(keys) if _text(pair[0], key) != _text(pair[1], key)]
            found += [f"{name}: step {step}: {key}" for key in changed]
        if before["weights"] != after["weights"]:
            found.append(f"{name}: exported weights")
    return found


def _text(figures: dict, key: str) -> str:
    return json.dumps(figures[key]) if key in figures else "missing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    if args.action == "record":
        return record(*args.files)
    found = differences(*(json.loads(file.read_text()) for file in args.files))
    print("\n".join(found) or "equal to the bit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
