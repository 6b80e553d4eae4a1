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
from coremill.cli.restart import restart_where_installed
from coremill.core.command import exit_on_error
from coremill.core.errors import OK, USAGE, exit_code_table

_HELP = ("-h", "--help")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return exit_on_error(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in _HELP:
        print(help_text())
        return OK if arguments else USAGE
    first, *rest = arguments
    if first == "--version":
        print(f"coremill {__version__}")
        return OK
    if first == "help":
        if rest == ["exit-codes"]:
            print(exit_code_table())
            return OK
        return _run([*rest, "--help"])
    if first in GROUPS:
        return _run_group(first, rest)
    if first not in COMMANDS:
        return _unknown("coremill", first, [*COMMANDS, *GROUPS, "help"])
    return _run_command(first, rest)


def _run_group(group: str, arguments: list[str]) -> int:
    if not arguments or arguments[0] in _HELP:
        print(group_help(group))
        return OK if arguments else USAGE
    first, *rest = arguments
    name = f"{group} {first}"
    if name not in COMMANDS:
        return _unknown(f"coremill {group}", first, [each.removeprefix(f"{group} ") for each in COMMANDS])
    return _run_command(name, rest)


def _unknown(typed: str, word: str, known: Iterable[str]) -> int:
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"run `{typed} --help`"
    print(f"{typed}: there is no command {word!r}; {hint}", file=sys.stderr)
    return USAGE


def _run_command(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    with _only_errors(command.quiet):
        module = _import_for_help(command) if {*_HELP} & {*arguments} else None
        if module is None:
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
    """Import the command's module if its own imports are installed: its help needs no more, such as torch."""
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as absent:
        if absent.name in command.needs:
            return None
        raise


def help_text() -> str:
    commands = {name: each.purpose for name, each in COMMANDS.items() if " " not in name} | GROUPS
    return (
        "usage: coremill <command> [options]\n\n"
        f"commands:\n{_listed(commands)}\n\n"
        "coremill help <command>    print a command's options and an example\n"
        "coremill help exit-codes   list the exit codes\n"
        "coremill --version         print the version\n\n"
        "example:\n  coremill mil inspect model.mlpackage"
    )


def group_help(group: str) -> str:
    commands = {
        name.removeprefix(f"{group} "): each.purpose
        for name, each in COMMANDS.items()
        if name.startswith(f"{group} ")
    }
    return (
        f"usage: coremill {group} <command> [options]\n\n"
        f"commands:\n{_listed(commands)}\n\n"
        f"coremill help {group} <command> prints a command's options and an example.\n\n"
        f"example:\n  coremill {group} {next(iter(commands))} model.mlpackage"
    )


def _listed(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in commands.items())


if __name__ == "__main__":
    sys.exit(main())
