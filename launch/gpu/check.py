"""One command for an hour on a GPU: are the kernels right there, and how fast is what we built?

  PYTHON=python3 make gpu-check                          everything
  PYTHON=python3 make gpu-check PART=first               what says most, in six minutes
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
PARTS = ("first", "ragged", "kernels-correct", "kernels-speed", "generation", "shift", "ppo")
SPEED_SHAPES = ("llama3-8b", "qwen2.5-7b", "qwen2.5-0.5b")
BATCHES = (64, 512)
# Responses of a PPO step of four 7B models, steps, and seconds: 512 take longer than other jobs.
PPO_STEPS = {64: (2, 240), 512: (1, 470)}
LIMIT_S = 240
TAIL_LINES = 40  # of a job's output, repeated on the terminal
_WORKER = ("-m", "gearshift.launch.gpu.parts")
_BENCH = ("-m", "gearshift.launch.cli", "bench")
_ALL = ("deepspeed", "transformers")


@dataclasses.dataclass(frozen=True)
class Job:
    """`words` follow the interpreter; {out} is where results go. limit_s: seconds until it is
    ended. needs: packages without which it is skipped."""

    part: str
    name: str
    words: tuple[str, ...]
    limit_s: int
    needs: tuple[str, ...] = ()


def jobs_of(part: str, gpus: int, *, tiny: bool = False) -> list[Job]:
    """The jobs of one part, the job of that name, or all but those of `first`, which are others in
    brief. Most important first: the hour may end early. tiny: `first` at sizes of a CPU."""
    shift = f"--ranks {gpus} --hidden 4096 --layers 8 --vocab 128256"
    every = [
        _job("ragged", "", LIMIT_S, *_WORKER, "ragged", needs=("transformers",)),
        _job("kernels-correct", "", LIMIT_S, *_WORKER, "correctness", needs=("triton",)),
        *(_speed("kernels-speed", shape, LIMIT_S, "--peers") for shape in SPEED_SHAPES),
        *(_generation("generation", batch, LIMIT_S, "--peers hf") for batch in BATCHES),
        _job("shift", "", LIMIT_S, *_BENCH, "shift", *shift.split(), needs=_ALL),
        *(_ppo("ppo", rows, limit, steps) for rows, (steps, limit) in PPO_STEPS.items()),
    ]
    first = _first(tiny)
    chosen = [job for job in [*every, *first] if part in (job.part, job.name)]
    return every if part == "all" else chosen


def _first(tiny: bool) -> list[Job]:
    """Six minutes that say most: right, how fast, a whole step. A CPU gets four times as long."""
    longer = 4 if tiny else 1
    small = "--shape qwen2.5-0.5b --layers 2 --vocab 4096 --prompt 8 --new 6" if tiny else ""
    own = "--model shape:smollm2-135m --prompt 8 --shortest 8 --new 6" if tiny else ""
    return [
        _job("first", "ragged", 30 * longer, *_WORKER, "ragged", needs=("transformers",)),
        _speed("first", "tiny" if tiny else "qwen2.5-7b", 50 * longer),
        _ppo("first", 4 if tiny else 64, 190 * longer, 1, small),
        *(
            _generation("first", batch, 45 * longer, f"--repeats 1 {own}")
            for batch in ((4,) if tiny else (64, 256))
        ),
    ]


def _job(part: str, name: str, limit_s: int, *words: str, needs: tuple[str, ...]) -> Job:
    """name: "" for that of the part. Its results go to a file of its name."""
    name = f"first-{name}" if part == "first" else name or part
    return Job(part, name, (*words, "--json", f"{{out}}/{name}.json"), limit_s, needs)


def _speed(part: str, shape: str, limit_s: int, *more: str) -> Job:
    words = (*_BENCH, "kernels", "--shape", shape, *more)
    return _job(part, f"kernels-speed-{shape}", limit_s, *words, needs=("triton",))


def _generation(part: str, batch: int, limit_s: int, more: str) -> Job:
    words = f"--batch {batch} --slots {batch} --prompt 256 --shortest 256 --new 512"
    words += f" --model shape:qwen2.5-7b --dtype bfloat16 {more}"  # the last of a kind counts
    words_of = (*_BENCH, "generation", *words.split())
    return _job(part, f"generation-{batch}", limit_s, *words_of, needs=("transformers", "yaml"))


def _ppo(part: str, rows: int, limit_s: int, steps: int, more: str = "") -> Job:
    words = f"--rows {rows} --steps {steps} --limit-s {limit_s - 20} {more}".split()
    return _job(part, f"ppo-{rows}", limit_s, "-m", "gearshift.launch.gpu.ppo", *words, needs=_ALL)


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


def why_not(part: str, tiny: bool) -> str | None:
    """Why this machine cannot run the part; None if it can."""
    if not jobs_of(part, gpus=1, tiny=tiny):
        return f"--part {part}: there are all, {', '.join(PARTS)}, and the names of jobs"
    if tiny and part != "first":
        return f"--tiny: only part first has such a form, not {part}"
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}; set PYTHON to one that has it"
    import torch

    if not (tiny or torch.cuda.is_available()):
        return f"no CUDA device (torch {torch.__version__}); nothing was checked"
    return None


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="all", help=f"all, {', '.join(PARTS)}, or a job's name")
    parser.add_argument("--tiny", action="store_true", help="part first on a CPU, at its sizes")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install beside, offline")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args(argv)
    problem = why_not(args.part, args.tiny)
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
        jobs = jobs_of(args.part, torch.cuda.device_count(), tiny=args.tiny)
        results = run_jobs(jobs, out, environment, Path(folder))
        print("\n".join(["", *summary(results)]))
    return int(any(result["status"] in ("failed", "timed out") for result in results))


if __name__ == "__main__":
    sys.exit(main())
