"""The hosts of a launch: read from a hostfile, looked at over ssh, and left empty."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gearshift.engine.config.errors import ConfigError, refuse_if

# A host that does not answer for half a minute is lost, and no question is asked.
SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SSH += ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")
LAUNCH = "GEARSHIFT_LAUNCH"  # in the environment of every process of a launch: its name
_SILENT = 255  # ssh's own exit status
# What ranks of other hosts are given of this environment; deepspeed passes PYTHON* itself. What
# says TOKEN or KEY is not: the command line of ssh is read by everybody.
EXPORTS = ("GEARSHIFT_", "HF_", "WANDB_", "NCCL_", "GLOO_", "TRITON_", "TORCH_", "OMP_", "DS_")
EXPORTS += ("FI_", "UCX_")  # libfabric, as on EFA, and UCX
_SECRET = re.compile("TOKEN|KEY")


def read(hostfile: str) -> dict[str, int]:
    """Slots by host, in order; raises ConfigError where DeepSpeed would guess or go wrong."""
    path = Path(hostfile)
    refuse_if(not path.is_file(), "--hostfile", "no such file", value=repr(hostfile))
    hosts, lines = dict[str, int](), dict[str, int]()
    fix = "write one host a line, as: node1 slots=8"
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        place, found = f"{hostfile}, line {number}", re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if found is None or int(found[2]) < 1:
            raise ConfigError(place, "not a host and its slots", fix, repr(text))
        host = found[1]
        before = lines.setdefault(host, number)
        refuse_if(before != number, place, f"{host} is in line {before} already", "drop one")
        hosts[host] = int(found[2])
    refuse_if(not hosts, hostfile, "names no host", fix)
    return hosts


def exports() -> dict[str, str]:
    """What ranks of other hosts are given of this environment."""
    passed = {key: value for key, value in os.environ.items() if key.startswith(EXPORTS)}
    return {key: value for key, value in passed.items() if value and not _SECRET.search(key)}


def environment_files() -> list[Path]:
    """Those that `deepspeed` reads for ranks of other hosts; the later one prevails."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [path for path in (Path.home() / name, Path.cwd() / name) if path.is_file()]


def variables(path: Path) -> dict[str, str]:
    """What such a file sets; raises ConfigError for a line that stops `deepspeed`, which splits
    each at its first `=` without any exception."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key, equals, value = line.partition("=")
        other = not equals or not re.fullmatch(r"[A-Za-z_]\w*", key)
        fix = "only NAME=value: no blank lines, comments or export"
        refuse_if(other, f"{path}, line {number} {line!r}", "deepspeed cannot read it", fix)
        found[key] = value
    return found


def told(hosts: Mapping[str, int]) -> str:
    """The hosts in the order of their ranks, as rendezvous.HOSTS has them."""
    return ",".join(f"{host}:{slots}" for host, slots in hosts.items())


def ssh(host: str, command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a shell command there; a status of 255 is ssh's own."""
    words = ["ssh", *SSH, host, command]
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, _SILENT, "", f"no answer in {timeout:g} s")


def on_all(
    hosts: Mapping[str, int], command: str, timeout: float = 60
) -> dict[str, subprocess.CompletedProcess[str]]:
    return each(dict.fromkeys(hosts, command), timeout)


def each(
    commands: Mapping[str, str], timeout: float
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs a shell command on each host, all at once: ranks wait for each other."""
    with ThreadPoolExecutor(len(commands)) as pool:
        answers = pool.map(lambda item: ssh(*item, timeout), commands.items())
        return dict(zip(commands, answers, strict=True))


def look(hosts: Mapping[str, int], folder: Path) -> None:
    """Raises ConfigError for the first host that cannot take part.

    folder: where ranks start. Every host is asked at once, before anything is started.
    """
    python = sys.executable
    # A machine is its boot and its container; a host name says neither.
    question = (
        f"cd '{folder}' || exit 3; test -x '{python}' || exit 4; "
        "cat /proc/sys/kernel/random/boot_id; readlink /proc/self/ns/pid"
    )
    machines: dict[str, str] = {}
    for host, answer in on_all(hosts, question).items():
        key = f"host {host}"
        if answer.returncode == _SILENT:
            said = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
            fix = f"see `ssh -o BatchMode=yes {host} hostname`: it must ask for nothing"
            raise ConfigError(key, f"ssh says: {said}", fix)
        fix = "put it on a file system that all hosts share, under the same path"
        refuse_if(answer.returncode == 3, key, f"{folder} is not there", fix)
        refuse_if(answer.returncode == 4, key, f"{python} is not there", fix)
        twin = machines.setdefault(answer.stdout, host)
        refuse_if(twin != host, key, f"is the same machine as {twin}", "name it once")


def meeting_point(host: str) -> tuple[str, int]:
    """An address of `host` that others reach, and a port that is free there."""
    script = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
    answer = ssh(host, f'{sys.executable} -c "{script}"; hostname -I')
    words = answer.stdout.split()
    if len(words) < 2:
        raise ConfigError(f"host {host}", f"has no address: {answer.stderr.strip()}")
    try:
        address = socket.gethostbyname(host)
    except OSError:  # a name of ssh's configuration
        address = words[1]
    return words[1] if address.startswith("127.") else address, int(words[0])


def runs(host: str, launch: str) -> bool:
    """Whether that host answers and a process of the launch is there."""
    return bool(ssh(host, f"grep -lszx {LAUNCH}={launch} /proc/[0-9]*/environ").stdout)


def end(hosts: Mapping[str, int], launch: str) -> list[str]:
    """Kills what a launch left on the hosts, and nothing else; returns hosts that do not answer."""
    command = (
        f"for e in $(grep -lszx {LAUNCH}={launch} /proc/[0-9]*/environ); do "
        'p=${e%/environ}; kill -KILL "${p#/proc/}" 2>/dev/null; done; true'
    )
    answers = on_all(hosts, command)
    return [host for host, answer in answers.items() if answer.returncode == _SILENT]
