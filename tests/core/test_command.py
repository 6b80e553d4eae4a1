"""How a command starts and ends: its help, its exit code, and a reader of its output that goes early."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coremill.core.command import command_parser, exit_on_error
from coremill.core.errors import ConfigError


def test_help_ends_in_an_example():
    parser = command_parser("mil run", "Predict.", example="p --share 5%")
    assert parser.format_help().startswith("usage: coremill mil run [-h]\n\nPredict.\n")
    assert parser.format_help().endswith("\n\nexample:\n  coremill mil run p --share 5%\n")


@pytest.mark.parametrize("typed", ["coremill", "coremill.pipeline.status"])
def test_help_names_the_command_as_typed(typed):
    arguments = ["status", "--help"] if typed == "coremill" else ["--help"]
    ended = subprocess.run([sys.executable, "-m", typed, *arguments], capture_output=True, text=True, check=True)
    named = "coremill status" if typed == "coremill" else f"python -m {typed}"
    assert ended.stdout.startswith(f"usage: {named} [-h] ")
    assert f"\nexample:\n  {named} --" in ended.stdout


def test_error_is_printed_and_becomes_its_exit_code(capsys):
    def fail() -> int:
        raise ConfigError("x is 3", expected="4", run="coremill status")

    assert exit_on_error(fail) == 10
    assert capsys.readouterr().err == "configuration error: x is 3\n  expected: 4\n  run: coremill status\n"


def test_other_exception_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_on_error(lambda: 1 // 0)


def test_interrupt_prints_no_traceback(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_on_error(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def closed(command: str, *, stderr: bool, unbuffered: bool) -> subprocess.CompletedProcess[str]:
    """Run `command` in Python, its output a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-c", f"import sys\nfrom coremill.core.command import exit_on_error\n{command}"],
            env={**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""},
            stdout=writer,
            stderr=writer if stderr else subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("stderr", [False, True])
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    "statement",
    [
        "sys.exit(exit_on_error(lambda: print('text') or 0))",
        "from rich.console import Console; sys.exit(exit_on_error(lambda: Console().print('text') or 0))",
        "sys.stdout.write('text'); sys.exit(exit_on_error(lambda: sys.exit(0)))",
    ],
    ids=["print", "rich", "argparse"],
)
def test_closed_pipe_ends_the_command_without_a_traceback(statement, stderr, unbuffered):
    if statement.startswith("sys.stdout.write") and unbuffered:
        statement = statement.replace("sys.stdout.write('text'); ", "")
        expected = 0  # argparse ignores it
    else:
        expected = 141
    ended = closed(statement, stderr=stderr, unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (expected, None if stderr else "")


def test_closed_pipe_of_a_child_keeps_its_traceback():
    with pytest.raises(BrokenPipeError):
        exit_on_error(broken)


def broken() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return os.write(writer, b"text")
    finally:
        os.close(writer)
