"""Restart a command in an environment of this checkout that has the packages it imports."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import coremill
from coremill.cli.commands import Command
from coremill.core.errors import MachineError
from coremill.pipeline.environments import CONVERT, TRAIN, Environment, Toolset, installed

log = logging.getLogger(__name__)

ENVIRONMENTS = {"train": (TRAIN,), "convert": tuple(CONVERT.values()), "mil": tuple(CONVERT.values())}
"""The environments of a checkout that have the packages of an extra, the preferred one first."""


def restart_where_installed(name: str, command: Command, arguments: Sequence[str]) -> None:
    """Return if the packages of `command` are installed here; else become it in the first environment that exists.

    Args:
        name: of the command, such as `mil run`.
        arguments: those after the name. A lane that they give with --torch comes first.

    Raises:
        MachineError: none of the command's environments exists.
    """
    missing = [package for package in command.needs if importlib.util.find_spec(package) is None]
    if not missing:
        return
    preferred = CONVERT.get(_lane(arguments))
    environments = sorted(ENVIRONMENTS[command.extra], key=lambda each: each != preferred)
    toolset = _first_existing(environments)
    if toolset is None:
        raise MachineError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in {sys.prefix}",
            expected=f"an environment with {', '.join(command.needs)}",
            run=f"pip install 'coremill[{command.extra}]', or nox -s {environments[0].session} in a checkout",
        )
    log.info("running in %s: %s not installed here", toolset.folder, ", ".join(missing))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not a child process: signals, exit code and terminal stay those of one process.
    os.execv(toolset.python, [str(toolset.python), "-m", "coremill", *name.split(), *arguments])


def _lane(arguments: Sequence[str]) -> str:
    """Return the value of --torch, or an empty string; the command itself checks the option."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--torch", nargs="?", const="", default="")
    lane: str = parser.parse_known_args(arguments)[0].torch
    return lane


def _first_existing(environments: Sequence[Environment]) -> Toolset | None:
    """Return the first of `environments` in the checkout that this coremill is imported from, or None."""
    toolsets = installed(Path(coremill.__file__).parents[2])
    for environment in environments:
        toolset = toolsets.get(environment.name)
        # Never this environment: it would restart itself without end.
        if toolset is not None and toolset.folder.resolve() != Path(sys.prefix).resolve():
            return toolset
    return None
