"""`coremill agree`: light, so that it starts among the tools; the work is done where torch and coremltools are."""

from __future__ import annotations

import argparse
import importlib
import sys

from coremill.cli.elsewhere import run_where_installed
from coremill.core.command import exit_on_error
from coremill.pipeline.environments import CONVERT, LANES

NEEDS = ("torch", "coremltools", "numpy", "tokenizers", "transformers", "xllamacpp")


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(arguments):
        lanes = sorted(LANES, key=lambda lane: lane != _lane(arguments))  # that of --torch first, else as they are
        environments = [CONVERT[lane] for lane in lanes]
        run_where_installed(["agree", *arguments], needs=NEEDS, environments=environments)
    return int(importlib.import_module("coremill.verification.agree").main(arguments))


def _lane(arguments: list[str]) -> str | None:
    """What --torch says; the command itself is strict about it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--torch", nargs="?")
    lane: str | None = parser.parse_known_args(arguments)[0].torch
    return lane


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
