"""Examine this machine before a job is queued for it: each problem with its fix.

Give the job's YAML to examine its run folder, disks and attention, too. Any key can be overridden:
--run.dir /scratch/run. With a hostfile every host is examined, and compared with the first.
Exit status: 0 nothing is red, 1 something is, 2 a mistake.
"""

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from gearshift.engine.config import load as config_load
from gearshift.engine.config.schema import Config
from gearshift.launch.console import stdout_for_the_answer
from gearshift.launch.examine.machine import MACHINE, Finding
from gearshift.launch.train import quiet_libraries

_MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "bad": ("BAD ", "bold red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(overrides=[])  # what is not named below, as --section.key value
    parser.add_argument("--config", metavar="FILE", help="the job's YAML")
    parser.add_argument("--hostfile", metavar="FILE", help="examine every host of a launch, by ssh")
    parser.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)  # of one such host
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def main(args: argparse.Namespace) -> int:
    with stdout_for_the_answer(args.facts or args.json):
        findings, config = examine(args.config, args.overrides, args.hostfile)
    if args.facts:
        from gearshift.launch.examine import hosts

        print(hosts.as_json(findings, config))
    elif args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    return 1 if any(finding.level == "bad" for finding in findings) else 0


def examine(
    path: str | None, overrides: list[str], hostfile: str | None = None
) -> tuple[list[Finding], Config | None]:
    """Everything that was looked at. Raises ValueError for a wrong configuration."""
    config = config_load.load(path, overrides).config if path or overrides else None
    if hostfile:
        quiet_libraries()
        from gearshift.launch.examine import hosts

        words = ["--config", path, *overrides] if path else overrides
        return list(hosts.examine(hostfile, config, words)), config
    findings = [finding for check in MACHINE for finding in check()]
    if config:
        quiet_libraries()
        from gearshift.launch.examine import (
            job as doctor_job,  # reads models: after the libraries were quieted
        )

        findings += doctor_job.examine(config)
    return findings, config


def show(findings: list[Finding], console: Console | None = None) -> None:
    """A line each, and the fix below what is not green."""
    console = console or Console(highlight=False, soft_wrap=True)
    for finding in findings:
        mark, style = _MARKS[finding.level]
        console.print(Text(mark, style), Text(f"{finding.name}: {finding.text}"))
        if finding.fix:
            console.print(Text(f"     -> {finding.fix}", style))
    counts = {level: sum(f.level == level for f in findings) for level in _MARKS}
    console.print(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['bad']} to fix")
