"""`coremill mil <command>`: run, compare and examine Core ML packages on any machine.

This module imports nothing heavy. Where torch or coremltools is missing, as it is among the tools, the same command
runs in the convert environment of this checkout instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import coremill
from coremill.core.command import command_parser, exit_on_error
from coremill.core.errors import MachineError
from coremill.pipeline.environments import CONVERT, LANES, PRIMARY_LANE, Toolset, installed

log = logging.getLogger(__name__)

NEEDS = ("torch", "coremltools", "numpy")

COMMANDS = {
    "inspect": "functions, inputs, outputs, states, operations and weights of a package",
    "run": "predict with the arrays of an .npz file",
    "compare": "two packages, or a package and a TorchScript file, on the same inputs",
    "bisect": "the first operation at which fp16 leaves the oracle; overflows by operation",
    "lint": "what keeps a graph off the Neural Engine, or slow there; each with its source",
    "selftest": "small packages with expected outputs; on a Mac through Core ML as well",
}
"""Each a module of `coremill.mil.commands`, whose `main(argv)` returns the exit code."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(arguments)
    if missing := [package for package in NEEDS if importlib.util.find_spec(package) is None]:
        _run_elsewhere(arguments, missing)
    with _quiet_coremltools():
        module = importlib.import_module(f"coremill.mil.commands.{options.command}")
        return int(module.main(options.arguments))


@contextlib.contextmanager
def _quiet_coremltools() -> Iterator[None]:
    """It warns on import of versions that it has not converted with, and nothing is converted here.

    The level comes back: a conversion in the same process has to hear of its warnings.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = command_parser(
        "coremill mil", f"Run, compare and examine Core ML packages on any machine.\n\ncommands:\n{commands}"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the command; see its own --help")
    return parser


def _run_elsewhere(arguments: list[str], missing: list[str]) -> None:
    """Become the same command in the convert environment; does not return.

    Raises:
        MachineError: there is no such environment.
    """
    toolset = _convert_environment()
    if toolset is None:
        raise MachineError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in {sys.prefix}",
            expected=f"an environment with {', '.join(NEEDS)}",
            run=f"nox -s {CONVERT[PRIMARY_LANE].session} in a checkout, or pip install {' '.join(NEEDS)}",
        )
    log.info("running in %s: %s not installed here", toolset.folder, ", ".join(missing))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not a child: signals, exit code and terminal stay those of one process.
    os.execv(toolset.python, [str(toolset.python), "-m", "coremill", "mil", *arguments])


def _convert_environment() -> Toolset | None:
    """The first lane's convert environment of the checkout that this very coremill is run from."""
    toolsets = installed(Path(coremill.__file__).parents[2])
    for lane in LANES:
        toolset = toolsets.get(CONVERT[lane].name)
        # Never this very environment, which would start itself without end.
        if toolset is not None and toolset.folder.resolve() != Path(sys.prefix).resolve():
            return toolset
    return None


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
