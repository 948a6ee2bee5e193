"""The `gearshift` command: dispatch, exit statuses, and what it imports."""

import argparse
import importlib
import os
import subprocess
import sys

import pytest

from gearshift.launch import cli


@pytest.fixture
def command(monkeypatch):
    """Installs a command `try` whose main is the given function."""

    def install(main):
        class Module:
            """A command."""

            @staticmethod
            def add_arguments(parser):
                parser.add_argument("--count", type=int, default=0)

        Module.main = staticmethod(main)
        monkeypatch.setitem(cli.COMMANDS, "try", ("tried", "a command"))
        real = importlib.import_module
        monkeypatch.setattr(
            importlib, "import_module", lambda name: Module if name == "tried" else real(name)
        )

    return install


def raising(error):
    def main(args):
        raise error

    return main


def test_arguments_and_exit_status_pass_through(command):
    command(lambda args: args.count)
    assert cli.main(["try", "--count", "1"]) == 1
    assert cli.main(["try"]) == 0


@pytest.mark.parametrize(
    "error", [ValueError("ppo.lam=2:\n too large"), FileNotFoundError(2, "No such file", "x.yaml")]
)
def test_the_user_s_mistakes_are_one_line_and_2(command, capsys, error):
    command(raising(error))
    assert cli.main(["try"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("gearshift: error: ") and told.count("\n") == 1
    assert "Traceback" not in told


def test_a_traceback_can_be_had(command, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_TRACEBACK", "1")
    command(raising(ValueError("x")))
    with pytest.raises(ValueError, match="x"):
        cli.main(["try"])


def test_faults_keep_their_traceback(command):
    command(raising(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["try"])


def test_unknown_commands_and_options(command, capsys):
    assert cli.main(["fecth"]) == 2
    assert "did you mean fetch?" in capsys.readouterr().err
    command(lambda args: 0)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["try", "--cuont", "1"])


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, (_, text) in cli.COMMANDS.items():
        assert f"  {name} " in listed and text in listed


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_keeps_the_contract(name):
    module = importlib.import_module(cli.COMMANDS[name][0])
    parser = argparse.ArgumentParser(description=module.__doc__)
    module.add_arguments(parser)
    assert module.__doc__ and callable(module.main)
    assert parser.format_help()


def run(*arguments: str, code: str = "from gearshift.launch.cli import main") -> subprocess.Popen:
    command = [sys.executable, "-c", f"import sys; {code}; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'deepspeed', 'transformers', 'numpy', 'yaml'} & set(sys.modules)"
    code = (
        "from gearshift.launch import cli; "
        f"main = lambda: cli.main() or (print('heavy:', sorted({heavy})) or 0)"
    )
    done = run("--help", code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_exit_status_of_a_process():
    done = run("fetch", "smolm2")
    assert done.returncode == 2
    assert done.stderr == (
        "gearshift: error: smolm2: no such asset; did you mean smollm2? "
        "There are smollm2, movie-prompts, gsm8k, imdb\n"
    )


@pytest.mark.parametrize("buffered", ("", "1"))
def test_a_reader_that_has_left_is_no_fault(buffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "gearshift.launch.cli", "--help"],
        env=os.environ | {"PYTHONUNBUFFERED": buffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
