"""What `gearshift doctor --hostfile` measures: GB/s of collectives, in each host and between two.

It starts the ranks that a launch would start. As a program it is one of them.
"""

import json
import os
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.rendezvous import HOSTS
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.plan.hardware import GB
from gearshift.launch import hosts as machines
from gearshift.launch.examine.machine import Finding

_MOST_SECONDS = 900  # of all hosts
_BYTES = {"gloo": 1 << 25, "nccl": 1 << 28}  # of all that a rank has after the collective
_REPEATS = 5
_SLOW = 0.5  # of the median of the same measurement elsewhere
_LOOK = (
    "iperf3 and ethtool for the link, nvidia-smi topo -m for GPUs, NCCL_DEBUG=INFO for its route"
)
_MARK = "gearshift network: "  # before what rank 0 measured


def examine(hosts: Mapping[str, int], start_timeout_s: float) -> Iterator[Finding]:
    """Runs the ranks of a launch on all hosts, and leaves nothing of them."""
    if sum(hosts.values()) < 2:
        return
    name = f"doctor-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    first, world = next(iter(hosts)), sum(hosts.values())
    try:
        address, port = machines.meeting_point(first)
        settings = machines.exports() | {machines.LAUNCH: name}
        settings |= {HOSTS: machines.told(hosts), "WORLD_SIZE": str(world)}
        settings |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        commands, before = dict[str, str](), 0
        for host, slots in hosts.items():
            commands[host] = _command(settings, before, slots, start_timeout_s)
            before += slots
        answers = machines.each(commands, _MOST_SECONDS)
    except ConfigError as error:
        yield Finding("network", "bad", error.mistake, error.fix or "")
        return
    finally:
        machines.end(hosts, name)
    lines = answers[first].stdout.splitlines()
    told = next((line for line in lines if line.startswith(_MARK)), None)
    if told is None:
        yield _failed([answer.stderr for answer in answers.values()])
        return
    text = f"all ranks of all hosts met at {address}, port {port}, and connected"
    yield Finding("ports", "ok", text)
    yield from judged(json.loads(told.removeprefix(_MARK)))


def _command(settings: Mapping[str, str], before: int, slots: int, timeout_s: float) -> str:
    """For a host's shell: its ranks, of which the first is rank `before` of all."""
    words = " ".join(f"{key}={shlex.quote(value)}" for key, value in settings.items())
    rank = f"{shlex.quote(sys.executable)} -m gearshift.launch.examine.network {timeout_s}"
    return (
        f"cd {shlex.quote(str(Path.cwd()))} && export {words} LOCAL_SIZE={slots}; "
        f"for i in $(seq 0 {slots - 1}); do "
        f"RANK=$(({before} + i)) LOCAL_RANK=$i {rank} & done; wait"
    )


def _failed(said: Sequence[str]) -> Finding:
    """The first mistake that a rank told, else the last line of any."""
    lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("gearshift: error: ")]
    problem, _, fix = (ours or lines[-1:] or ["nothing was said"])[0].partition("; ")
    fix = fix or "open all ports between the hosts, or export GLOO_SOCKET_IFNAME"
    return Finding("network", "bad", problem.removeprefix("gearshift: error: "), fix)


def judged(rates: Sequence[tuple[str, str, str, float]]) -> Iterator[Finding]:
    """A line for each place and backend; yellow where it is far below its like.

    rates: (a host or "a - b", backend, collective, bus bandwidth in GB/s).
    """
    alike, lines = defaultdict[tuple, list[float]](list), defaultdict[tuple, dict[str, float]](dict)
    for place, backend, collective, rate in rates:
        alike[" - " in place, backend, collective].append(rate)
        lines[place, backend][collective] = rate
    for (place, backend), found in lines.items():
        text = ", ".join(f"{collective} {rate:.3g} GB/s" for collective, rate in found.items())
        usual = {c: statistics.median(alike[" - " in place, backend, c]) for c in found}
        slow = [c for c, rate in found.items() if rate < _SLOW * usual[c]]
        if slow:
            text += f"; elsewhere {', '.join(f'{c} {usual[c]:.3g}' for c in slow)}"
        level = "warn" if slow else "ok"
        yield Finding(f"{place}: {backend}", level, text, _LOOK if slow else "")


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Each pair of `count` hosts once; the pairs of a round share no host (the circle method)."""
    places = [*range(count), *[-1] * (count % 2)]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        places.insert(1, places.pop())


def main(timeout_s: float) -> int:
    """One rank. Rank 0 prints what all have measured."""
    try:
        device = distributed.start(timeout_s=timeout_s)
    except ConfigError as error:
        print(f"gearshift: error: {error}", file=sys.stderr, flush=True)
        return 2
    places = [part.partition(":") for part in os.environ[HOSTS].split(",")]
    members, rank = dict[str, range](), 0
    for host, _, slots in places:
        members[host] = range(rank, rank + int(slots))
        rank += int(slots)
    plan = [[([*ranks], host) for host, ranks in members.items() if len(ranks) > 1]]
    names = list(members)
    for pairs in rounds(len(names)):
        both = [(names[a], names[b]) for a, b in pairs]
        plan.append([([*members[a], *members[b]], f"{a} - {b}") for a, b in both])
    found = []
    for backend in ("gloo", "nccl") if device.type == "cuda" else ("gloo",):
        where = device if backend == "nccl" else torch.device("cpu")
        for groups in plan:
            distributed.barrier()
            # Of one round all at once, since they share no host.
            for ranks, place in groups:
                if distributed.rank() in ranks:
                    group = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
                    found += [(place, backend, *rate) for rate in _measure(group, where, ranks)]
                    dist.destroy_process_group(group)
    told = distributed.all_gather_objects(found)
    if distributed.is_main():
        print(_MARK + json.dumps([rate for rates in told for rate in rates]), flush=True)
    distributed.barrier()
    distributed.stop()
    return 0


def _measure(
    group: dist.ProcessGroup, device: torch.device, ranks: Sequence[int]
) -> Iterator[tuple[str, float]]:
    """(collective, bus bandwidth in GB/s), on the group's first rank only.

    Bus bandwidth is what each link of a ring carries, as in nccl-tests' PERFORMANCE.md: for n ranks
    and B bytes, 2 (n - 1) / n B / t of an all-reduce, (n - 1) / n B / t of an all-gather.
    """
    n, backend = len(ranks), "nccl" if device.type == "cuda" else "gloo"
    whole = torch.zeros(_BYTES[backend] // 4 // n * n, device=device)
    mine, share = whole[: len(whole) // n].clone(), (n - 1) / n * whole.numel() * 4 / GB
    calls: tuple[tuple[str, float, Callable[[], object]], ...] = (
        ("all-reduce", 2 * share, lambda: dist.all_reduce(whole, group=group)),
        ("all-gather", share, lambda: dist.all_gather_into_tensor(whole, mine, group=group)),
    )
    for name, moved, call in calls:
        seconds = statistics.median(
            [_seconds(call, group, device) for _ in range(_REPEATS + 1)][1:]
        )
        if distributed.rank() == ranks[0]:
            yield name, moved / seconds


def _seconds(call: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> float:
    dist.barrier(group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
