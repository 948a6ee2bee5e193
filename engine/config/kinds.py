"""What keys a configuration has and how their types are told to the user."""

import difflib
import types
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import Config


def alternatives(kind: Any) -> tuple:
    """float | None -> (float, NoneType); any other type -> (type,)."""
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def entry_type(kind: Any) -> type | None:
    """The dataclass D of a list[D], None for any other type."""
    inner = get_args(kind)
    return inner[0] if get_origin(kind) is list and is_dataclass(inner[0]) else None


def is_text(kind: Any) -> bool:
    """Whether values of this type are strings."""
    return get_origin(kind) is Literal or str in alternatives(kind)


def described(kind: Any) -> str:
    """A type in the user's words."""
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if entry_type(kind):
        return "a list of sections, each after a `- `"
    if get_origin(kind) is list:
        return "a list of strings, as [a, b]"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}
    return " or ".join(names.get(option, "null") for option in alternatives(kind))


def leaves(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every key there is, with its field; entries of a list of sections have the index 0."""
    for entry in fields(kind):
        key = f"{prefix}{entry.name}"
        if is_dataclass(entry.type):
            yield from leaves(entry.type, f"{key}.")
            continue
        yield key, entry
        if entry_type(entry.type):
            yield from leaves(entry_type(entry.type), f"{key}.0.")


def kind_of(kind: Any, part: str, key: str) -> Any:
    """The type of the field or list entry `part` inside `kind`; `key` is the full key."""
    if entry_type(kind) and part.isdecimal():
        return entry_type(kind)
    if is_dataclass(kind):
        found = next((entry.type for entry in fields(kind) if entry.name == part), None)
        if found is not None:
            return found
    raise unknown_key(key)


def unknown_key(key: str) -> ConfigError:
    """The error for a key that does not exist, with the keys that may have been meant."""
    keys = [known for known, _ in leaves()]
    same_end = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75) or same_end[:3]
    near = near or difflib.get_close_matches(key, keys, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/config.md lists all keys"
    return ConfigError(key, "no such key", hint)
