"""How ranks find each other: within a time, or it is said who is missing and what to look at."""

import importlib
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gearshift.engine.config.errors import ConfigError, refuse_if

# Set by `gearshift launch`: "n0:8,n1:8", the hosts in the order of their ranks.
HOSTS = "GEARSHIFT_HOSTS"
_POLL_S = 0.1

_store: dist.Store | None = None  # that ranks met at


def join(backend: str, timeout_s: float, slot: str) -> None:
    """Makes the process group, and DeepSpeed's of it; raises ConfigError after `timeout_s`.

    slot: LOCAL_RANK as the launcher gave it.
    """
    global _store
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deadline = time.monotonic() + timeout_s
    _store = store = _open(rank, size, timeout_s, deadline)
    store.set(f"rank/{rank}", json.dumps(_about_me(backend, slot)))
    store.add("here", 1)
    try:
        while store.add("here", 0) < size:
            if time.monotonic() > deadline:
                raise _missing(store, size, timeout_s)
            time.sleep(_POLL_S)
        check([json.loads(store.get(f"rank/{rank}")) for rank in range(size)])
    except dist.DistError:
        problem, fix = "rank 0 has left", "see what it printed"
        raise ConfigError("MASTER_ADDR", problem, fix, os.environ["MASTER_ADDR"]) from None
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    # On CPU DeepSpeed would compile an all-reduce that only its own inference layers call: minutes
    # on the first run of a machine, and a line of output per rank on every other.
    backend_module: Any = importlib.import_module("deepspeed.comm.torch")
    backend_module.build_shm_op = lambda: None
    late = threading.Timer(max(1.0, deadline - time.monotonic()), _give_up, [timeout_s])
    late.daemon = True
    late.start()
    store.set_timeout(default_pg_timeout)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=default_pg_timeout
    )
    late.cancel()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def another_tells() -> bool:
    """Whether rank 0 is gone, so that it has told this mistake or the one that led to it.

    Before ranks have met, the first of each host tells.
    """
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") != "0"
    try:
        return not _store.check(["here"])
    except dist.DistError:
        return True


def _open(rank: int, size: int, timeout_s: float, deadline: float) -> dist.TCPStore:
    """Held by rank 0, or by torchrun."""
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = rank == 0 and not held
    if not master:
        _reach(place, port, timeout_s, deadline)
    try:
        return dist.TCPStore(
            place, port, size, master, timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        problem = "another job on this machine has that port"
        fix = "choose a free one, as deepspeed --master_port 29600 ..."
        raise ConfigError("MASTER_PORT", problem, fix, port) from None


def _reach(place: str, port: int, timeout_s: float, deadline: float) -> None:
    """Returns when somebody listens there. TCPStore alone would wait longer, and in many lines."""
    here = socket.gethostname()
    while True:
        try:
            with socket.create_connection((place, port), timeout=5):
                return
        except socket.gaierror:
            problem = f"{here} does not know this name"
            fix = "use an address, or a name that every host resolves"
            raise ConfigError("MASTER_ADDR", problem, fix, place) from None
        except OSError as error:
            if time.monotonic() > deadline:
                problem = f"no answer to {here} on port {port} in {timeout_s:g} s ({error})"
                fix = "see what rank 0 printed there and whether the port is open"
                raise ConfigError("MASTER_ADDR", problem, fix, place) from None
        time.sleep(_POLL_S)


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def machine() -> tuple[str, str]:
    """This machine, and the namespace of its processes: containers of one host may share its name,
    but a process number of one means another process, or none, in the next."""
    with suppress(OSError):
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), ""


def _about_me(backend: str, slot: str) -> dict[str, str]:
    (host, space), address = machine(), ""
    with suppress(OSError):
        address = socket.gethostbyname(host)
    return {"host": host, "space": space, "slot": slot, "backend": backend, "address": address}


def check(ranks: list[dict[str, str]]) -> None:
    """What is wrong with the ranks that came, by what each says of itself; raises ConfigError."""
    first, places = ranks[0], dict[tuple, int]()
    for rank, mine in enumerate(ranks):
        if mine["backend"] != first["backend"]:
            problem = f"{mine['host']} has {mine['backend']}, {first['host']} {first['backend']}"
            fix = "see nvidia-smi and torch.cuda.is_available() where there is no nccl"
            raise ConfigError("", f"hosts do not all have GPUs: {problem}", fix)
        twin = places.setdefault((mine["host"], mine["space"], mine["slot"]), rank)
        problem = f"ranks {twin} and {rank} are both local rank {mine['slot']} of {mine['host']}"
        fix = "name each machine once in the hostfile"
        refuse_if(twin != rank, "", problem, fix)
    alone = len({mine["host"] for mine in ranks}) == 1
    if alone or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for mine in ranks:
        wrong = not mine["address"] or mine["address"].startswith("127.")
        problem = f"its own name means {mine['address'] or 'nothing'} there: others cannot reach it"
        fix = "mend its /etc/hosts, or export GLOO_SOCKET_IFNAME on every host"
        refuse_if(wrong, f"host {mine['host']}", problem, fix)


def _missing(store: dist.Store, size: int, timeout_s: float) -> ConfigError:
    came = {rank for rank in range(size) if store.check([f"rank/{rank}"])}
    gone = sorted(set(range(size)) - came)
    hosts = sorted({json.loads(store.get(f"rank/{rank}"))["host"] for rank in came})
    wanted = [part.partition(":") for part in os.environ.get(HOSTS, "").split(",") if part]
    places = [host for host, _, slots in wanted for _ in range(int(slots))]
    named = sorted({places[rank] for rank in gone}) if len(places) == size else []
    who = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
    who += f" of {', '.join(named)}" if named else ""
    problem = f"{who} did not come in {timeout_s:g} s; {len(came)} did, of {', '.join(hosts)}"
    return ConfigError("", problem, "see what they printed; run.start_timeout_s waits longer")


def _give_up(timeout_s: float) -> None:
    """In a thread: making the group cannot be interrupted."""
    told = f"{socket.gethostname()}: ranks met, but did not connect in {timeout_s:g} s; open all "
    told += "ports between the hosts, or export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    with suppress(OSError):
        print(f"gearshift: error: {told}", file=sys.stderr, flush=True)
    os._exit(2)
