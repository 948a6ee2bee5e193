"""The console: plain where nobody looks, rich on a terminal, and never driven by a model's text."""

import io
import math
import os
import pty
import subprocess
import sys

import pytest

from gearshift.launch.console import Console, printable

FIGURES = {
    "objective/scores": 0.4121,
    "objective/kl": 3.2,
    "loss/policy_avg": -0.0123,
    "loss/value_avg": math.nan,
    "policy/clipfrac_avg": 0.081,
    "response_length/mean": 87.24,
    "throughput/tokens_per_s": 12_345.0,
    "timing_s/step": 14.2,
    "timing_s/generate": 6.14,
    "timing_s/update_actor": 4.0,
    "timing_s/ref": 0.05,
}
SAMPLES = [
    {"prompt": "The [bold]film[/bold]", "response": " was\x1b[2J\r great", "score": 0.5},
    {"prompt": [{"role": "user", "content": "Hi"}], "response": "Hello\nyou", "score": -1.0},
]


def plain(act, **options) -> str:
    stream = io.StringIO()
    act(Console(40, stream=stream, **options))
    return stream.getvalue()


def test_a_step_is_one_plain_line():
    line = plain(lambda console: console.step(3, FIGURES))
    assert line == (
        "step  3/40  score +0.412  kl 3.200  policy -0.0123  value nan  clip 8.1%  length 87.2  "
        "tok/s 12,345  14.2s (generate 6.1 update_actor 4.0)\n"
    )


def test_a_step_with_few_figures():
    assert plain(lambda console: console.step(40, {})) == "step 40/40\n"


def test_no_bar_and_no_control_character_in_a_file():
    def act(console):
        with console.progress("generate") as advance:
            advance(1, 2)
            advance(2, 2)
        console.samples(5, SAMPLES)
        console.warn("odd \x07 text")

    text = plain(act)
    assert text == (
        'sample 5  score +0.500  prompt "The [bold]film[/bold]"  '
        'response " was\\x1b[2J\\r great"\n'
        'sample 5  score -1.000  prompt "user: Hi"  response "Hello\\nyou"\n'
        "warning: odd \\x07 text\n"
    )


def test_other_ranks_say_nothing():
    def act(console):
        console.step(1, FIGURES)
        console.note("x")
        console.samples(1, SAMPLES)
        with console.progress("generate") as advance:
            advance(1, 1)

    assert plain(act, quiet=True) == ""


def test_a_stream_that_cannot_write_a_character_still_gets_the_line():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(1, stream=stream).note("naïve 漢")
    stream.flush()
    assert raw.getvalue() == b"na\\xefve \\u6f22\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", "a\nb"), ("\x1b[31m", "\\x1b[31m"), ("\ud800", "\\ud800"), ("é漢😀", "é漢😀")],
)
def test_printable(text, shown):
    assert printable(text) == shown


SCRIPT = """
import time
from gearshift.launch.console import Console
console = Console(40)
with console.progress("generate") as advance:
    for done in range(1, 4):
        advance(done, 3)
        time.sleep(0.15)
console.step(3, {"objective/scores": 0.5})
console.samples(3, [{"prompt": "[red]p[/red]", "response": "r\\x1b[2J", "score": 0.5}])
"""


def on_a_terminal(script: str) -> str:
    """What the script writes to a pseudo-terminal of 100 columns."""
    main, side = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=side, stderr=side, env=environment, close_fds=True
    )
    os.close(side)
    chunks = []
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(main)
    assert process.wait(30) == 0
    return b"".join(chunks).decode()


def test_a_terminal_gets_bar_colours_and_table():
    text = on_a_terminal(SCRIPT)
    assert "generate" in text and "100%" in text and "\x1b[1m" in text
    assert "Samples of step 3" in text and "┃" in text
    assert "[red]p[/red]" in text  # not read as markup
    assert "\x1b[2J" not in text and "r\\x1b[2J" in text


def test_a_stream_that_breaks_is_written_to_no_more():
    class Broken(io.StringIO):
        tries = 0

        def write(self, text):
            Broken.tries += 1
            raise BrokenPipeError(32, "Broken pipe")

    console = Console(2, stream=Broken())
    console.note("one")
    console.step(1, FIGURES)
    console.samples(1, SAMPLES)
    assert Broken.tries == 1


def test_what_is_said_is_kept_from_the_beginning(tmp_path):
    """Also what a terminal draws as a table, and what nobody reads."""
    console = Console(40, stream=io.StringIO())
    console.note("before")
    console.keep(tmp_path / "console.log")
    console.step(3, FIGURES)
    console.samples(3, SAMPLES)
    console._bars = True
    console.samples(4, SAMPLES)
    kept = (tmp_path / "console.log").read_text().splitlines()
    begins = ("before", "step  3/40  score", *["sample 3  score"] * 2, *["sample 4  score"] * 2)
    assert all(line.startswith(start) for line, start in zip(kept, begins, strict=True))


def test_what_libraries_print_is_not_part_of_an_answer():
    """Whoever holds the file: a logger made before, C code, another process."""
    code = (
        "import os, sys\n"
        "held = sys.stdout\n"
        "from gearshift.launch.console import stdout_for_the_answer\n"
        "with stdout_for_the_answer():\n"
        "    print('chatter', file=held)\n"
        "    os.write(1, b'C chatter')\n"
        "    os.system('echo child')\n"
        "print('answer')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "answer\n"
    assert all(told in done.stderr for told in ("chatter", "C chatter", "child"))
