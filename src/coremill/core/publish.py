"""Atomic publishing: a file or a folder appears whole or not at all. The one owner of how that is done."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from coremill.core.errors import OutputError


def check_replaceable(path: Path) -> None:
    """Check that `path` is nothing, or a file that may be replaced.

    Raises:
        OutputError: it is something other than a regular file (a device, a folder).
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is in the way", expected="a regular file, or nothing", run=f"ls -ld {path}")


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Check that no output would take the place of an input, before anything is read.

    Raises:
        OutputError: one would.
    """
    read = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path.resolve() in read:
            raise OutputError(f"{path} is read and would be overwritten", expected="an output beside the inputs")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; if it raises, `path` stays as it was.

    Raises:
        OutputError: `path` is something other than a regular file (a device, a folder), or cannot be written.
    """
    path = Path(path)
    check_replaceable(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.new-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as failure:
        _discard(temporary)
        raise OutputError(
            f"cannot write {path}: {failure.strerror or failure}",
            expected="a writable place with room",
            run=f"ls -ld {path.parent}",
        ) from failure
    except BaseException:
        _discard(temporary)
        raise
    _sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` with `data`; a reader sees the old bytes or the new ones, never a part."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place when the block ends well.

    If the block raises, the fresh folder is removed and `folder` stays as it was. A killed process leaves the old
    folder, the new one, or (between two renames) none with the old one beside it, which :func:`recover` puts back.

    Raises:
        OutputError: `folder` is in the way, or nothing can be written beside it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is in the way", expected="a folder, or nothing", run=f"ls -ld {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.new-"))
    except OSError as failure:
        raise OutputError(
            f"cannot write beside {folder}: {failure.strerror}",
            expected="a writable place with room",
            run=f"ls -ld {folder.parent}",
        ) from failure
    try:
        yield fresh
        fresh.chmod(0o755)
        for path in fresh.rglob("*"):
            if path.is_file():
                _sync(path)
        _swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`; if it is interrupted, one of the two stands there."""
    old = _old(folder)
    if not folder.exists():
        fresh.rename(folder)
    else:
        shutil.rmtree(old, ignore_errors=True)
        try:
            folder.rename(old)
            fresh.rename(folder)
        finally:
            if not folder.exists():
                old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(folder.parent)


def recover(folder: Path) -> None:
    """Clear what killed processes left beside `folder`, and put its last good content back if it is missing.

    Only for one who knows that nobody is writing there.
    """
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (old, *folder.parent.glob(f".{folder.name}.new-*")):
        if leftover.exists():
            shutil.rmtree(leftover)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _discard(temporary: Path | None) -> None:
    if temporary is not None:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, so that a rename never outlives the bytes that it publishes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Some file systems refuse to sync a folder; there the rename is as durable as they make it.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
