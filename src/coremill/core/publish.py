"""Atomic publishing: a file or a folder appears whole or not at all. The one owner of how that is done.

What is being written stands beside its place as `.<name>.new-<random>`, locked by its process. The kernel releases
the lock when the process ends, however it ends: so the next one that writes there tells what a dead process left,
which it removes, from what a living one is writing.
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
        _remove_leftovers(path)
        handle, temporary = _locked(lambda name: tempfile.mkstemp(dir=path.parent, prefix=name), path)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)  # before the file is closed, which ends the lock
    except OSError as failure:
        _discard(temporary)
        raise _unwritable(f"cannot write {path}", path, failure) from failure
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
    folder, the new one, or (between two renames) none with the old one beside it; the next to publish there, or
    :func:`recover`, puts that back. Where `folder` is a link, the link stays and what it leads to is replaced.

    Raises:
        OutputError: `folder` is in the way, or nothing can be written beside it.
    """
    given = Path(folder)
    folder = _followed(given)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder} is in the way", expected="a folder, or nothing", run=f"ls -ld {folder}")
    if folder != given and not folder.parent.is_dir():  # made anew, it would stand below a disk that is not mounted
        raise OutputError(
            f"{given} is a link to {folder}, and {folder.parent} is not there",
            expected="a link to a folder, or to where one can be made",
            run=f"ls -ld {given}",
        )
    recover(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock, fresh = _locked(lambda name: _made_folder(folder.parent, name), folder)
    except OSError as failure:
        raise _unwritable(f"cannot write beside {folder}", folder, failure) from failure
    try:
        yield fresh
        try:
            fresh.chmod(0o755)
            for path in fresh.rglob("*"):
                if path.is_file():
                    _sync(path)
            _swap(fresh, folder)
        except OSError as failure:
            raise _unwritable(f"cannot put a new folder in the place of {folder}", folder, failure) from failure
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


def _swap(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`; if it is interrupted, one of the two stands there."""
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
    """Clear what dead processes left beside `folder`, and put its last good content back if it is missing.

    Raises:
        OutputError: it cannot be put back.
    """
    folder = _followed(folder)
    if _remove_leftovers(folder):
        return  # it may be exchanging the two at this moment
    old = _old(folder)
    if os.path.lexists(folder):
        _remove(old)
    elif old.exists():
        try:
            old.rename(folder)
        except OSError as failure:
            raise _unwritable(f"cannot put {old} back", folder, failure) from failure


def _followed(folder: Path) -> Path:
    """What `folder` leads to where it is a link: a folder on another disk stays where it is."""
    folder = Path(folder)
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


# --- what is being written, and what dead processes left --------------------------------------------


def _locked(make: Callable[[str], tuple[int, str]], place: Path) -> tuple[int, Path]:
    """What `make` makes, given how its name begins, with an open, locked descriptor of it."""
    while True:
        handle, name = make(f".{place.name}.new-")
        with contextlib.suppress(OSError):  # a file system without locks: nothing is taken for a leftover there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(name).exists():  # else another process took it for a leftover before it was locked
            return handle, Path(name)
        os.close(handle)


def _made_folder(parent: Path, prefix: str) -> tuple[int, str]:
    while True:
        name = tempfile.mkdtemp(dir=parent, prefix=prefix)
        with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover
            return os.open(name, os.O_RDONLY), name


def _remove_leftovers(place: Path) -> bool:
    """Remove what dead processes were writing for `place`; whether a living one is writing."""
    of_place = re.compile(re.escape(f".{place.name}.new-") + "[a-z0-9_]{8}")  # as tempfile makes names
    found = [path for path in _beside(place) if of_place.fullmatch(path.name)]
    return bool([path for path in found if not _removed_if_dead(path)])


def _beside(place: Path) -> list[Path]:
    try:
        return list(place.parent.iterdir())
    except OSError:
        return []  # what is to be written there says what is wrong


def _removed_if_dead(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return not os.path.lexists(path)  # gone since; or another user's, say
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except OSError:
        return False  # locked, or a file system without locks
    finally:
        os.close(handle)
    return True


def _remove(path: Path) -> None:
    """A file, a folder with all in it, or a link alone; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _discard(temporary: Path | None) -> None:
    if temporary is not None:
        temporary.unlink(missing_ok=True)


# --- the file system --------------------------------------------------------------------------------


def _unwritable(what: str, place: Path, failure: OSError) -> OutputError:
    """What hindered writing at `place`: a file where a folder should be, or what the system says."""
    for above in place.parents:
        if os.path.lexists(above) and not above.is_dir():
            return OutputError(
                f"{what}: {above} is no folder", expected="a folder, or nothing", run=f"ls -ld {above}"
            )
    return OutputError(
        f"{what}: {failure.strerror or failure}",
        expected="a writable place with room",
        run=f"ls -ld {place.parent}",
    )


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
