"""The locks of a run: one build at a time, and each stage written by one process at a time.

A stage has a lock of its own because it is a process of its own. It can outlive a build that was killed, and no
other build may start while it writes.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType

import msgspec

from coremill.core.documents import Record
from coremill.core.errors import RunLockedError
from coremill.core.layout import RunLayout

TOKEN_VARIABLE = "COREMILL_RUN_LOCK"
"""Set for the stages of a build, which share its lock."""


class Holder(Record):
    """The holder of a lock; recorded in its file for the error message of other processes."""

    pid: int
    since: str
    token: str


class _FileLock:
    """An exclusive lock on a file. The kernel releases it when the process ends, even if it is killed.

    Raises:
        RunLockedError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_current(path)
        self.token = secrets.token_hex(16)
        since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, msgspec.json.encode(Holder(pid=os.getpid(), since=since, token=self.token)), 0)

    def release(self) -> None:
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> _FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class WriterLock(_FileLock):
    """Held by a stage of the run while it writes."""

    def __init__(self, layout: RunLayout, stage: str, lane: str | None) -> None:
        super().__init__(layout.writer_lock(stage, lane))


class RunLock(_FileLock):
    """Held by a build of the run from start to end.

    A process with the build's token in :data:`TOKEN_VARIABLE` is part of that build and shares the lock. Other
    processes also check that no stage of an earlier, killed build is still writing.
    """

    def __init__(self, layout: RunLayout) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        if token is not None and _holder_of(layout.lock) == token:
            self._file, self.token = -1, token
            return
        super().__init__(layout.lock)
        try:
            for path in layout.writers.glob("*.lock"):
                _FileLock(path).release()
        except RunLockedError:
            self.release()
            raise


def _open_current(path: Path) -> int:
    """Return a locked descriptor of the file at `path`; if it is removed while it is being locked, try again."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(file)
            os.close(file)
            by = f"process {holder.pid}, since {holder.since}" if holder else "another process"
            raise RunLockedError(
                f"{path} is held by {by}, which is building the same run",
                expected="one build of a run at a time",
                run="the same command again after that build ends",
            ) from None
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
            return file
        os.close(file)


def _holder_of(path: Path) -> str | None:
    """Return the token of the holder of the lock at `path`; None if it is free."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read_holder(file)
        return holder.token if holder is not None else None
    else:
        return None  # it is free, and any content is that of a killed process
    finally:
        os.close(file)


def _read_holder(file: int) -> Holder | None:
    """Return the holder; None if it has taken the lock and not yet written the file."""
    data = os.pread(file, 4096, 0)
    return msgspec.json.decode(data, type=Holder) if data else None
