"""Two hosts, as network namespaces with an sshd each, and what `gearshift launch` does on them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.test_hang import await_steps
from tests.tiny import job as tiny_job
from tests.tiny.on_ranks import free_port

BUILD = Path(__file__).with_name("netns.sh")
GEARSHIFT = str(Path(sys.executable).with_name("gearshift"))
ROOT = tiny_job.TRAIN.parents[1]
PATIENCE_S = 300
ZERO3 = {role: {"deepspeed": f"{role}_zero3.json"} for role in ("actor", "critic")}


def lacking() -> str | None:
    """Why hosts cannot be built here."""
    if os.name != "posix" or os.geteuid():
        return "needs root, to make network namespaces"
    tools = [t for t in ("ip", "nsenter", "unshare", "sshd", "ssh", "pdsh") if not shutil.which(t)]
    if tools:
        return f"needs {', '.join(tools)}"
    allowed = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"])
    return "network namespaces are not allowed here" if allowed.returncode else None


class Hosts:
    """n0 and n1: one file system, own networks and processes."""

    def __init__(self, base: Path):
        prefix = f"gt{os.getpid()}"
        self.env = tiny_job.environment(NETNS_BASE=str(base), NETNS_PREFIX=prefix)
        self.env["GEARSHIFT_TRACEBACK"] = ""
        self("up", 2)
        self.hostfile = base / "hosts"
        self.hostfile.write_text("n0 slots=1\nn1 slots=1\n")

    def __call__(self, *words: object) -> str:
        command = ["bash", str(BUILD), *map(str, words)]
        return subprocess.run(
            command, env=self.env, check=True, capture_output=True, text=True, timeout=120
        ).stdout

    def launch(self, job: Path, log: Path, *overrides: object) -> subprocess.Popen:
        """`gearshift launch` on n0."""
        words = ["run", "0", GEARSHIFT, "launch", "--hostfile", str(self.hostfile)]
        words += ["--config", str(job), *map(str, overrides)]
        with log.open("w") as out:
            return subprocess.Popen(
                ["bash", str(BUILD), *words], env=self.env, stdout=out, stderr=out, cwd=ROOT
            )

    def processes(self, host: int, word: str, *others: str) -> list[int]:
        """Their numbers on this machine, by a word of the command line; not those with `others`."""
        found = []
        for pid in map(int, self("pids", host).split()):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if word in words and not set(others) & set(words):
                    found.append(pid)
        return found

    def signal_launcher(self, number: int) -> None:
        (launcher,) = self.processes(0, "--hostfile", "nsenter", "-q")
        os.kill(launcher, number)

    def rank(self, host: int) -> int:
        (rank,) = self.processes(host, str(tiny_job.TRAIN), "deepspeed.launcher.launch")
        return rank

    def empty(self) -> bool:
        return not self.processes(0, str(tiny_job.TRAIN)) + self.processes(1, str(tiny_job.TRAIN))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    why = lacking()
    if why:
        pytest.skip(why)
    built = Hosts(tmp_path_factory.mktemp("hosts"))
    yield built
    built("down")


def finish(launcher: subprocess.Popen, hosts: Hosts) -> int:
    try:
        return launcher.wait(PATIENCE_S)
    finally:
        launcher.kill()
        assert hosts.empty(), "orphans"


def one_host(job: Path, run: Path) -> None:
    """The same job on two ranks of this machine."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command += ["--master_port", free_port(), str(tiny_job.TRAIN), "--config", str(job)]
    command += ["--run.dir", str(run)]
    subprocess.run(
        command, env=tiny_job.environment(), check=True, capture_output=True, timeout=2 * PATIENCE_S
    )


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_is_the_uninterrupted_run(hosts, tmp_path):
    job = tiny_job.write(tmp_path, run={"steps": 14, "export": False}, **ZERO3)
    run = tmp_path / "run"
    launcher = hosts.launch(job, tmp_path / "log")
    await_steps(run, 2)
    hosts.signal_launcher(signal.SIGTERM)
    status, told = finish(launcher, hosts), (tmp_path / "log").read_text()
    assert status == 3, told
    assert "launch: SIGTERM: ending after this step, with a checkpoint" in told
    assert "launch: saved and stopped; a log of each rank is in" in told
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert (run / "checkpoints" / f"step_{done:06d}").is_dir() and done < 14
    assert not list(run.glob("lock*")) and not (run / "stop").exists()

    assert finish(hosts.launch(job, tmp_path / "log"), hosts) == 0
    assert json.loads((run / "environment.json").read_text())["hosts"] == ["n0", "n1"]
    one_host(job, tmp_path / "one")
    assert tiny_job.learned(run) == tiny_job.learned(tmp_path / "one")


