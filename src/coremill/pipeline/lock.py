"""The run lock: one build of a run at a time; the second is refused, and told who holds it."""

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

TOKEN_VARIABLE = "COREMILL_RUN_LOCK"
"""Set for the stages of a build, so that they know the lock is held for them."""


class Holder(Record):
    """Who holds the lock; written into the lock file for those who are refused."""

    pid: int
    since: str
    token: str


class RunLock:
    """An exclusive lock on `path`, released by the kernel when the process ends, however it ends.

    A process started by the holder with :data:`TOKEN_VARIABLE` in its environment shares the lock.

    Raises:
        RunLockedError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(self._file)
            os.close(self._file)
            token = os.environ.get(TOKEN_VARIABLE)
            if holder is not None and token == holder.token:
                self.token = holder.token
                self._file = -1
                return
            who = f"process {holder.pid}, since {holder.since}" if holder else "another process"
            raise RunLockedError(
                f"{path} is held by {who}: it is building the same run",
                expected="one build of a run at a time",
                run="the same command again once that build has ended",
            ) from None
        self.token = secrets.token_hex(16)
        since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, msgspec.json.encode(Holder(pid=os.getpid(), since=since, token=self.token)), 0)

    def release(self) -> None:
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _read_holder(file: int) -> Holder | None:
    """The holder, or None in the moment between its taking the lock and its writing its name."""
    data = os.pread(file, 4096, 0)
    return msgspec.json.decode(data, type=Holder) if data else None
