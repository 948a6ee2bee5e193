"""Rewards that are Python functions: def reward(prompts, completions, **columns) -> list[float].

The signature is that of TRL's `reward_funcs`. Every argument is passed by name.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
import zlib
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from functools import partial
from inspect import isawaitable
from pathlib import Path
from typing import Any

from gearshift.engine.config.errors import ConfigError, did_you_mean
from gearshift.engine.config.schema import RewardConfig
from gearshift.engine.rewards.library import LIBRARY
from gearshift.engine.rewards.text import Answer, RewardError, TextRows

_OURS = ("prompts", "completions", "completion_ids")
_MAX_FLOAT32 = 3.4028234663852886e38
_MOST_POISONED = 8  # rows that fail alone; with more it is the function, not its rows


class FunctionReward:
    """Scores from `config.function`; importing it and reading its signature raises RewardError."""

    def __init__(self, config: RewardConfig):
        self.name, self.spec = config.name, config.function or ""
        self._function = _load(self.name, self.spec, config.options)
        self._accepts_all, self._named, self._required = _signature(
            self.name, self.spec, self._function
        )
        # Those of the library have taken their options, and name the columns that they read.
        self._filled = set() if self.spec in LIBRARY else set(config.options)
        self._required |= set(getattr(self._function, "columns", ()))

    def check(self, columns: Collection[str] | None) -> None:
        """Raises RewardError for an argument that no dataset column (if known) can fill."""
        if columns is None:
            return
        missing = sorted(self._required - {*_OURS, *columns})
        if missing:
            raise RewardError(
                f"reward {self.name!r}: {self.spec} needs the dataset column {missing[0]!r}; "
                f"columns: {', '.join(sorted(columns)) or 'none'}. Rename it or give it a default"
            )

    def scores(self, rows: TextRows) -> Answer:
        """One score per row. Rows on which the function raises are left out of a second call."""
        self.check(rows.columns)
        arguments = self._arguments(rows)
        answer, error = self._call(arguments)
        if error is None:
            return checked_scores(self.name, answer, rows)
        everyone = range(len(rows.responses))
        errors = self._errors_by_row(arguments, everyone)
        others = [i for i in everyone if i not in errors]
        if errors and others and len(errors) <= _MOST_POISONED:
            answer, error = self._call(_picked(arguments, others))
        else:
            others = []
        if error is not None:
            errors, others = {i: errors.get(i, error) for i in everyone}, []
        found = checked_scores(self.name, answer if others else [], rows, others)
        found.faults.update({i: self._fault(e, rows.row(i)) for i, e in errors.items()})
        return found

    def _arguments(self, rows: TextRows) -> dict[str, list[Any]]:
        offered = rows.columns | {
            "prompts": rows.prompts,
            "completions": rows.completions,
            "completion_ids": rows.response_ids,
        }
        wanted = set(offered) if self._accepts_all else self._named
        wanted = wanted - self._filled
        return {name: values for name, values in offered.items() if name in wanted}

    def _call(self, arguments: dict[str, list[Any]]) -> tuple[Any, BaseException | None]:
        """What the function does to its arguments, others do not see."""
        try:
            answer = self._function(**deepcopy(arguments))
            return asyncio.run(_awaited(answer)) if isawaitable(answer) else answer, None
        except (Exception, SystemExit) as error:
            return None, error

    def _errors_by_row(
        self, arguments: dict[str, list[Any]], rows: Sequence[int]
    ) -> dict[int, BaseException]:
        """Calls again, a row at a time, until more fail than a few poisoned samples would."""
        errors: dict[int, BaseException] = {}
        for i in rows:
            _, error = self._call(_picked(arguments, [i]))
            if error is not None:
                errors[i] = error
            if len(errors) > _MOST_POISONED:
                break
        return errors

    def _fault(self, error: BaseException, row: str) -> RewardError:
        fault = RewardError(f"reward {self.name!r} raised {_cause(error)}; {row}")
        fault.__cause__ = error
        return fault


def checked_scores(
    name: str, answer: Any, rows: TextRows, which: Sequence[int] | None = None
) -> Answer:
    """Scores of the rows `which` (None: of all); a missing (None) or not finite one is a fault.

    A sequence, array or tensor of numbers is read; True and False are 1 and 0. A row may have a
    list of rewards instead, one for each token of its response: its score is their sum.
    RewardError for a wrong count and for what is no number.
    """
    which = range(len(rows.responses)) if which is None else which
    scores = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(scores, (list, tuple)):
        raise RewardError(f"reward {name!r} returned {type(answer).__name__}: must return a list")
    if len(scores) != len(which):
        raise RewardError(
            f"reward {name!r} returned {len(scores)} scores for {len(which)} completions: "
            "must return one each"
        )
    found = Answer([math.nan] * len(rows.responses), {})
    for i, entry in zip(which, scores, strict=True):
        score = _plain(entry)
        tokens = [_plain(part) for part in score] if isinstance(score, (list, tuple)) else None
        if tokens is not None and len(tokens) != len(rows.response_ids[i]):
            raise RewardError(
                f"reward {name!r} returned {len(tokens)} token rewards for a completion of "
                f"{len(rows.response_ids[i])} tokens, the end token included; {rows.row(i)}"
            )
        parts = [score] if tokens is None else tokens
        for part in parts:
            if part is not None and not isinstance(part, (bool, int, float)):
                raise RewardError(f"reward {name!r} is {part!r}, not a number; {rows.row(i)}")
        total = math.nan if None in parts else _sum(parts)
        if not abs(total) <= _MAX_FLOAT32:
            what, wrong = ("not a number", None) if None in parts else ("not finite", total)
            found.faults[i] = RewardError(f"reward {name!r} is {wrong}, {what}; {rows.row(i)}")
            continue
        found.scores[i] = float(total)
        if tokens is not None:
            found.tokens[i] = list(map(float, tokens))
    return found


def _sum(parts: list[Any]) -> float:
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):  # beyond float64; infinities of both signs
        return math.inf


def _plain(value: Any) -> Any:
    """A number or list of Python's, of an array or tensor."""
    return value.tolist() if hasattr(value, "tolist") else value


