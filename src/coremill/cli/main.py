"""`coremill <command>`: finds the command and imports its module only then."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

from coremill import __version__
from coremill.cli.commands import COMMANDS, GROUPS, Command
from coremill.core.command import exit_on_error
from coremill.core.errors import OK, USAGE, exit_code_table

_HELP = ("-h", "--help")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return exit_on_error(lambda: _run(arguments))


def _run(arguments: list[str], group: str = "") -> int:
    """Run a command of `group`, or of `coremill` itself."""
    if not arguments or arguments[0] in _HELP:
        print(_help_text(group))
        return OK if arguments else USAGE
    first, *rest = arguments
    name = f"{group} {first}".lstrip()
    if name in COMMANDS:
        return _run_command(name, rest)
    if name in GROUPS:
        return _run(rest, name)
    if arguments == ["--version"]:
        print(f"coremill {__version__}")
        return OK
    if arguments == ["help", "exit-codes"]:
        print(exit_code_table())
        return OK
    if name == "help":
        return _run([*rest, "--help"])
    typed = f"coremill {group}".rstrip()
    near = difflib.get_close_matches(first, _commands(group), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"run `{typed} --help`"
    print(f"{typed}: there is no command {first!r}; {hint}", file=sys.stderr)
    return USAGE


def _run_command(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    with _only_errors(command.quiet):
        module = _import_for_help(command) if {*_HELP} & {*arguments} else None
        if module is None:
            from coremill.cli.restart import restart_where_installed  # here, so that --help starts quickly

            restart_where_installed(name, command, arguments)
            module = importlib.import_module(command.module)
        return int(module.main(arguments))


@contextlib.contextmanager
def _only_errors(loggers: Iterable[str]) -> Iterator[None]:
    """Show only errors of `loggers`. Their levels are restored: another command may depend on the warnings."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _import_for_help(command: Command) -> ModuleType | None:
    """Import the command's module, or return None if a package that it imports is not installed.

    Most modules import torch only when they run, so that their help needs no environment.
    """
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as absent:
        if absent.name in command.needs:
            return None
        raise


def _commands(group: str) -> dict[str, str]:
    """Return the purpose of each command of `group`, or of `coremill` itself."""
    if group:
        prefix = f"{group} "
        return {
            name.removeprefix(prefix): each.purpose for name, each in COMMANDS.items() if name.startswith(prefix)
        }
    return {name: each.purpose for name, each in COMMANDS.items() if " " not in name} | GROUPS


def _help_text(group: str) -> str:
    commands = _commands(group)
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in commands.items())
    words = f"{group} " if group else ""
    return (
        f"usage: coremill {words}<command> [options]\n\n"
        f"commands:\n{listed}\n\n"
        f"coremill help {words}<command> prints a command's options and an example.\n"
        "coremill help exit-codes lists the exit codes.\n\n"
        "example:\n  coremill mil inspect model.mlpackage"
    )
