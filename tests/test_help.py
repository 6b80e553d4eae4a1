"""The help of each command: its name, defaults and example. Runs where every command's packages are installed."""

from __future__ import annotations

import argparse
import importlib
import shlex

import pytest

from coremill.cli.commands import COMMANDS
from coremill.cli.main import main


@pytest.fixture(params=COMMANDS)
def parser(request, monkeypatch) -> argparse.ArgumentParser:
    """The parser of a command."""
    found: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, args: list[str]) -> None:
        found.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(SystemExit):
        main([*request.param.split(), "--help"])
    monkeypatch.undo()
    assert found[0].prog == f"coremill {request.param}"
    return found[0]


def test_help_shows_every_default(parser):
    for action in parser._actions:
        assert action.help, f"{parser.prog} {action.dest} has no help"
        if action.default not in (None, False, argparse.SUPPRESS, []):
            default = "" if action.dest == "bundle" else action.default  # a path inside the package
            assert f"default: {default}" in action.help % vars(action), f"{parser.prog} {action.dest}"


def test_example_is_valid(parser):
    """The help ends in it, and the parser accepts it."""
    *_, title, example = parser.format_help().splitlines()
    assert title == "example:"
    typed = shlex.split(example)
    assert typed[: len(parser.prog.split())] == parser.prog.split()
    parser.parse_args(typed[len(parser.prog.split()) :])


@pytest.mark.parametrize("command", COMMANDS)
def test_module_of_a_command_matches_the_table(command):
    """A module that checks its packages itself, for `python -m`, checks the same ones."""
    module = importlib.import_module(COMMANDS[command].module)
    assert callable(module.main)
    assert getattr(module, "NEEDS", COMMANDS[command].needs) == COMMANDS[command].needs
