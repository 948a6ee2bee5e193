"""What `gearshift doctor --hostfile` looks at: each host, what must be the same, the network."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from gearshift.engine.config.schema import Config, RunConfig
from gearshift.engine.log.run_log import nearest_existing
from gearshift.launch import alike
from gearshift.launch import hosts as machines
from gearshift.launch.examine import network
from gearshift.launch.examine.machine import Finding, free

_MOST_SECONDS = 600  # a first import of the libraries on a busy network disk
_CLOCK_S = 2.0  # run.save_by and the order of logs want no better


def facts(config: Config | None) -> dict[str, Any]:
    """What a host says of itself; `examine` compares it."""
    same = alike.programs() | (alike.settings(config) if config else {})
    place = Path(config.run.dir if config else ".")
    gpus = torch.cuda.device_count()
    return {"same": same, "gpus": gpus, "free": free(place), "time": time.time()}


def examine(hostfile: str, config: Config | None, words: list[str]) -> Iterator[Finding]:
    """words: of this command, for every host. Raises ConfigError where a host cannot be asked."""
    hosts = machines.read(hostfile)
    machines.look(hosts, Path.cwd())
    yield Finding("hosts", "ok", f"{', '.join(hosts)} answer, and are different machines")
    if config:
        yield _folder(hosts, config)
    words = [sys.executable, "-m", "gearshift.launch.cli", "doctor", "--facts", *words]
    command = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"
    begun = time.time()
    answers = machines.on_all(hosts, command, _MOST_SECONDS)
    spoke: dict[str, Any] = {}
    for host, answer in answers.items():
        try:
            told = json.loads(answer.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            said = (answer.stderr.strip().splitlines() or ["nothing"])[-1]
            yield Finding(host, "bad", f"said {said}", f"ssh {host} '{command}'")
            continue
        yield from _alone(host, hosts[host], told, (begun, time.time()))
        spoke[host] = told
        first = next(iter(spoke))
        yield _beside(spoke[first] | {"host": first}, host, told)
        yield Finding(f"{host}: free", "ok", told["free"])
    if len(spoke) == len(hosts):
        yield from network.examine(hosts, (config.run if config else RunConfig()).start_timeout_s)


def _alone(
    host: str, slots: int, told: Mapping[str, Any], between: tuple[float, float]
) -> Iterator[Finding]:
    """Its own red and yellow lines, and what the hostfile and our clock say of it."""
    for finding in told["findings"]:
        if finding["level"] != "ok":
            yield Finding(**finding | {"name": f"{host}: {finding['name']}"})
    gpus = told["gpus"]
    if gpus and gpus != slots:
        fix = f"write {host} slots={gpus}" if gpus < slots else "or leave them idle"
        level = "bad" if gpus < slots else "warn"
        yield Finding(f"{host}: slots", level, f"{slots} in the hostfile, {gpus} GPUs", fix)
    early, late = between[0] - told["time"], told["time"] - between[1]
    if max(early, late) > _CLOCK_S:
        fix = "set the clocks by NTP, as with chrony"
        yield Finding(f"{host}: clock", "warn", f"{max(early, late):.0f} s from ours", fix)


def _beside(first: Mapping[str, Any], host: str, told: Mapping[str, Any]) -> Finding:
    differing = alike.difference(first["host"], first["same"], host, told["same"])
    if differing is None:
        return Finding(host, "ok", f"settings, code and versions as on {first['host']}")
    return Finding(f"{host}: {differing[0]}", "bad", differing[1], alike.FIX)


def _folder(hosts: Mapping[str, int], config: Config) -> Finding:
    """Whether every host sees a file that is written here."""
    place = nearest_existing(Path(config.run.dir)).absolute()
    token = place / f".gearshift-{uuid4().hex}"
    try:
        token.touch()
        answers = machines.on_all(hosts, f"ls {shlex.quote(str(token))}")
    except OSError as error:
        return Finding("run folder", "bad", f"{place}: {error.strerror}", "choose another run.dir")
    finally:
        token.unlink(missing_ok=True)
    blind = [host for host, answer in answers.items() if answer.returncode]
    if blind:
        fix = "run.dir: a folder of a file system that all hosts share"
        return Finding("run folder", "bad", f"{', '.join(blind)} do not see {place}", fix)
    return Finding("run folder", "ok", f"all hosts see {place}")


def as_json(findings: list[Finding], config: Config | None) -> str:
    """One line, of one host, for `examine`."""
    return json.dumps(facts(config) | {"findings": [asdict(finding) for finding in findings]})
