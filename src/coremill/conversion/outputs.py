"""Where a command writes: checked before the work, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from coremill.core.errors import OutputError


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


def check_room(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of `folder` has `needed_bytes` free.

    Raises:
        OutputError: it has less.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{folder} has {free_bytes / 1e6:,.0f} MB free",
            expected=f"{needed_bytes / 1e6:,.0f} MB, for the package and the copies that a conversion makes",
            run=f"df -h {folder}",
        )


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files of one folder, or none of them: all are on disk before the first takes its place.

    Raises:
        OutputError: a file cannot be written.
    """
    folders = {path.parent for path in files}
    (folder,) = folders
    check_writable(folder)
    if in_the_way := [path for path in files if path.is_dir()]:
        raise OutputError(f"{in_the_way[0]} is a folder", expected="a file, or nothing", run=f"ls -la {folder}")
    with staging(folder) as fresh:
        try:
            for path, data in files.items():
                _write_synced(fresh / path.name, data)
            for path in files:
                (fresh / path.name).replace(path)
        except OSError as failure:
            raise OutputError(
                f"cannot write {failure.filename}: {failure.strerror}",
                expected="a writable folder with room, and files where files are to be",
                run=f"ls -la {folder}",
            ) from failure


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A fresh directory in `folder`, on the same file system, that is removed in the end."""
    fresh = Path(tempfile.mkdtemp(dir=folder, prefix=".coremill-"))
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def publish_directory(fresh: Path, target: Path) -> None:
    """Rename the whole directory `fresh` to `target`, in the place of what is there.

    A process killed in between leaves the old directory, the new one, or neither; never a part of one.

    Raises:
        OutputError: the renaming fails; the old directory is put back.
    """
    for path in fresh.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a rename must not outlive the bytes that it publishes
    with staging(target.parent) as aside:
        old = aside / target.name
        try:
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        except OSError as failure:
            if old.exists():
                old.rename(target)
            raise OutputError(
                f"cannot write {target}: {failure.strerror}",
                expected="a writable folder",
                run=f"ls -ld {target.parent}",
            ) from failure


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
