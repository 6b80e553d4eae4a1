"""How a command ends: the one place where an error becomes text on stderr and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from coremill.core.errors import CoremillError


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
