"""Atomic writes: a file or directory appears complete, or not at all.

While a file or directory is being written, it is next to its target as `.<name>.new-<random>` and locked by its
process. The kernel releases the lock when the process ends. The next process that writes the same target can
therefore remove what a dead process left without touching what a live one is writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from coremill.core.errors import OutputError


def check_replaceable(path: Path) -> None:
    """Check that `path` does not exist, or is a regular file.

    Raises:
        OutputError: it is something else, such as a device or a directory.
    """
    if path.exists() and not path.is_file():
        raise OutputError(
            f"{path} is not a regular file", expected="a regular file, or a new path", run=f"ls -ld {path}"
        )


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Check that no output path is an input path.

    Raises:
        OutputError: one is.
    """
    read = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path.resolve() in read:
            raise OutputError(
                f"{path} is read and would be overwritten", expected="an output path that is not an input"
            )


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` when the block succeeds; if it raises, `path` is unchanged.

    Until then the file's `name` is its path.

    Raises:
        OutputError: `path` exists and is not a regular file, or it cannot be written.
    """
    path = Path(path)
    check_replaceable(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        handle, temporary = _locked(lambda name: tempfile.mkstemp(dir=path.parent, prefix=name), path)
        # The first holds the lock.
        with os.fdopen(handle, "wb"), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)  # before the file is closed, which releases the lock
    except OSError as failure:
        _discard(temporary)
        raise _unwritable(f"cannot write {path}", path, failure) from failure
    except BaseException:
        _discard(temporary)
        raise
    _sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` with `data`; a reader sees the old bytes or the new ones, never a mixture."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Yield a new directory that replaces `folder` when the block succeeds.

    If the block raises, the new directory is removed and `folder` is unchanged. A killed process leaves the old
    directory, the new one, or (between two renames) neither, with the old one next to it; :func:`recover`, which
    the next call here runs first, restores that one. If `folder` is a symbolic link, its target is replaced.

    Raises:
        OutputError: `folder` is not a directory, or its parent is not writable.
    """
    given = Path(folder)
    folder = _followed(given)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(
            f"{folder} is not a directory", expected="a directory, or a new path", run=f"ls -ld {folder}"
        )
    if folder != given and not folder.parent.is_dir():  # creating it could write under an unmounted mount point
        raise OutputError(
            f"{given} is a link to {folder}, and {folder.parent} does not exist",
            expected="a link to a directory, or to a new path in an existing one",
            run=f"ls -ld {given}",
        )
    recover(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock, fresh = _locked(lambda name: _made_folder(folder.parent, name), folder)
    except OSError as failure:
        raise _unwritable(f"cannot write next to {folder}", folder, failure) from failure
    try:
        yield fresh
        try:
            fresh.chmod(0o755)
            for path in fresh.rglob("*"):
                if path.is_file():
                    _sync(path)
            _swap(fresh, folder)
        except OSError as failure:
            raise _unwritable(f"cannot replace {folder}", folder, failure) from failure
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


def _swap(fresh: Path, folder: Path) -> None:
    """Replace `folder` with `fresh`; if an error interrupts it, `folder` is one of the two."""
    old = _old(folder)
    if not folder.exists():
        fresh.rename(folder)
    else:
        _remove(old)
        try:
            folder.rename(old)
            fresh.rename(folder)
        finally:
            if not folder.exists():
                old.rename(folder)
        _remove(old)
    _sync_folder(folder.parent)


def recover(folder: Path) -> None:
    """Remove what dead processes left next to `folder`, and restore its last good content if it is missing.

    Raises:
        OutputError: it cannot be restored.
    """
    folder = _followed(folder)
    if _remove_leftovers(folder):
        return  # a live process is writing, and may be between its two renames
    old = _old(folder)
    if os.path.lexists(folder):
        _remove(old)
    elif old.exists():
        try:
            old.rename(folder)
        except OSError as failure:
            raise _unwritable(f"cannot restore {folder} from {old}", folder, failure) from failure


def _followed(folder: Path) -> Path:
    """Return the target of `folder` if it is a symbolic link, so that a directory on another disk stays there."""
    folder = Path(folder)
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


# --- files and directories being written, and leftovers of dead processes ---------------------------


def _locked(make: Callable[[str], tuple[int, str]], target: Path) -> tuple[int, Path]:
    """Return an open, locked descriptor of what `make` creates, given a name prefix, and its path."""
    while True:
        handle, name = make(f".{target.name}.new-")
        with contextlib.suppress(OSError):  # a file system without locks: leftovers are not removed
            fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(name).exists():  # otherwise another process removed it as a leftover before it was locked
            return handle, Path(name)
        os.close(handle)


def _made_folder(parent: Path, prefix: str) -> tuple[int, str]:
    while True:
        name = tempfile.mkdtemp(dir=parent, prefix=prefix)
        with contextlib.suppress(FileNotFoundError):  # another process removed it as a leftover
            return os.open(name, os.O_RDONLY), name


def _remove_leftovers(target: Path) -> bool:
    """Remove what dead processes were writing for `target`; return whether a live one is writing."""
    name = re.compile(re.escape(f".{target.name}.new-") + "[a-z0-9_]{8}")  # tempfile's random suffix
    found = [path for path in _siblings(target) if name.fullmatch(path.name)]
    return bool([path for path in found if not _removed_if_dead(path)])


def _siblings(target: Path) -> list[Path]:
    try:
        return list(target.parent.iterdir())
    except OSError:
        return []  # the write that follows reports the error


def _removed_if_dead(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return not os.path.lexists(path)  # already removed; otherwise, for example, another user's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except OSError:
        return False  # locked, or a file system without locks
    finally:
        os.close(handle)
    return True


def _remove(path: Path) -> None:
    """Remove a file, a directory tree, or a link but not its target; ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _discard(temporary: Path | None) -> None:
    if temporary is not None:
        temporary.unlink(missing_ok=True)


# --- the file system --------------------------------------------------------------------------------


def _unwritable(what: str, target: Path, failure: OSError) -> OutputError:
    """Return why `target` cannot be written: a file in place of a parent directory, or the system's error."""
    for above in target.parents:
        if os.path.lexists(above) and not above.is_dir():
            return OutputError(
                f"{what}: {above} is not a directory", expected="a directory, or a new path", run=f"ls -ld {above}"
            )
    return OutputError(
        f"{what}: {failure.strerror or failure}",
        expected="a writable directory with free space",
        run=f"ls -ld {target.parent}",
    )


def _sync(path: Path) -> None:
    """Flush a file, so that a rename is never on disk before the bytes that it publishes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Some file systems cannot sync a directory; their renames are as durable as they make them.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
