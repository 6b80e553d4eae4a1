"""Failed allocations of a command that runs in this process."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import textwrap

import pytest

from coremill.core.errors import ConversionError
from coremill.core.processes import allocation_failure

LIMIT = 300_000_000
COMMAND = """
    from coremill.core.command import exit_on_error
    def main():
        bytearray(900_000_000)
    raise SystemExit(exit_on_error(main))
"""


def test_command_without_memory_ends_with_its_own_exit_code():
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMAND)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 33
    assert re.fullmatch(
        r"memory error: memory ran out: MemoryError; [\d,]+ MB of [\d,]+ MB is available; `ulimit` allows a "
        r"process 300 MB\n  expected: a machine with more memory, or a smaller input\n  run: coremill doctor\n",
        ended.stderr,
    )


TORCH = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)


def raised(error: Exception, cause: Exception | None) -> Exception:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("std::bad_alloc"), "std::bad_alloc"),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "[Errno 12] Cannot allocate memory"),
        (RuntimeError(TORCH + "\n\nframe 0"), TORCH),
        (RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"), ...),
        (raised(ConversionError("no graph"), RuntimeError(TORCH)), TORCH),
        (ConversionError("no graph"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (raised(ConversionError("no graph"), ValueError("memory")), None),
    ],
)
def test_failed_allocations(error, reason):
    assert allocation_failure(error) == (str(error) if reason is ... else reason)


def test_failed_allocation_that_was_handled_is_none():
    def handled():
        try:
            raise MemoryError
        except MemoryError:
            raise ConversionError("too large a table") from None

    with pytest.raises(ConversionError) as caught:
        handled()
    assert allocation_failure(caught.value) is None
