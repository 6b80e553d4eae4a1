"""Where a command writes: checked before the work, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from coremill.core.digest import file_digest
from coremill.core.errors import ConfigError, CoremillError, OutputError
from coremill.core.layout import parity_report
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


def check_name(name: str) -> str:
    """`name`, which files are called after.

    Raises:
        ConfigError: it might leave the folder, or is no word.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return name
    raise ConfigError(f"--name {name!r}", expected="letters, digits, '.', '-' and '_', a letter or digit first")


def check_own_folder(folder: Path, digests: Callable[[Path], Mapping[str, str]], *, what: str) -> None:
    """Check that `folder` is nothing, empty, or as a command of ours wrote it: then it may be replaced.

    Args:
        digests: reads parity.json: the folder's other files, with their digests.
        what: the folder is for.

    Raises:
        OutputError: something else is there, or something was changed; it is left.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    expected = f"nothing, or a folder of {what} that this command wrote, to replace it"
    if not folder.is_dir():
        raise OutputError(f"{folder} is in the way", expected=expected, run=f"ls -ld {folder}")
    report = parity_report(folder)
    try:
        known = dict(digests(report))
    except CoremillError as failure:
        raise OutputError(
            f"{folder} is no folder of coremill's {what}: {failure.found}", expected=expected, run=f"ls -l {folder}"
        ) from failure
    for path in sorted(folder.iterdir()):
        if path == report or (path.is_file() and known.get(path.name) == file_digest(path)):
            continue
        found = "coremill did not write" if path.name not in known else "was changed since"
        raise OutputError(f"{folder} holds {path.name}, which {found}", expected=expected, run=f"ls -l {folder}")


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
