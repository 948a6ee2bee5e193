"""The `gearshift` command: one module per command, imported only when it is called.

A command's module has `add_arguments(parser)` and `main(args) -> int`. Exit status: 0 done, 2 the
user's mistake (one line on stderr), 1 a fault (with its traceback). GEARSHIFT_TRACEBACK=1 shows the
traceback of a mistake, too.
"""

import argparse
import importlib
import logging
import os
import sys
from importlib.metadata import version
from typing import Any

from gearshift.engine.config.errors import did_you_mean

COMMANDS = {
    "demo": ("gearshift.launch.commands.demo", "fetch a small model and train it: PPO in minutes"),
    "launch": ("gearshift.launch.commands.launch", "start a job on many hosts, and see it through"),
    "critic": ("gearshift.launch.commands.critic", "train the critic alone, before a run"),
    "doctor": (
        "gearshift.launch.commands.doctor",
        "examine this machine, each problem with its fix",
    ),
    "plan": ("gearshift.launch.commands.plan", "memory and seconds of a run before it starts"),
    "profile": ("gearshift.launch.commands.profile", "where the time of one PPO step goes"),
    "fetch": ("gearshift.launch.commands.fetch", "bring the models and texts of recipes and demos"),
    "evaluate": ("gearshift.launch.commands.evaluate", "figures of a model on held-out prompts"),
    "generate": ("gearshift.launch.commands.generate", "sample from an exported model"),
    "export": ("gearshift.launch.commands.export", "a checkpoint as Hugging Face directories"),
    "report": ("gearshift.launch.report.page", "write a run folder's report.html"),
    "bench": ("gearshift.launch.commands.bench", "measure a step, generation, shifts, kernels"),
    "config-docs": ("gearshift.launch.docs.config", "write docs/config.md from the configuration"),
}


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gearshift COMMAND [arguments]",
            "",
            "PPO for large language models on DeepSpeed.",
            "Training is started with: deepspeed launch/train.py --config FILE",
            "",
            *lines,
            "",
            "gearshift COMMAND --help explains a command.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(f"gearshift {version('gearshift')}")
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS, f"there are {', '.join(COMMANDS)}")
        return fail(f"{argv[0]}: no such command; {hint}")
    return run(argv[0], argv[1:])


def run(command: str, argv: list[str]) -> int:
    logging.disable(logging.WARNING)  # libraries warn of a missing GPU when they are imported
    module = importlib.import_module(COMMANDS[command][0])
    logging.disable(logging.NOTSET)
    args = parsed(module, f"gearshift {command}", argv)
    try:
        return module.main(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("GEARSHIFT_TRACEBACK"):
            raise
        return fail(" ".join(str(error).split("\n")))
    except KeyboardInterrupt:
        return 130


def parsed(module: Any, command: str, argv: list[str]) -> argparse.Namespace:
    """The arguments of a module with the interface of a command."""
    parser = argparse.ArgumentParser(
        command,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --run is a mistake, not --runs
    )
    module.add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args:  # a command that passes --section.key VALUE on
        args.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def fail(message: str) -> int:
    print(f"gearshift: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
