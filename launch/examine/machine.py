"""What `gearshift doctor` looks at on any machine: versions, compilers, devices, ports, caches."""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement

from gearshift.engine.cluster.rendezvous import free_port
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.log.run_log import nearest_existing
from gearshift.engine.plan.hardware import GB
from gearshift.kernels.checks.self_check import self_check
from gearshift.launch.hosts import environment_files, variables

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_PORT = 29500  # of deepspeed and torchrun
_SHM_GB = 1.0  # NCCL keeps a few MB per pair of ranks there; a container's default is 64 MB
_MEMORY_FREE = 0.7  # of a host's memory; what is more is another program's
_CACHE_GB = 1.0  # compiled kernels and operators of one run are some 100 MB
_NETWORK_DISKS = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse.sshfs"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at; a fix where it is not ok."""

    name: str
    level: Literal["ok", "warn", "bad"]
    text: str
    fix: str = ""


def versions() -> Iterator[Finding]:
    """Python and the libraries against what pyproject.toml asks for."""
    yield Finding("python", "ok", ".".join(map(str, sys.version_info[:3])))
    for text in metadata.requires("gearshift") or []:
        wanted = Requirement(text)
        named = wanted.name == "triton" and sys.platform == "linux"  # Triton comes with CUDA torch
        if wanted.marker and not named:
            continue
        yield _version(wanted)


def _version(wanted: Requirement) -> Finding:
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        if wanted.name == "triton" and not torch.cuda.is_available():
            return Finding("triton", "ok", "not installed; only GPUs need it")
        return Finding(wanted.name, "bad", "not installed", f"pip install '{wanted}'")
    if wanted.specifier.contains(found, prereleases=True):
        return Finding(wanted.name, "ok", found)
    return Finding(wanted.name, "bad", f"{found}, needs {wanted}", f"pip install '{wanted}'")


def free(place: Path) -> str:
    """Memory, and the disk that holds `place`."""
    place = nearest_existing(place).absolute()
    disk = shutil.disk_usage(place).free / GB
    return f"{psutil.virtual_memory().available / GB:.1f} GB of memory, {disk:.1f} GB at {place}"


