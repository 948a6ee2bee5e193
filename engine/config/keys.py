"""What a key is: its type, default, bounds and help, and how a wrong value of it is told."""

import difflib
import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge
from pydantic import BeforeValidator, ConfigDict, Strict, ValidationError
from pydantic.dataclasses import dataclass

from gearshift.engine.config.errors import ConfigError, did_you_mean

BOUNDS = {"gt": "above", "ge": "at least", "le": "at most", "lt": "below"}


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Kind = TypeVar("Kind")
# YAML 1.1 reads 1e-6, which has no point, as text. True is no number, and 1 is not true.
Number = Annotated[float, Strict(), BeforeValidator(_number)]
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Tokens = Annotated[int, Strict(), Ge(1)] | Literal["auto"]
# A section, and a list of sections; `ppo:` with nothing behind it is empty.
Part = Annotated[Kind, BeforeValidator(lambda given: {} if given is None else given)]
Options = Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]
Parts = Annotated[list[Kind], Strict(), BeforeValidator(lambda given: given or [])]


def knob(default: Any, text: str, **bounds: float) -> Any:
    """A documented key; `gt` is an exclusive lower bound, `ge` and `le` are inclusive ones."""
    told = {"description": text} | bounds
    if default in ([], {}) or isinstance(default, type):
        made = default if isinstance(default, type) else type(default)
        return field(default_factory=made, metadata=told)
    return field(default=default, metadata=told)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(knob,))
def section(kind: type[Kind]) -> type[Kind]:
    """A frozen dataclass, made of keywords, whose values are checked by pydantic.

    What does not fit raises ConfigError with the key inside the section.
    """
    rules = ConfigDict(extra="forbid", allow_inf_nan=False)
    made: Any = dataclass(frozen=True, kw_only=True, config=rules)(kind)
    checked = made.__init__

    @functools.wraps(checked)
    def init(self, /, **values):
        try:
            checked(self, **values)
        except ValidationError as error:
            raise _told(error.errors(), type(self), values) from None

    made.__init__ = init
    return made


def _told(problems: list[Any], section: type, given: Any) -> ConfigError:
    """The first problem that pydantic found in `section`, in our words."""
    unknown = (problem for problem in problems if problem["type"] == "unexpected_keyword_argument")
    problem = next(unknown, problems[0])
    place, why = list(problem["loc"]), problem.get("ctx", {})
    if problem["type"] == "unexpected_keyword_argument":
        return unknown_key(section, ".".join(map(str, place)))
    if problem["type"] == "value_error":
        return why["error"].under(".".join(map(str, place)))
    if isinstance(place[-1], int):  # a wrong entry is a wrong list
        place.pop()
    kind: Any = section
    for depth, part in enumerate(place):
        inner = kind_of(kind, str(part))
        if inner is None:  # the rest says which of several types was tried
            place = place[:depth]
            break
        kind, given = inner, given[part]
    key = ".".join(map(str, place))
    for bound, word in BOUNDS.items():
        if bound in why:
            value = float(given) if float in alternatives(kind) else given
            return ConfigError(key, f"must be {word} {why[bound]:g}", value=value)
    return ConfigError(key, f"expected {described(kind)}", _hint(kind, given), shown(given))


def _hint(kind: Any, value: Any) -> str:
    if get_origin(kind) is Literal and isinstance(value, str):
        return did_you_mean(value, get_args(kind))
    # YAML reads `off` and `no` as false, and 7 as a number.
    return "put it in quotes" if is_text(kind) and isinstance(value, (bool, int, float)) else ""


def shown(value: Any) -> str:
    """A value, short enough for an error message."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "a list of sections"
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."


def bare(kind: Any) -> Any:
    """A type without what pydantic is told about it."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def entry_type(kind: Any) -> Any:
    """The section D of a list[D], None for any other type."""
    inner = [bare(entry) for entry in get_args(bare(kind))]
    return inner[0] if inner and is_dataclass(inner[0]) else None


def alternatives(kind: Any) -> list:
    """float | None -> [float, NoneType]; any other type -> [type]."""
    union = get_origin(kind) in (types.UnionType, Union)
    return [bare(option) for option in (get_args(kind) if union else (kind,))]


def is_text(kind: Any) -> bool:
    """Whether values of this type are strings."""
    return get_origin(kind) is Literal or str in alternatives(kind)


def described(kind: Any) -> str:
    """A type in the user's words."""
    kind = bare(kind)
    if is_dataclass(kind):
        return "a section of keys"
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if entry_type(kind):
        return "a list of sections, each after a `- `"
    if get_origin(kind) is dict:
        return "names and values, as {a: 1}"
    if get_origin(kind) is list:
        whole = bare(get_args(kind)[0]) is int
        return "a list of whole numbers, as [1, 2]" if whole else "a list of strings, as [a, b]"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}
    names |= {type(None): "null"}
    return " or ".join(names.get(option) or described(option) for option in alternatives(kind))


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every key there is, with its field; entries of a list of sections have the index 0."""
    for entry in fields(kind):
        key, inner = f"{prefix}{entry.name}", bare(entry.type)
        if is_dataclass(inner):
            yield from leaves(inner, f"{key}.")
            continue
        yield key, entry
        if entry_type(inner):
            yield from leaves(entry_type(inner), f"{key}.0.")


def kind_of(kind: Any, part: str) -> Any:
    """The type of the key or list entry `part` inside `kind`; None where there is no such key."""
    if entry_type(kind) and part.isdecimal():
        return entry_type(kind)
    inside = fields(kind) if is_dataclass(kind) else ()
    return next((bare(entry.type) for entry in inside if entry.name == part), None)


def unknown_key(section: type, key: str) -> ConfigError:
    """The error for a key that does not exist, with the keys that may have been meant."""
    keys = [known for known, _ in leaves(section)]
    same_end = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75) or same_end[:3]
    near = near or difflib.get_close_matches(key, keys, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/config.md lists all keys"
    return ConfigError(key, "no such key", hint)
