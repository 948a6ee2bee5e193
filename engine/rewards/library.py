"""Rewards by name: `function: regex` and `options: {pattern: ...}` instead of code of one's own.

Each maker takes the options of a reward and returns an ordinary reward function. It raises
ConfigError for an option that cannot be used.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gearshift.engine.config.errors import ConfigError, refuse_if, said

Reward = Callable[..., list]


def math_verify(*, answer: str = "answer") -> Reward:
    """1 where the response's last number or formula equals the column `answer`, else 0.

    Compared by the package math-verify, as values: 0.5 is 1/2. Of an answer with ####, as in
    GSM8K, what follows it counts. An answer that is no mathematics gives no score.
    """
    _require("math_verify", "math")
    from math_verify import parse, verify

    @cache
    def gold(text: str) -> list:
        text = text.rpartition("####")[2].strip()
        return parse(text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}")

    def score(completions: list, **columns: Any) -> list:
        pairs = zip(map(_text, completions), columns[answer], strict=True)
        return [
            float(verify(gold(str(right)), parse(text))) if gold(str(right)) else None
            for text, right in pairs
        ]

    score.columns = (answer,)  # type: ignore[attr-defined]
    return score


def regex(*, pattern: str, match: Literal["full", "search"] = "full") -> Reward:
    """1 where the whole response (match: search, a part of it) fits `pattern`, else 0.

    Python's syntax; (?s) at its start lets a dot match line breaks, too.
    """
    refuse_if(match not in ("full", "search"), "match", "expected full or search", value=match)
    refuse_if(type(pattern) is not str, "pattern", "must be text, in quotes", value=repr(pattern))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError("pattern", f"no regular expression: {error}", value=pattern) from None
    find = compiled.fullmatch if match == "full" else compiled.search
    return lambda completions, **columns: [float(bool(find(_text(c)))) for c in completions]


def json_schema(*, schema: dict | str | None = None) -> Reward:
    """1 where the whole response is JSON that fits `schema`, a schema or a file; else 0.

    Without a schema any JSON will do. A $ref leads to a place in the schema or to a published one
    of JSON Schema itself; nothing is read from the network.
    """
    fits: Callable[[Any], bool] = lambda value: True
    if schema is not None:
        _require("jsonschema", "json")
        from jsonschema import SchemaError, validators
        from jsonschema_specifications import REGISTRY

        rules = _read_schema(schema) if isinstance(schema, str) else schema
        wrong = not isinstance(rules, dict | bool)
        refuse_if(wrong, "schema", "must be a schema or a file of one", value=repr(schema))
        kind = validators.validator_for(rules)
        try:
            kind.check_schema(rules)
        except SchemaError as error:
            raise ConfigError("schema", f"no JSON schema: {said(error)}") from None
        _check_references(rules)
        fits = kind(rules, registry=REGISTRY).is_valid

    def right(text: str) -> bool:
        try:
            return fits(json.loads(text, parse_constant=_no_json))
        except (ValueError, RecursionError):
            return False

    return lambda completions, **columns: [float(right(_text(c))) for c in completions]


def overlong(*, max_tokens: int, buffer: int) -> Reward:
    """Soft overlong punishment (DAPO, Yu et al. 2025, arXiv 2503.14476, equation 13).

    0 up to max_tokens - buffer tokens, then falls linearly to -1 at max_tokens, and stays there.
    The end token counts.
    """
    _require_count("max_tokens", max_tokens)
    _require_count("buffer", buffer)
    problem = f"must be at most max_tokens={max_tokens}"
    refuse_if(buffer > max_tokens, "buffer", problem, value=buffer)

    def score(completion_ids: list, completions: list, **columns: Any) -> list:
        over = (len(ids) - (max_tokens - buffer) for ids in completion_ids)
        return [-min(max(n / buffer, 0.0), 1.0) for n in over]

    return score


def length(*, tokens: int) -> Reward:
    """-1 for every `tokens` tokens of the response, in proportion."""
    _require_count("tokens", tokens)

    def score(completion_ids: list, completions: list, **columns: Any) -> list:
        return [-len(ids) / tokens for ids in completion_ids]

    return score


LIBRARY: dict[str, Callable[..., Reward]] = {
    "math_verify": math_verify,
    "regex": regex,
    "json_schema": json_schema,
    "overlong": overlong,
    "length": length,
}


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        problem = f"the package {package.replace('_', '-')} is not installed"
        raise ConfigError("", problem, f"pip install 'gearshift[{extra}]'")


def _require_count(name: str, value: Any) -> None:
    wrong = type(value) is not int or value < 1
    refuse_if(wrong, name, "must be a whole number, 1 or more", value=repr(value))


def _read_schema(path: str) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError("schema", f"no JSON file: {said(error)}", value=repr(path)) from None


def _check_references(rules: dict | bool) -> None:
    """Raises ConfigError for a $ref that leads nowhere: else the first response that needs it
    would end the run."""
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    named = rules.get("$schema", "") if isinstance(rules, dict) else ""
    kind = specification_with(named, default=DRAFT202012)

    def look(part: Any, resolver: Any) -> None:
        if isinstance(part, dict):
            resolver = resolver.in_subresource(kind.create_resource(part))
            target = part.get("$ref")
            if isinstance(target, str):
                resolver.lookup(target)
        inside = part.values() if isinstance(part, dict) else part
        for each in inside if isinstance(part, dict | list) else ():
            look(each, resolver)

    whole = kind.create_resource(rules)
    try:
        look(rules, REGISTRY.resolver_with_root(whole))
    except Unresolvable as error:
        raise ConfigError("schema", f"its $ref {error.ref} leads nowhere") from None


def _no_json(word: str) -> None:
    """Of NaN and infinities, which Python's reader takes."""
    raise ValueError(word)


def _text(completion: str | list[dict[str, Any]]) -> str:
    """The response of a prompt that is a string, or a chat."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
