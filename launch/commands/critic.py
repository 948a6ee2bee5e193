"""Train the critic alone, on responses of the policy as it is, and save it for a run to start from.

Takes the configuration of that run: its policy, prompts, rewards and lengths. Ends when its
explained variance has stopped rising (critic.patience), or after run.steps; RUN_DIR/export/critic
is then what `critic.path` of the run takes. On several GPUs or hosts it is a task of the main job:
`deepspeed launch/train.py --config FILE --run.task critic --run.dir RUN_DIR`.
"""

import argparse
import atexit

from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError
from gearshift.launch import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False
    parser.set_defaults(overrides=[])  # as --section.key value
    parser.add_argument("--config", metavar="FILE", help="the run's YAML")


def main(args: argparse.Namespace) -> int:
    if args.config is None and not args.overrides:
        raise ConfigError("--config", "missing", "give a run's YAML")
    named = ["--config", args.config] if args.config else []
    status = train.main([*named, *args.overrides, "--run.task", "critic"])
    if status == 0:
        atexit.register(distributed.stop)
    return status