@pytest.mark.slow
def test_a_folder_that_hosts_do_not_share(hosts, tmp_path):
    """/dev/shm is each host's own."""
    job = tiny_job.write(tmp_path, **ZERO3)
    (tmp_path / "folder").mkdir()
    launcher = hosts.launch(job, tmp_path / "log", "--run.dir", "/dev/shm/run")
    assert finish(launcher, hosts) == 2
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "gearshift" in line]
    assert said[0].startswith(
        "gearshift: error: run.dir='/dev/shm/run': n1 does not see what n0 writes there; use"
    )
    assert len(said) == 1


def test_hosts_with_another_configuration(hosts, tmp_path):
    """One file by name, another on each host: what an unsynchronised copy is."""
    job = tiny_job.write(tmp_path, **ZERO3)
    for host, tokens in enumerate((6, 7)):
        text = job.read_text().replace("max_new_tokens: 6", f"max_new_tokens: {tokens}")
        hosts("run", host, sys.executable, "-c", f"open('/dev/shm/run.yaml', 'w').write({text!r})")
    assert finish(hosts.launch(Path("/dev/shm/run.yaml"), tmp_path / "log"), hosts) == 2
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "gearshift" in line]
    assert said[0].startswith(
        "gearshift: error: sampling.max_new_tokens: n0 has 6, n1 has 7; start every host with the"
    )
    assert len(said) == 1 and not list((tmp_path / "run").glob("*.yaml"))


def doctor(hosts: Hosts, folder: Path, **environment: str) -> tuple[int, dict[str, dict]]:
    """`gearshift doctor` on n0, for two ranks on each host: status, findings by name."""
    hostfile = folder / "hosts"
    hostfile.write_text("n0 slots=2\nn1 slots=2\n")
    job = tiny_job.write(folder)
    words = ["doctor", "--json", "--hostfile", hostfile, "--config", job]
    done = subprocess.run(
        ["bash", BUILD, "run", "0", GEARSHIFT, *words],
        env=hosts.env | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert not hosts.processes(1, "gearshift.launch.examine.network"), "orphans"
    assert done.stdout.startswith("["), done.stderr
    return done.returncode, {found["name"]: found for found in json.loads(done.stdout)}


def test_doctor_measures_each_host_and_each_pair(hosts, tmp_path):
    status, seen = doctor(hosts, tmp_path)
    assert status == 0, seen
    assert seen["ports"]["text"].startswith("all ranks of all hosts met at 10.77.0.1, port ")
    rates = r"all-reduce ([\d.e+-]+) GB/s, all-gather ([\d.e+-]+) GB/s"
    for place in ("n0", "n1", "n0 - n1"):
        measured = re.match(rates, seen[f"{place}: gloo"]["text"])
        assert measured and all(float(rate) > 0 for rate in measured.groups())
    assert "GB of memory" in seen["n1: free"]["text"]


@pytest.mark.slow
def test_doctor_where_hosts_cannot_connect(hosts, tmp_path):
    status, seen = doctor(hosts, tmp_path, GLOO_SOCKET_IFNAME="nowhere")
    assert status == 1 and seen["network"]["level"] == "bad"
    assert "nowhere" in seen["network"]["text"] and "GLOO_SOCKET_IFNAME" in seen["network"]["fix"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ("kill", "stop", "cut"))
def test_a_fault_of_the_other_host(hosts, tmp_path, fault):
    """It is named, all ends, and `--retries` goes on to the end."""
    settings = {"steps": 30, "export": False, "save_every": 1, "hang_timeout_s": 40}
    job, run = tiny_job.write(tmp_path, run=settings, **ZERO3), tmp_path / "run"
    launcher = hosts.launch(job, tmp_path / "log", "--retries", 1, "--min-hosts", 1)
    await_steps(run, 3)
    pid = hosts.rank(1)
    if fault == "cut":
        hosts("link", 1, "down")
    else:
        os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    begun = time.monotonic()
    try:
        while "launch: start 2" not in (tmp_path / "log").read_text():
            assert time.monotonic() < begun + 180 and launcher.poll() is None
            time.sleep(0.2)
        print(f"{fault}: over after {time.monotonic() - begun:.0f} s")
        status = launcher.wait(PATIENCE_S)
    finally:
        launcher.kill()
        hosts("link", 1, "up")
    told = (tmp_path / "log").read_text()
    assert status == 0, told
    assert re.search(r"fault \(rank 0\): rank 1 \(pid \d+ on n1\)", told)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 30
