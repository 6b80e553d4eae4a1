"""A command that needs what is not installed here becomes itself in an environment of this checkout that has it."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import coremill
from coremill.core.errors import MachineError
from coremill.pipeline.environments import Environment, Toolset, installed

log = logging.getLogger(__name__)


def run_where_installed(
    command: Sequence[str], *, needs: Sequence[str], environments: Sequence[Environment]
) -> None:
    """Return if `needs` are installed here; else become `coremill <command>` in the first environment in place.

    Raises:
        MachineError: none of them is in place.
    """
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if not missing:
        return
    toolset = _first_in_place(environments)
    if toolset is None:
        raise MachineError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in {sys.prefix}",
            expected=f"an environment with {', '.join(needs)}",
            run=f"nox -s {environments[0].session} in a checkout, or pip install {' '.join(needs)}",
        )
    log.info("running in %s: %s not installed here", toolset.folder, ", ".join(missing))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not a child: signals, exit code and terminal stay those of one process.
    os.execv(toolset.python, [str(toolset.python), "-m", "coremill", *command])


def _first_in_place(environments: Sequence[Environment]) -> Toolset | None:
    """The first of `environments` in the checkout that this very coremill is run from."""
    toolsets = installed(Path(coremill.__file__).parents[2])
    for environment in environments:
        toolset = toolsets.get(environment.name)
        # Never this very environment, which would start itself without end.
        if toolset is not None and toolset.folder.resolve() != Path(sys.prefix).resolve():
            return toolset
    return None