def devices() -> Iterator[Finding]:
    """GPUs that torch can use, and what is there without it."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} cores, {memory.total / GB:.0f} GB of memory, {memory.available / GB:.0f} free"
    yield Finding("host", "ok", text)
    if memory.available < _MEMORY_FREE * memory.total:
        fix = "`ps -e --sort=-rss -o rss,pid,user,args | head` shows whose; end what is left over"
        yield Finding("memory", "warn", f"{text}; a plan counts on all of it", fix)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            size = f"{properties.total_memory / GB:.0f} GB"
            text = f"{properties.name}, {size}, sm_{properties.major}{properties.minor}"
            yield Finding(f"gpu {i}", "ok", text)
    elif shutil.which("nvidia-smi") is None:
        yield Finding("gpu", "warn", "none; models run on the CPU", "fine for a demo")
    else:
        built = torch.version.cuda or "no CUDA"
        fix = "install the torch build of the driver's CUDA version (nvidia-smi shows it)"
        yield Finding("gpu", "bad", f"there is a driver, but torch ({built}) sees no GPU", fix)


def compilers() -> Iterator[Finding]:
    """What Triton's launchers and DeepSpeed's own operators are compiled with."""
    if torch.cuda.is_available():
        yield _tool("cc", "bad", "Triton compiles its launchers with it", "gcc")
    for tool, package in (("c++", "g++"), ("ninja", "ninja")):
        yield _tool(tool, "warn", "DeepSpeed compiles optimizer offload with it", package)
    if torch.version.cuda:
        yield _nvcc(torch.version.cuda)


def _tool(tool: str, level: Literal["warn", "bad"], need: str, package: str) -> Finding:
    found = shutil.which(tool)
    if found:
        return Finding(tool, "ok", found)
    return Finding(tool, level, f"missing; {need}", f"install {package}")


def _nvcc(built: str) -> Finding:
    """DeepSpeed refuses to compile where nvcc's major version is not torch's."""
    home = os.environ.get("CUDA_HOME")
    tool = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    if not shutil.which(tool):
        text = "missing; only optimizer offload and NVMe need it"
        return Finding("nvcc", "warn", text, f"install CUDA {built}'s toolkit, set CUDA_HOME")
    printed = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    version = found.group(1) if found else "of an unknown version"
    if version == built:
        return Finding("nvcc", "ok", f"{version}, as torch")
    same_major = version.split(".")[0] == built.split(".")[0]
    fix = f"set CUDA_HOME to CUDA {built}, or export DS_SKIP_CUDA_CHECK=1 for a minor mismatch"
    return Finding("nvcc", "warn" if same_major else "bad", f"{version}, torch has {built}", fix)


def kernels() -> Iterator[Finding]:
    """Our ops on this GPU against float64."""
    if not torch.cuda.is_available():
        yield Finding("kernels", "ok", "PyTorch backends (no GPU)")
        return
    try:
        checked = self_check(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        fix = "export GEARSHIFT_KERNELS=torch trains without Triton kernels, slower"
        yield Finding("kernels", "bad", str(error), fix)
        return
    yield Finding("kernels", "ok", checked or "not checked: switched off by the environment")


def shadows() -> Iterator[Finding]:
    """A regular package `kernels` of ours on the path would break `import transformers`."""
    spec = PathFinder.find_spec("kernels")
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    if origin and ROOT in origin.parents and "site-packages" not in origin.parts:
        fix = f"delete {origin}: the folder must have no __init__.py"
        yield Finding("name kernels", "bad", f"{origin} hides Hugging Face's kernels", fix)
    else:
        yield Finding("name kernels", "ok", "not hidden by ours")


def launcher() -> Iterator[Finding]:
    """What `deepspeed` trips over before our code runs."""
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", DEFAULT_PORT)) == 0
    if taken:
        fix = f"deepspeed --master_port {free_port()} launch/train.py ..."
        yield Finding("port", "warn", f"{DEFAULT_PORT} is another job's", fix)
    else:
        yield Finding("port", "ok", f"{DEFAULT_PORT} is free")
    for path in environment_files():
        try:
            variables(path)
        except ConfigError as error:
            yield Finding("launcher's variables", "bad", f"{path} stops deepspeed", str(error))
        else:
            yield Finding("launcher's variables", "ok", str(path))


def limits() -> Iterator[Finding]:
    """Shared and pinned memory."""
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total / GB if shm.is_dir() else 0.0
    if size >= _SHM_GB:
        yield Finding("/dev/shm", "ok", f"{size:.1f} GB")
    else:
        yield Finding(
            "/dev/shm", "bad", f"{size:.2f} GB", "docker run --shm-size=16g, or --ipc=host"
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if torch.cuda.is_available() and locked != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited (InfiniBand registers memory)"
        yield Finding("locked memory", "warn", f"limited to {locked / GB:.2f} GB", fix)


def caches() -> Iterator[Finding]:
    """Compiled kernels: on a network disk, ranks of all nodes wait for each other's locks."""
    places = {"TRITON_CACHE_DIR": "~/.triton", "TORCH_EXTENSIONS_DIR": "~/.cache/torch_extensions"}
    for variable, usual in places.items():
        folder = Path(os.environ.get(variable, usual)).expanduser()
        kind, space = filesystem(folder), shutil.disk_usage(nearest_existing(folder)).free / GB
        if space < _CACHE_GB:
            fix = f"free some, or export {variable} to a folder on another local disk"
            yield Finding("cache", "bad", f"{folder} has {space:.2f} GB free", fix)
            continue
        if kind in _NETWORK_DISKS:
            text = f"{folder} is on {kind}"
            yield Finding("cache", "warn", text, f"export {variable} to a folder on a local disk")
        else:
            yield Finding("cache", "ok", f"{folder} ({kind}, {space:.0f} GB free)")


def filesystem(path: Path) -> str:
    """The type of the file system that holds `path`."""
    place = nearest_existing(path).resolve()
    mounts = {Path(m.mountpoint): m.fstype for m in psutil.disk_partitions(all=True)}
    return next((mounts[p] for p in (place, *place.parents) if p in mounts), "unknown")


MACHINE: tuple[Callable[[], Iterator[Finding]], ...] = (
    versions,
    devices,
    compilers,
    kernels,
    shadows,
    launcher,
    limits,
    caches,
)
