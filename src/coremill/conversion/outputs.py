"""Where a command writes: checked before the work, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from coremill.core.errors import OutputError
from coremill.core.publish import replacing


def check_writable(folder: Path) -> None:
    """Make `folder` if need be, and check that files can be made in it.

    Raises:
        OutputError: something is in the way, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".coremill-"):
            pass
    except OSError as failure:
        raise OutputError(
            f"cannot write to {folder}: {failure.strerror}", expected="a writable folder", run=f"ls -ld {folder}"
        ) from failure


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files, or none of them: all are on disk before the first takes its place.

    Raises:
        OutputError: a file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for path, data in files.items():
            file = stack.enter_context(replacing(path))
            file.write(data)
            file.flush()  # a full disk shows now, while every old file stands
            os.fsync(file.fileno())
