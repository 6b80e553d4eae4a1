"""`coremill mil <command>`: run, compare and examine Core ML packages on any machine.

This module imports nothing heavy. Where torch or coremltools is missing, as it is among the tools, the same command
runs in the convert environment of this checkout instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator

from coremill.cli.elsewhere import run_where_installed
from coremill.core.command import command_parser, exit_on_error
from coremill.pipeline.environments import CONVERT, LANES

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
    run_where_installed(["mil", *arguments], needs=NEEDS, environments=[CONVERT[lane] for lane in LANES])
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


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
