"""One command for an hour on a GPU: are the kernels right there, and how fast is what we built?

  PYTHON=python3 make gpu-check                          everything
  python3 launch/gpu/check.py --part kernels-speed --wheels DIR --out docs/results

Needs torch, triton and this repository, which need not be installed. Every job runs in a process of
its own with a time limit, and one that fails does not stop the next. Exit status: 0 all passed, 1 a
job failed or ran out of time, 2 there is no GPU or an argument is wrong.
"""

import argparse
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("engine", "kernels", "launch", "ds_configs")
PARTS = ("kernels-correct", "kernels-speed", "generation", "shift", "ppo")
SPEED_SHAPES = ("llama3-8b", "qwen2.5-7b", "qwen2.5-0.5b")
BATCHES = (64, 512)
# Responses of a PPO step of four 7B models, and steps: 512 take 145 s by the plan, and two such
# steps beside writing and loading the models would not fit the limit.
PPO_STEPS = {64: 2, 512: 1}
TAIL_LINES = 40  # of a job's output, repeated on the terminal


@dataclasses.dataclass(frozen=True)
class Job:
    """`words` follow the interpreter; {out} is where results go. limit_s: seconds until it is
    ended. needs: packages without which it is skipped."""

    part: str
    name: str
    words: tuple[str, ...]
    limit_s: int
    needs: tuple[str, ...] = ()


def jobs_of(part: str, gpus: int) -> list[Job]:
    """The jobs of one part, or of all, most important first: the hour may end early."""
    bench = ("-m", "gearshift.launch.cli", "bench")
    jobs = [
        Job(
            "kernels-correct",
            "kernels-correct",
            (
                "-m",
                "gearshift.launch.gpu.parts",
                "correctness",
                "--json",
                "{out}/kernels-correct.json",
            ),
            470,
            ("triton",),
        )
    ]
    for shape in SPEED_SHAPES:
        name = f"kernels-speed-{shape}"
        words = (*bench, "kernels", "--shape", shape, "--peers", "--json", f"{{out}}/{name}.json")
        jobs.append(Job("kernels-speed", name, words, 460, ("triton",)))
    for batch in BATCHES:
        name = f"generation-{batch}"
        sizes = f"--batch {batch} --slots {batch} --prompt 256 --shortest 256 --new 512"
        words = (*bench, "generation", "--model", "shape:qwen2.5-7b", "--dtype", "bfloat16")
        words += (*sizes.split(), "--peers", "hf", "--json", f"{{out}}/{name}.json")
        jobs.append(Job("generation", name, words, 420, ("transformers", "yaml")))
    model = ("--hidden", "4096", "--layers", "8", "--vocab", "128256")
    words = (*bench, "shift", "--ranks", str(gpus), *model, "--json", "{out}/shift.json")
    jobs.append(Job("shift", "shift", words, 420, ("deepspeed", "transformers")))
    for rows, steps in PPO_STEPS.items():
        words = ("-m", "gearshift.launch.gpu.ppo", "--rows", str(rows), "--steps", str(steps))
        words += ("--limit-s", "440", "--json", f"{{out}}/ppo-{rows}.json")
        jobs.append(Job("ppo", f"ppo-{rows}", words, 470, ("deepspeed", "transformers")))
    return [job for job in jobs if part in ("all", job.part)]


def bootstrap(folder: Path, wheels: Path | None = None) -> dict[str, str]:
    """Makes `gearshift` importable here and in child processes, from the repository as it lies.

    folder: an empty directory that outlives them. Returns the children's environment. Raises
    ValueError if `wheels` holds no wheel, and CalledProcessError if pip refuses one.
    """
    package = folder / "gearshift"
    package.mkdir()
    for room in ROOMS:
        (package / room).symlink_to(ROOT / room, target_is_directory=True)
    places = [str(folder)]
    if wheels is not None:
        places.append(_install(wheels, folder / "wheels"))
    own = str(Path(__file__).resolve().parent)
    sys.path[:] = places + [place for place in sys.path if place != own]
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([*places, *([before] if before else [])])}


def _install(wheels: Path, target: Path) -> str:
    files = sorted(map(str, wheels.resolve().glob("*.whl")))
    if not files:
        raise ValueError(f"--wheels {wheels}: there is no .whl file in it")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-compile", "--target", str(target), *files], check=True)
    return str(target)


def run_job(job: Job, out: Path, environment: dict[str, str], cwd: Path) -> dict[str, Any]:
    """Runs a job to its end or limit; its output goes to {out}/NAME.log, the end of it here."""
    lacking = [name for name in job.needs if importlib.util.find_spec(name) is None]
    result: dict[str, Any] = {"name": job.name, "part": job.part, "seconds": 0.0}
    if lacking:
        return result | {"status": "skipped", "reason": f"not installed: {', '.join(lacking)}"}
    words = [word.replace("{out}", str(out)) for word in job.words]
    log, started = out / f"{job.name}.log", time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-u", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            start_new_session=True,  # so that ranks and compilers it starts end with it
        )
        try:
            code: int | None = process.wait(job.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]), flush=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    if code is None:
        return result | {"status": "timed out", "reason": f"ended after {job.limit_s} s"}
    if code:
        return result | {"status": "failed", "reason": f"exit status {code}, see {log.name}"}
    return result | {"status": "passed", "reason": ""}


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a job's process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_jobs(
    jobs: list[Job], out: Path, environment: dict[str, str], cwd: Path
) -> list[dict[str, Any]]:
    """All jobs, whatever becomes of each; gpu-check.json is up to date after every one."""
    from gearshift.launch.bench.record import machine, write_json

    report: dict[str, Any] = {"machine": machine(_device()), "jobs": []}
    for job in jobs:
        print(f"== {job.name}", flush=True)
        report["jobs"].append(run_job(job, out, environment, cwd))
        report["machine_after"] = machine(_device())
        write_json(out / "gpu-check.json", report)
    return report["jobs"]


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def summary(results: list[dict[str, Any]]) -> list[str]:
    """The short table that comes last."""
    from gearshift.launch.bench.table import plain_lines

    columns = ["job", "status", "seconds", "why"]
    rows = [[r["name"], r["status"], f"{r['seconds']:.0f}", r["reason"]] for r in results]
    return [line.rstrip() for line in plain_lines(columns, rows)]


def why_not() -> str | None:
    """Why this machine cannot run the check; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}; set PYTHON to one that has it"
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__}); nothing was checked"
    return None


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install beside, offline")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args(argv)
    problem = why_not()
    if problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 2
    import torch

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gearshift-") as folder:
        try:
            environment = bootstrap(Path(folder), args.wheels)
        except ValueError as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
        jobs = jobs_of(args.part, torch.cuda.device_count())
        results = run_jobs(jobs, out, environment, Path(folder))
        print("\n".join(["", *summary(results)]))
    return int(any(result["status"] in ("failed", "timed out") for result in results))


if __name__ == "__main__":
    sys.exit(main())
