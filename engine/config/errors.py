"""A user's mistake, as data: which key, which value, what is wrong with it, and what helps."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self


class ConfigError(ValueError):
    """A mistake that a user can mend; the command ends with its one line, without a traceback.

    Its text is "key=value: problem; fix", without the parts that are not given.
    """

    def __init__(self, key: str, problem: str, fix: str = "", value: Any = ...):
        """key: a dotted key, an option, an environment variable, or "FILE, row N"; "" where only
        the caller knows it. value: as it is to be shown, so repr(path) where quotes are wanted.
        """
        super().__init__(key, problem, fix, value)  # what a copy in another process is made of
        self.key, self.problem, self.fix, self.value = key, problem, fix, value

    def __str__(self) -> str:
        return f"{self.mistake}; {self.fix}" if self.fix else self.mistake

    @property
    def mistake(self) -> str:
        """The text without the fix."""
        where = self.key if self.value is ... else f"{self.key}={self.value}"
        return f"{where}: {self.problem}" if where else self.problem

    def under(self, section: str) -> Self:
        """The same mistake, its key inside a section: `path` under `actor` is `actor.path`."""
        return self._placed(section, ".")

    def at(self, place: str) -> Self:
        """The same mistake in a file: `prompt` at `a.jsonl, row 3` is `a.jsonl, row 3: prompt`."""
        return self._placed(place, ": ")

    def _placed(self, place: str, joint: str) -> Self:
        key = joint.join(filter(None, (place, self.key)))
        return type(self)(key, self.problem, self.fix, self.value)


@contextmanager
def told_as(options: Mapping[str, str]) -> Iterator[None]:
    """Mistakes in values of these keys are told of the options of a command that gave them."""
    try:
        yield
    except ConfigError as error:
        key = options.get(error.key, error.key)
        raise ConfigError(key, error.problem, error.fix, error.value) from None


def said(error: Exception) -> str:
    """What a library says of a file, in one line: its first, or two where that is a title."""
    first, *more = [*map(str.strip, str(error).splitlines()), ""]
    line = f"{first} {more[0]}" if first.endswith(":") and more else first
    return line.rstrip(". ") or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A question that names the nearest of `known`; `otherwise` where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def choices(word: str, known: Iterable[str]) -> str:
    """The nearest of `known`, where one is near, and all of them."""
    known = list(known)
    return f"{did_you_mean(word, known)} There are {', '.join(known)}".lstrip()


def refuse_if(wrong: Any, key: str, problem: str, fix: str = "", value: Any = ...) -> None:
    """One line of a list of rules: raises ConfigError where `wrong` is true."""
    if wrong:
        raise ConfigError(key, problem, fix, value)
