"""Start a job on the hosts of a hostfile through `deepspeed`, and see it to its end.

Further arguments go to the job, as --run.steps 20. SIGINT, SIGTERM and SIGUSR1 let every rank save
and end; a second one ends at once. Exit status: 0 finished, 3 saved and stopped, 2 a mistake,
1 a fault. docs/cluster.md
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gearshift.engine.checkpoint import store
from gearshift.engine.cluster.claim import LOCK
from gearshift.engine.cluster.rendezvous import HOSTS
from gearshift.engine.config import load as config_load
from gearshift.engine.config.errors import refuse_if
from gearshift.launch import hosts as machines
from gearshift.launch.commands import demo

_OUTCOMES = {"finished": 0, "stopped": 3}
_GRACE_S = 20.0  # for ranks to name the one that is gone, and to end
_SILENCE_S = 30.0  # after which a lock that nobody touches belongs to no living rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(overrides=[])
    parser.add_argument("--config", metavar="FILE", required=True, help="the job's YAML")
    parser.add_argument("--hostfile", metavar="FILE", help="a line a host: NAME slots=N")
    parser.add_argument("--ranks", type=int, default=0, help="without a hostfile; 0: one per GPU")
    parser.add_argument("--retries", type=int, default=0, help="further starts after a fault")
    parser.add_argument("--min-hosts", type=int, help="go on without hosts that do not answer")


def main(args: argparse.Namespace) -> int:
    config = config_load.load(args.config, args.overrides).config
    hosts = machines.read(args.hostfile) if args.hostfile else {}
    fewest = args.min_hosts or len(hosts)
    refuse_if(args.retries < 0, "--retries", "must be at least 0", value=args.retries)
    refuse_if(fewest > len(hosts), "--min-hosts", f"there are {len(hosts)}", value=fewest)
    if hosts:
        refuse_if(not shutil.which("pdsh"), "pdsh", "not installed here", "apt install pdsh")
        machines.look(hosts, Path.cwd())
    job = ["--config", args.config, *args.overrides]
    folder, request = Path(config.run.dir).absolute(), demo.Request("launch")
    for retry in range(args.retries + 1):
        before = _last_step(folder)
        attempt = Attempt(hosts, args.ranks, job, folder, request)
        status = attempt.run()
        silent = attempt.end()
        if status != 1 or retry == args.retries or request.asked:
            break
        if retry and _last_step(folder) == before:
            print("launch: no step was gained since the last fault: not started again")
            break
        hosts = {host: slots for host, slots in hosts.items() if host not in silent}
        if silent and len(hosts) < fewest:
            print(f"launch: {', '.join(silent)} did not answer, --min-hosts={fewest}: not started")
            break
        wait = min(300, 5 * 2**retry)
        print(f"launch: start {retry + 2} in {wait} s, on {', '.join(hosts) or 'this host'}")
        request.sleep(wait)
        if request.asked:
            break
    return status


class Attempt:
    """One start of the job, from `deepspeed` to the outcome that the run has left in its folder."""

    def __init__(
        self,
        hosts: Mapping[str, int],
        ranks: int,
        job: list[str],
        folder: Path,
        request: demo.Request,
    ):
        self.hosts, self.folder, self.request = hosts, folder, request
        self.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.logs = folder / "logs" / self.name
        self.logs.mkdir(parents=True)
        self.stop, self.outcome = folder / "stop", folder / "outcome.json"
        for left in (self.stop, self.outcome):
            left.unlink(missing_ok=True)
        self._shown: dict[Path, int] = {}
        self._failed_at: float | None = None
        self._failed = 0
        self._touched = (0, 0.0)  # when the lock of the run was, and when that was seen first
        self._without_ssh = False
        own = {machines.LAUNCH: self.name}
        if hosts:
            own[HOSTS] = machines.told(hosts)
            job = [*self._on_hosts(own), *self._quoted(job)]
            own = {"DS_ENV_FILE": str(self.logs / "environment")}
            own["PDSH_SSH_ARGS_APPEND"] = " ".join(machines.SSH)
        else:
            # Up to the script, which --config follows.
            job = [*demo.launcher(ranks), f"--enable_each_rank_log={self.logs}", str(_TRAIN), *job]
        self.job, self.environment = job, demo.environment() | own

    def _on_hosts(self, own: dict[str, str]) -> list[str]:
        """The launch line for a hostfile; writes that, and what ranks get of the environment."""
        written = "".join(f"{host} slots={slots}\n" for host, slots in self.hosts.items())
        (self.logs / "hostfile").write_text(written)
        passed = machines.exports() | own
        for key, value in passed.items():
            refuse_if(re.search(r'["$`\\\n]', value), key, "ssh cannot pass it", value=repr(value))
        for path in machines.environment_files():
            passed |= machines.variables(path)  # as they are: DeepSpeed's users know its rules
        lines = "".join(f"{key}={value}\n" for key, value in passed.items())
        (self.logs / "environment").touch(mode=0o600)  # they may be secrets
        (self.logs / "environment").write_text(lines)
        address, port = machines.meeting_point(next(iter(self.hosts)))
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--no_ssh_check"]
        launcher += ["--hostfile", str(self.logs / "hostfile"), "--force_multi"]
        launcher += ["--master_addr", address, "--master_port", str(port)]
        return [*launcher, f"--enable_each_rank_log={self.logs}", str(_TRAIN)]

    @staticmethod
    def _quoted(job: list[str]) -> list[str]:
        """For the shell of the other hosts; deepspeed quotes words with spaces itself."""
        return [word if re.fullmatch(r"[ \w@%+=:,./-]+", word) else f"'{word}'" for word in job]

    def run(self) -> int:
        """Starts it, shows what rank 0 says, and returns the exit status."""
        with (self.logs / "launcher.txt").open("w") as log:
            # A session of its own: Ctrl-C is ours to pass on, and would end ssh before the ranks.
            process = subprocess.Popen(
                self.job, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        while process.poll() is None and self.request.asked < 2 and not self._lost():
            self._pass_on()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        elif self._alive():
            self._save_without_ssh()
            while self._alive() and self.request.asked < 2:
                self._pass_on()
        self._show()
        try:
            status = _OUTCOMES[json.loads(self.outcome.read_bytes())["outcome"]]
        except OSError:
            status = 2 if 2 in (process.returncode, self._failed) else 1
        told = {0: "finished", 3: "saved and stopped", 2: "not started", 1: "failed"}[status]
        if status == 3 and not self.request.asked and self._without_ssh:
            status = 1  # nobody wanted it to stop
        print(f"launch: {told}; a log of each rank is in {self.logs}", flush=True)
        return status

    def end(self) -> list[str]:
        """Leaves every host empty of this launch; returns those that do not answer."""
        (self.logs / "environment").unlink(missing_ok=True)
        self.stop.unlink(missing_ok=True)
        return machines.end(self.hosts, self.name) if self.hosts else []

    def _lost(self) -> bool:
        """Whether a host has failed, and the others have had time to say why and end.

        pdsh would wait for them, who may wait for it. Where only its ssh is gone, all may save.
        """
        text = (self.logs / "launcher.txt").read_text(errors="replace")
        failed = re.search(r"pdsh@\S+ (\S+): ssh exited with exit code (\d+)", text)
        if not failed:
            return False
        now, self._failed = time.monotonic(), int(failed[2])
        self._failed_at = self._failed_at or now
        if now < self._failed_at + _GRACE_S:
            return False
        if failed[2] == "255" and machines.runs(failed[1], self.name):
            self._save_without_ssh()
            self._failed_at = now
            return False
        print(f"launch: host {failed[1]} has failed; the others are ended")
        return True

    def _save_without_ssh(self) -> None:
        if not self._without_ssh:
            print("launch: ssh has ended before the ranks: they are asked to save and end")
        self._without_ssh = True

    def _pass_on(self) -> None:
        """The request to stop, by a file that rank 0 looks for after each step."""
        if self.request.asked or self._without_ssh:
            self.stop.touch()
        self._show()
        time.sleep(demo.POLL_S)

    def _alive(self) -> bool:
        """Whether rank 0 holds the run folder still."""
        try:
            touched = (self.folder / LOCK).stat().st_mtime_ns
        except OSError:
            return False
        if touched != self._touched[0]:
            self._touched = touched, time.monotonic()
        return time.monotonic() < self._touched[1] + _SILENCE_S

    def _show(self) -> None:
        """What rank 0 has said since, and what others say that is ours."""
        for path in sorted(self.logs.glob("*_rank*.log")):
            with path.open("rb") as file:
                file.seek(self._shown.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._shown[path] = self._shown.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if path.stem.endswith("_rank0") or line.startswith("gearshift: "):
                    print(line, flush=True)


_TRAIN = demo.LAUNCH / "train.py"


def _last_step(folder: Path) -> str:
    found = store.steps(folder / "checkpoints")
    return found[-1].name if found else ""
