"""YAML file + dotted overrides -> Config, and where each value came from.

Precedence: default < file < command line. Relative paths in a file are relative to the current
directory, not to the file's.
"""

import difflib
import math
import re
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.kinds import (
    alternatives,
    described,
    entry_type,
    is_text,
    unknown_key,
)
from gearshift.engine.config.schema import Config
from gearshift.engine.config.tree import Given, insert, read_yaml, shown, split_overrides

DEFAULT = "default"


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
    tree = read_yaml(path) if path is not None else {}
    for key, text in split_overrides(overrides):
        insert(tree, key, text)
    origin: dict[str, str] = {}
    return Resolved(_section(Config, tree, "", origin), origin)


def _section(kind: type, node: Any, key: str, origin: dict[str, str]) -> Any:
    node = {} if isinstance(node, Given) and node.value is None else node
    if not isinstance(node, dict):
        raise ConfigError(key, "expected a section of keys", value=shown(node))
    known = {entry.name: entry for entry in fields(kind)}
    for name in node:
        if name not in known:
            raise unknown_key(_join(key, name))
    values = {
        name: _value(entry, node.get(name, MISSING), _join(key, name), origin)
        for name, entry in known.items()
    }
    try:
        return kind(**values)
    except ConfigError as error:  # a bound: it names its field, we add the section
        raise error.under(key) from None


def _value(entry: Field, node: Any, key: str, origin: dict[str, str]) -> Any:
    if is_dataclass(entry.type):
        return _section(entry.type, {} if node is MISSING else node, key, origin)
    if node is MISSING:
        origin[key] = DEFAULT
        return entry.default if entry.default is not MISSING else entry.default_factory()
    if entry_type(entry.type) and not isinstance(node, Given):
        return _entries(entry.type, node, key, origin)
    if not isinstance(node, Given):
        raise ConfigError(key, f"expected {described(entry.type)}", value=shown(node))
    origin[key] = node.origin
    if entry_type(entry.type) and not node.value:  # `rewards:` or `rewards: []`
        return []
    return _leaf(entry.type, node.value, key)


def _entries(kind: Any, node: Any, key: str, origin: dict[str, str]) -> list:
    if not isinstance(node, list):
        raise ConfigError(key, f"expected {described(kind)}", value=shown(node))
    return [_section(entry_type(kind), item, f"{key}.{i}", origin) for i, item in enumerate(node)]


def _leaf(kind: Any, value: Any, key: str) -> Any:
    for option in alternatives(kind):
        fitting = _fit(option, value)
        if fitting is not MISSING:
            return fitting
    raise ConfigError(key, f"expected {described(kind)}", _hint(kind, value), shown(value))


def _fit(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, or MISSING when it is none."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else MISSING
    if get_origin(kind) is list:
        whole = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return value if whole and not entry_type(kind) else MISSING
    if kind is float:
        return _number(value)
    exact = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return value if exact else MISSING


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 reads 1e-6, which has no point, as text
        except ValueError:
            return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return MISSING
    return float(value)


def _hint(kind: Any, value: Any) -> str:
    if get_origin(kind) is Literal and isinstance(value, str):
        near = difflib.get_close_matches(value, get_args(kind), n=1)
        return f"did you mean {near[0]}?" if near else ""
    # YAML reads `off` and `no` as false, and 7 as a number.
    return "put it in quotes" if is_text(kind) and isinstance(value, (bool, int, float)) else ""


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def dump(resolved: Resolved) -> str:
    """YAML of every value, its origin as a comment; `load` reads it back to an equal Config."""
    lines = ["# Every value of this run, and where it came from."]
    _dump_section(resolved.config, "", "", resolved.origin, lines)
    return "\n".join(lines) + "\n"


def _dump_section(config: Any, key: str, indent: str, origin: dict, lines: list[str]) -> None:
    for entry in fields(config):
        value, name = getattr(config, entry.name), _join(key, entry.name)
        if is_dataclass(value):
            lines.append(f"{indent}{entry.name}:")
            _dump_section(value, name, f"{indent}  ", origin, lines)
        elif entry_type(entry.type) and value:
            lines.append(f"{indent}{entry.name}:")
            for i, item in enumerate(value):
                start = len(lines)
                _dump_section(item, f"{name}.{i}", f"{indent}    ", origin, lines)
                lines[start] = f"{indent}  - {lines[start].lstrip()}"
        else:
            lines.append(f"{f'{indent}{entry.name}: {_scalar(value)}':<47} # {origin[name]}")


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./][\w./-]*", value, re.ASCII):
        return yaml.safe_dump(value, default_style='"', width=math.inf).strip()
    return yaml.safe_dump(value, width=math.inf).split("\n")[0]
