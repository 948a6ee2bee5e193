"""What a run prints: a line per step, a progress bar, tables of samples, notes and warnings.

rich draws on a terminal; a file or pipe gets plain lines, without bars or control characters.
"""

import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# label, key, format; a figure that a run does not have is left out.
_FIGURES = (
    ("score", "objective/scores", "{:+.3f}"),
    ("kl", "objective/kl", "{:.3f}"),
    ("policy", "loss/policy_avg", "{:+.4f}"),
    ("value", "loss/value_avg", "{:.4f}"),
    ("clip", "policy/clipfrac_avg", "{:.1%}"),
    ("entropy", "policy/entropy_avg", "{:.3f}"),
    ("length", "response_length/mean", "{:.1f}"),
    ("tok/s", "throughput/tokens_per_s", "{:,.0f}"),
)
# In the order of a step.
PHASES = (
    "generate",
    "shift",
    "rewards",
    "logprobs",
    "ref",
    "values",
    "update_actor",
    "update_critic",
    "swap",
    "eval",
    "checkpoint",
)
_LEAST_SHARE = 0.01  # phases below this share of the step are not worth their width


@contextmanager
def stdout_for_the_answer(wanted: bool = True) -> Iterator[None]:
    """What anything prints inside, C libraries included, goes to stderr, where that is wanted."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


class _Rich(RichConsole):
    def on_broken_pipe(self) -> None:  # rich's own ends the process
        self.quiet = True


class Console:
    """Prints what happens in one run. A terminal that is gone does not end it: nobody reads then.

    total_steps: PPO steps of the whole run. stream: where to print. quiet: print nothing, for the
    ranks other than 0.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None, quiet: bool = False):
        self._total, self._quiet = total_steps, quiet
        self._stream = sys.stdout if stream is None else stream
        self._rich = _Rich(file=self._stream, highlight=False)
        self._bars = not quiet and self._stream.isatty() and not self._rich.is_dumb_terminal
        self._kept: list[str] | TextIO = []

    def keep(self, path: Path) -> None:
        """From here on all text is also added to a file; what was said before goes there first."""
        before = self._kept
        self._kept = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        if isinstance(before, list):
            self._kept.writelines(before)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """One line: the step's key figures and where its seconds went."""
        pairs = [
            (label, form.format(figures[key]), math.isfinite(figures[key]))
            for label, key, form in _FIGURES
            if key in figures
        ]
        width = len(str(self._total))
        line = Text(f"step {step:>{width}}/{self._total}", style="bold")
        for label, value, finite in pairs:
            line.append(f"  {label} ", style="not bold dim")
            line.append(value, style="not bold" if finite else "bold red")
        line.append(_seconds(figures), style="not bold dim")
        self._print(line)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """One line for each set of held-out prompts, where the step evaluated any."""
        for name in dict.fromkeys(k.split("/")[1] for k in figures if k.startswith("eval/")):
            own = {k.split("/", 2)[2]: figures[k] for k in figures if k.startswith(f"eval/{name}/")}
            told = [f"score {own.pop('scores'):+.3f}"]
            told += [f"{k.removeprefix('rewards/')} {v:.3f}" for k, v in own.items()]
            self.note(f"eval after step {step}  {name}  {'  '.join(told)}")

    def note(self, text: str) -> None:
        """One line of anything else."""
        self._print(Text(printable(text)))

    def warn(self, text: str) -> None:
        """One line that should be seen."""
        self._print(Text(f"warning: {printable(text)}", style="yellow"))

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A bar, erased when the block ends; yields a function (done, total) that moves it."""
        if not self._bars:
            yield lambda done, total: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
        with Progress(
            *columns, TimeElapsedColumn(), console=self._rich, transient=True
        ) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of rows {"prompt", "response", "score"}."""
        for row in rows:
            line = (
                f"sample {step}  score {row['score']:+.3f}  "
                f"prompt {_one_line(row['prompt'])}  response {_one_line(row['response'])}"
            )
            self._add(line) if self._bars else self._print(Text(line))
        if self._bars:
            self._write(self._rich.print, _table(step, rows))

    def _add(self, line: str) -> None:
        add = self._kept.append if isinstance(self._kept, list) else self._kept.write
        with suppress(OSError):  # a disk that is full
            add(f"{line}\n")

    def _print(self, line: Text) -> None:
        self._add(line.plain)
        if self._bars:
            return self._write(self._rich.print, line, soft_wrap=True)
        # Not through rich: it would wrap a log's lines at 80 columns.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = line.plain.encode(encoding, "backslashreplace").decode(encoding)
        self._write(print, text, file=self._stream, flush=True)

    def _write(self, write: Callable[..., None], *what: Any, **options: Any) -> None:
        if self._quiet:
            return
        try:
            write(*what, **options)
        except OSError:  # a pipe whose reader has ended, a disk that is full
            self._quiet = True
            with suppress(OSError):  # or Python would fail again when it exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def printable(text: str) -> str:
    """`text` with its control characters spelled out, new lines kept.

    A model can write any byte, escape sequences included; a terminal must not obey them.
    """
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else ascii(c)[1:-1]
        for c in text
    )


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as a person reads it: a chat has a line `role: content` per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _seconds(figures: Mapping[str, float]) -> str:
    whole = figures.get("timing_s/step")
    if whole is None:
        return ""
    spent = [(name, figures.get(f"timing_s/{name}", 0.0)) for name in PHASES]
    parts = " ".join(f"{name} {s:.1f}" for name, s in spent if s >= _LEAST_SHARE * whole)
    return f"  {whole:.1f}s" + (f" ({parts})" if parts else "")


def _table(step: int, rows: list[dict[str, Any]]) -> Table:
    title = f"Samples of step {step}"
    table = Table(title=title, title_justify="left", expand=True, show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("response", ratio=3, overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    for row in rows:
        # Text, not str: a sample may hold rich's markup.
        table.add_row(
            Text(printable(prompt_text(row["prompt"]))),
            Text(printable(row["response"])),
            f"{row['score']:+.3f}",
        )
    return table


def _one_line(value: str | list[dict[str, Any]], limit: int = 160) -> str:
    text = printable(prompt_text(value)).replace("\n", "\\n")
    return f'"{text if len(text) <= limit else text[: limit - 4] + " ..."}"'
