"""YAML file + dotted overrides -> Config, where each value came from, and all of it as YAML again.

Precedence: default < file < command line. Relative paths in a file are relative to the current
directory, not to the file's.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.keys import (
    alternatives,
    described,
    entry_type,
    is_text,
    kind_of,
    shown,
    unknown_key,
)
from gearshift.engine.config.schema import Config


@dataclass(frozen=True)
class Resolved:
    """A configuration and, by full key, the origin of each of its values.

    origin: "default", the name of the YAML file, or "command line".
    """

    config: Config
    origin: dict[str, str]


def load(path: str | None, overrides: list[str]) -> Resolved:
    """Reads a YAML file (None: defaults only), then applies `--section.key value` overrides.

    overrides: `--key value` or `--key=value`; an entry of a list is `--rewards.0.weight 2`, a whole
    list is YAML: `--run.trackers "[tensorboard]"`. Raises ConfigError.
    """
    tree = _read(path) if path is not None else {}
    typed = _split(overrides)
    for key, text in typed:
        _insert(tree, key, text)
    config = Config(**tree)

    def origin(key: str) -> str:
        if not _is_given(tree, key):
            return "default"
        on_command_line = any(f"{key}.".startswith(f"{start}.") for start, _ in typed)
        return "command line" if on_command_line or path is None else Path(path).name

    return Resolved(config, {key: origin(key) for key, _ in _values(config)})


def _is_given(tree: Any, key: str) -> bool:
    *sections, last = key.split(".")
    for part in sections:
        tree = (tree[int(part)] if isinstance(tree, list) else tree.get(part)) or {}
    return last in tree


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its full key, in the order of the schema."""
    for entry in fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            yield from _values(value, f"{key}.")
        elif entry_type(entry.type) and value:
            for index, item in enumerate(value):
                yield from _values(item, f"{key}.{index}.")
        else:
            yield key, value


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


def _read(path: str) -> dict:
    """The sections of a file; an empty file has none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(path, "no such configuration file")
    tree = _parse(file.read_bytes(), path)
    if not isinstance(tree, dict | None):
        raise ConfigError(path, f"must hold sections such as `ppo:`, not {shown(tree)}")
    return tree or {}


def _parse(text: str | bytes, source: str) -> Any:
    """One YAML document; ConfigError names `source`, the line and the problem."""
    try:
        return _own(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise ConfigError(source, f"not valid YAML: {' '.join(str(error).split())}") from None


def _own(value: Any) -> Any:
    """A copy whose keys are text, and where an anchor's places do not share what overrides fill."""
    if isinstance(value, dict):
        return {str(key): _own(entry) for key, entry in value.items()}
    return [_own(entry) for entry in value] if isinstance(value, list) else value


def _split(arguments: list[str]) -> list[tuple[str, str]]:
    """["--ppo.kl_coef", "0.1", "--run.steps=5"] -> [("ppo.kl_coef", "0.1"), ("run.steps", "5")]."""
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(argument, "expected --section.key VALUE")
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                fix = f"write --{key} VALUE or --{key}=VALUE"
                raise ConfigError(f"--{key}", "has no value", fix)
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def _insert(tree: dict, key: str, text: str) -> None:
    """Puts one override into the tree, in place of what was given there."""
    parts = key.split(".")
    kinds = list(accumulate(parts, kind_of, initial=Config))
    if kinds[-1] is None:
        raise unknown_key(Config, key)
    node: Any = tree
    for depth, part in enumerate(parts[:-1], start=1):
        node = _inside(node, part, kinds[depth], ".".join(parts[:depth]))
    value = _override(kinds[-1], text, key)
    if is_dataclass(kinds[-1]) and not isinstance(value, dict):
        if value is not None:
            raise ConfigError(key, f"expected {described(kinds[-1])}", value=shown(value))
        value = {}
    node[_slot(node, parts[-1], key)] = value


def _override(kind: Any, text: str, key: str) -> Any:
    # Text stays what the user typed: `--run.resume none`, or a system prompt with a colon.
    if not is_text(kind):
        return _parse(text, f"--{key}")
    return None if text == "null" and type(None) in alternatives(kind) else text


def _inside(node: Any, part: str, kind: Any, name: str) -> Any:
    """The section or list `name` inside `node`, made when nothing was given there."""
    slot, wanted = _slot(node, part, name), list if entry_type(kind) else dict
    if not (node[slot] if isinstance(node, list) else node.get(part)):
        node[slot] = wanted()
    if not isinstance(node[slot], wanted):
        raise ConfigError(name, f"expected {described(kind)}", value=shown(node[slot]))
    return node[slot]


def _slot(node: dict | list, part: str, name: str) -> Any:
    """Where `part` is in `node`; the entry after a list's last one is made."""
    if isinstance(node, dict):
        return part
    if int(part) > len(node):
        raise ConfigError(name, f"there are {len(node)} entries, so the next is {len(node)}")
    node += [{}] if int(part) == len(node) else []
    return int(part)


def dump(resolved: Resolved) -> str:
    """YAML of every value, its origin as a comment; `load` reads it back to an equal Config."""
    lines, before = ["# Every value of this run, and where it came from."], list[str]()
    for key, value in _values(resolved.config):
        *sections, name = key.split(".")
        indent = "  " * len(sections)
        for depth in range(len(sections)):
            if sections[: depth + 1] == before[: depth + 1]:
                continue
            if sections[depth].isdecimal():
                indent = f"{indent[2:]}- "
            else:
                lines.append(f"{'  ' * depth}{sections[depth]}:")
        text = f"{indent}{name}: {_scalar(value)}"
        lines.append(f"{text:<47} # {resolved.origin[key]}")
        before = sections
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_scalar(name)}: {_scalar(v)}' for name, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./][\w./-]*", value, re.ASCII):
        return yaml.safe_dump(value, default_style='"', width=math.inf).strip()
    return yaml.safe_dump(value, width=math.inf).split("\n")[0]
