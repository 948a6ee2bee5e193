"""YAML text and command-line overrides as one tree of values, each with its origin.

A tree is made of dicts (sections), lists of dicts (lists of sections) and `Given` leaves.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.kinds import alternatives, entry_type, is_text, kind_of
from gearshift.engine.config.schema import Config

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """A value as somebody wrote it, and where: a file's name or "command line"."""

    value: Any
    origin: str


def shown(node: Any) -> str:
    """A tree, a value or a leaf, short enough for an error message."""
    if isinstance(node, dict):
        return "a section"
    if isinstance(node, list) and node and isinstance(node[0], dict):
        return "a list of sections"
    text = repr(node.value if isinstance(node, Given) else node)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"{name} is given twice; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """The tree of a file; an empty file is an empty tree."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(path, "no such configuration file")
    tree = stamp(parse_yaml(file.read_bytes(), path), file.name)
    if isinstance(tree, Given) and tree.value is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(path, f"must hold sections such as `ppo:`, not {shown(tree)}")
    return tree


def parse_yaml(text: str | bytes, source: str) -> Any:
    """One YAML document; ConfigError names `source`, the line and the problem."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(source, f"not valid YAML: {' '.join(str(error).split())}") from None


def stamp(value: Any, origin: str) -> Any:
    """The tree of a parsed document."""
    if isinstance(value, dict):
        return {str(key): stamp(entry, origin) for key, entry in value.items()}
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return [stamp(entry, origin) for entry in value]
    return Given(value, origin)


def split_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """["--ppo.kl_coef", "0.1", "--run.steps=5"] -> [("ppo.kl_coef", "0.1"), ("run.steps", "5")]."""
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(argument, "expected --section.key VALUE")
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(
                    f"--{key}", "has no value", f"write --{key} VALUE or --{key}=VALUE"
                )
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def insert(tree: dict, key: str, text: str) -> None:
    """Puts one override into the tree, in place of what was given there."""
    kind, node = Config, tree
    *sections, last = key.split(".")
    for depth, part in enumerate(sections):
        kind = kind_of(kind, part, key)
        name = ".".join(sections[: depth + 1])
        node = _entry(node, part, name) if isinstance(node, list) else _opened(node, kind, name)
    kind = kind_of(kind, last, key)
    value = _parse_override(kind, text, key)
    if isinstance(node, list):
        _entry(node, last, key)
        node[int(last)] = value
    else:
        node[last] = value


def _parse_override(kind: Any, text: str, key: str) -> Any:
    # Text stays what the user typed: `--run.resume none`, or a system prompt with a colon.
    if is_text(kind):
        none = text == "null" and type(None) in alternatives(kind)
        return Given(None if none else text, COMMAND_LINE)
    return stamp(parse_yaml(text, f"--{key}"), COMMAND_LINE)


def _entry(node: list, part: str, name: str) -> Any:
    """Entry `part` of a list of sections; the entry after the last one is made."""
    if int(part) > len(node):
        raise ConfigError(name, f"there are {len(node)} entries, so the next is {len(node)}")
    if int(part) == len(node):
        node.append({})
    return node[int(part)]


def _opened(node: dict, kind: Any, name: str) -> Any:
    """The section or list `name` inside its parent `node`, made when nothing was given there."""
    part = name.split(".")[-1]
    given = node.get(part)
    if given is None or (isinstance(given, Given) and not given.value):
        node[part] = [] if entry_type(kind) else {}
    elif isinstance(given, Given):
        raise ConfigError(name, "expected a section of keys", value=shown(given))
    return node[part]
