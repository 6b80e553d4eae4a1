"""Checks of output paths before the work."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from coremill.core.digest import file_digest
from coremill.core.errors import ConfigError, CoremillError, OutputError
from coremill.core.layout import parity_report


def check_writable(folder: Path) -> None:
    """Create `folder` if it is missing, and check that files can be created in it.

    Raises:
        OutputError: it is not a directory, or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".coremill-"):
            pass
    except OSError as failure:
        raise OutputError(
            f"cannot write to {folder}: {failure.strerror}", expected="a writable directory", run=f"ls -ld {folder}"
        ) from failure


def check_name(name: str) -> str:
    """Return `name`, which becomes part of file names.

    Raises:
        ConfigError: it contains a path separator or another character that is not allowed.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return name
    raise ConfigError(
        f"--name {name!r}", expected="letters, digits, '.', '-' and '_', starting with a letter or digit"
    )


def check_own_folder(folder: Path, digests: Callable[[Path], Mapping[str, str]], *, what: str) -> None:
    """Check that `folder` is missing, empty, or exactly as coremill wrote it, so that it may be replaced.

    Args:
        digests: reads parity.json and returns the digests of the other files.
        what: the directory contains, for the error.

    Raises:
        OutputError: the directory contains another file or a changed one; nothing is removed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    expected = f"an empty or missing directory, or one with {what} that this command wrote"
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a directory", expected=expected, run=f"ls -ld {folder}")
    report = parity_report(folder)
    try:
        known = dict(digests(report))
    except CoremillError as failure:
        raise OutputError(
            f"{folder} does not contain coremill's {what}: {failure.found}",
            expected=expected,
            run=f"ls -l {folder}",
        ) from failure
    for path in sorted(folder.iterdir()):
        if path == report or (path.is_file() and known.get(path.name) == file_digest(path)):
            continue
        found = "coremill did not write" if path.name not in known else "has changed since"
        raise OutputError(f"{folder} contains {path.name}, which {found}", expected=expected, run=f"ls -l {folder}")
