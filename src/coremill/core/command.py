"""How a command starts and ends: its parser, and the one function that turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable

from coremill.core.errors import CoremillError
from coremill.core.processes import ran_out_of_memory

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells: 128 plus the signal's number."""
PIPE_CLOSED = 141
"""Exit code if the reader of the output has gone, as in `coremill --help | head -1`: 128 plus SIGPIPE's number."""


def command_parser(command: str, description: str | None, *, example: str) -> argparse.ArgumentParser:
    """Return the parser of `coremill <command>`; its help names the command as it was typed and ends in an example.

    Args:
        command: the subcommand's name, such as `export` or `mil run`.
        description: printed before the options.
        example: arguments that a user could type after the command.
    """
    typed = _typed(command)
    return argparse.ArgumentParser(
        prog=typed,
        description=description,
        epilog=f"example:\n  {typed} {example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _typed(command: str) -> str:
    """Return `python -m <module>` if the command was started by its module's name, else `coremill <command>`."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.startswith("coremill.") and not spec.name.endswith(".__main__"):
        return f"python -m {spec.name}"
    return f"coremill {command}"


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def exit_on_error(main: Callable[[], int]) -> int:
    """Run `main` and return the exit code: its own, or that of the CoremillError that it raised, which is printed.

    A failed allocation becomes one. Any other exception is a defect of coremill and keeps its traceback.
    """
    log_to_stderr()
    try:
        try:
            return _exit_code(main)
        finally:
            sys.stdout.flush()  # at interpreter exit, a closed pipe would become a traceback
    except BrokenPipeError:
        if not _discard_closed_streams():
            raise  # another pipe, such as that of a child process
        return PIPE_CLOSED
    except SystemExit as stop:
        # rich catches a closed pipe itself and raises SystemExit(1).
        if isinstance(stop.__context__, BrokenPipeError):
            return PIPE_CLOSED
        raise


def _exit_code(main: Callable[[], int]) -> int:
    try:
        return main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Exception as failure:
        error = ran_out_of_memory(failure) or failure
        if not isinstance(error, CoremillError):
            raise
        sys.stderr.write(f"{error.kind} error: {error}\n")
        return error.exit_code


def _discard_closed_streams() -> bool:
    """Redirect stdout and stderr to the null device if their reader has gone; whether one was redirected."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _reader_has_gone(stream.fileno())]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _reader_has_gone(descriptor: int) -> bool:
    pipe = select.poll()
    pipe.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0))