def _picked(arguments: dict[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [values[i] for i in rows] for name, values in arguments.items()}


def _load(name: str, spec: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The function of a reward, its options filled in."""
    maker = LIBRARY.get(spec)
    function = maker or _find(name, spec)
    if not (maker or options):
        return function
    try:
        inspect.signature(function).bind_partial(**options)
        return maker(**options) if maker else partial(function, **options)
    except (TypeError, ConfigError) as error:
        # Of the signature, of an option's value, or of a package that is missing.
        what = "options: " if getattr(error, "key", True) else ""
        raise _refusal(name, spec, f"{what}{error}") from None


def _refusal(name: str, spec: str, problem: str) -> RewardError:
    return RewardError(f"rewards: {name}: function={spec!r}: {problem}")


def _find(name: str, spec: str) -> Callable[..., Any]:
    where, colon, attribute = spec.rpartition(":")
    if not (where and colon and attribute):
        guess = did_you_mean(spec, LIBRARY)
        hint = f"; {guess}" if guess else f", or one of {', '.join(LIBRARY)}"
        raise _refusal(name, spec, f"write module:function or file.py:function{hint}")
    module = _import(name, spec, where)
    function = getattr(module, attribute, None)
    if function is None:
        names = [entry for entry in vars(module) if callable(getattr(module, entry))]
        guess = did_you_mean(attribute, names)
        hint = f"; {guess}" if guess else ""
        raise _refusal(name, spec, f"{where} has no {attribute!r}{hint}")
    if not callable(function):
        raise _refusal(name, spec, f"{attribute} is not a function")
    if inspect.isclass(function):
        raise _refusal(name, spec, f"{attribute} is a class; name an instance of it")
    return function


async def _awaited(answer: Any) -> Any:
    return await answer


def _import(name: str, spec: str, where: str) -> Any:
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        problem = f"no file {path.absolute()}; relative paths start in the current directory"
        raise _refusal(name, spec, problem)
    try:
        return _import_file(path) if path.suffix == ".py" else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        problem = f"importing it raised {_cause(error)}"
        fix = "A module must be importable from here (PYTHONPATH); a file is file.py:function"
        raise _refusal(name, spec, f"{problem}. {fix}") from error


def _import_file(path: Path) -> Any:
    module_name = f"gearshift_reward_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec and spec.loader, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _signature(name: str, spec: str, function: Callable) -> tuple[bool, set[str], set[str]]:
    """(takes **columns, parameters by name, those without a default)."""
    parameters = inspect.signature(function).parameters.values()
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    named = {p.name for p in by_name}
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters) or not (
        accepts_all or "completions" in named
    ):
        problem = f"its signature is {inspect.signature(function)}"
        fix = "write def reward(prompts, completions, **columns) -> list[float]"
        raise _refusal(name, spec, f"{problem}; {fix}")
    return accepts_all, named, {p.name for p in by_name if p.default is p.empty}


def _cause(error: BaseException) -> str:
    """Type, message and place of an error in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"
