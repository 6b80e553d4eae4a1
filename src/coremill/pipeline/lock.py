"""The locks of a run: one build at a time, and one stage writing at a time; the second is told who is first.

Two locks, because a build and its stages are processes of their own: a stage may outlive a build that was killed,
and as long as it writes no other build may begin.
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
"""Set for the stages of a build, so that they know the run is held for them."""


class Holder(Record):
    """Who holds a lock; written into its file for those who are refused."""

    pid: int
    since: str
    token: str


class _FileLock:
    """An exclusive lock on a file, released by the kernel when the process ends, however it ends.

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

    def __init__(self, layout: RunLayout) -> None:
        super().__init__(layout.writer_lock)


class RunLock(_FileLock):
    """Held by a build of the run for its whole time.

    A process with the build's token in :data:`TOKEN_VARIABLE` is a part of that build, and shares the lock. Whoever
    takes it anew makes sure that no stage of an earlier, killed build is still writing.
    """

    def __init__(self, layout: RunLayout) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        if token is not None and _holder_of(layout.lock) == token:
            self._file, self.token = -1, token
            return
        super().__init__(layout.lock)
        try:
            WriterLock(layout).release()
        except RunLockedError:
            self.release()
            raise


def _open_current(path: Path) -> int:
    """An open, locked file that is the one at `path` now: it may have been removed while we took the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(file)
            os.close(file)
            who = f"process {holder.pid}, since {holder.since}" if holder else "another process"
            raise RunLockedError(
                f"{path} is held by {who}: it is building the same run",
                expected="one build of a run at a time",
                run="the same command again once that build has ended",
            ) from None
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
            return file
        os.close(file)


def _holder_of(path: Path) -> str | None:
    """The token of whoever holds the lock at `path`; None if no process does."""
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
        return None  # Free: what stands in the file is of a process that was killed.
    finally:
        os.close(file)


def _read_holder(file: int) -> Holder | None:
    """The holder, or None in the moment between its taking the lock and its writing its name."""
    data = os.pread(file, 4096, 0)
    return msgspec.json.decode(data, type=Holder) if data else None
