"""How a command starts and ends: its parser, and the one place where an error becomes a text and an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from coremill.core.errors import CoremillError, exit_code_table

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the signal's number."""


def command_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, whose --help ends in the exit codes."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="exit codes:\n" + exit_code_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_on_error(main: Callable[[], int]) -> int:
    """Run `main`; a CoremillError is printed without a traceback and becomes its exit code.

    Any other exception is a defect of coremill and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return main()
    except CoremillError as error:
        sys.stderr.write(f"{error.kind} error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
