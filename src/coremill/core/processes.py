"""A process at work: the memory that it and its children hold, and the error if memory or a signal ends it."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from coremill.core.errors import CoremillError, CrashError, OutOfMemoryError
from coremill.core.machine import (
    available_memory_bytes,
    out_of_memory_kills,
    process_limit_bytes,
    total_memory_bytes,
    whole_megabytes,
)

SAMPLE_S = 0.05
"""How often a process is measured."""
_SEARCH_S = 0.5
"""How often its children are searched for, which reads all of /proc."""
_PROC = Path("/proc")
_HINTS: Mapping[int, str] = {
    signal.SIGBUS: (
        "SIGBUS most likely means that a file became shorter while it was read, or that the disk became full; "
    )
}
"""What a signal most likely means: SIGBUS, that a part of a mapped file is not there."""
_ADVICE = "a machine with more memory, or shorter `[shapes]`"


class ProcessWatch:
    """Measures a process that runs, with its children, and explains its end.

    `peak_anonymous_bytes` is the largest sum of their anonymous memory so far, which no file backs and the kernel
    cannot drop. It is None where there is no /proc. Memory that is held for less than SAMPLE_S may be missed.
    """

    def __init__(self, pid: int) -> None:
        self.peak_anonymous_bytes: int | None = None
        self._pid = pid
        self._pids: list[int] = [pid]
        self._searched_at = -_SEARCH_S
        self._least_available = available_memory_bytes()
        self._kills = out_of_memory_kills()

    def sample(self) -> None:
        if (now := time.monotonic()) - self._searched_at >= _SEARCH_S:
            self._searched_at = now
            self._pids = _tree(self._pid)
        self._least_available = min(self._least_available, available_memory_bytes())
        if held := sum(map(_anonymous_bytes, self._pids)):
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes or 0, held)

    def ended_by_signal(self, what: str, number: int) -> CoremillError:
        """Return the error for `what`, the process, which ended by signal `number`."""
        now = out_of_memory_kills()
        counted = self._kills is not None and now is not None and now > self._kills
        return _ended_by_signal(what, number, self._at_its_peak(), counted=counted)

    def ran_out(self, what: str, reason: str) -> OutOfMemoryError:
        """Return the error for `what`, the process, in which an allocation failed because of `reason`."""
        return OutOfMemoryError(
            f"{what} ran out of memory: {reason}; {self._at_its_peak()}", expected=_ADVICE, run="coremill doctor"
        )

    def _at_its_peak(self) -> str:
        peak = self.peak_anonymous_bytes
        held = "" if peak is None else f"it held {whole_megabytes(peak)}, and "
        return (
            f"{held}the least that was available meanwhile was {whole_megabytes(self._least_available)} of "
            f"{whole_megabytes(total_memory_bytes())}{_limit()}"
        )


def ended_by_signal(what: str, number: int) -> CoremillError:
    """Return the error for `what`, a process that was not measured, which ended by signal `number`."""
    return _ended_by_signal(what, number, _available(), counted=False)


def _ended_by_signal(what: str, number: int, memory: str, *, counted: bool) -> CoremillError:
    """Args: counted: whether a control group counted a kill for memory, which the kernel makes by SIGKILL."""
    name = signal.Signals(number).name
    if number != signal.SIGKILL:
        return CrashError(
            f"{what} crashed: {name}, {signal.strsignal(number)}; {memory}",
            expected=f"a process that ends by itself; {_HINTS.get(number, '')}its log is above",
            run="coremill doctor",
        )
    why = "because memory ran out" if counted else "most likely because memory ran out"
    return OutOfMemoryError(f"{what} was killed ({name}), {why}; {memory}", expected=_ADVICE, run="coremill doctor")


def ran_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """Return the error for an allocation of this process that failed; None if `error` is of another kind."""
    if (reason := allocation_failure(error)) is None:
        return None
    return OutOfMemoryError(
        f"memory ran out: {reason}; {_available()}",
        expected="a machine with more memory, or a smaller input",
        run="coremill doctor",
    )


def allocation_failure(error: BaseException) -> str | None:
    """Return the first line of the failed allocation that `error` is, or was raised from; None if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if (
            isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            # torch raises a RuntimeError, and has no class for it.
            or "DefaultCPUAllocator: " in text
            or os.strerror(errno.ENOMEM) in text
        ):
            return next((line.strip() for line in text.splitlines() if line.strip()), type(cause).__name__)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _available() -> str:
    available, total = whole_megabytes(available_memory_bytes()), whole_megabytes(total_memory_bytes())
    return f"{available} of {total} is available{_limit()}"


def _limit() -> str:
    limit = process_limit_bytes()
    return "" if limit is None else f"; `ulimit` allows a process {whole_megabytes(limit)}"


def held_bytes(pid: int) -> int:
    """Return the anonymous memory of a process and its descendants now; 0 where there is no /proc."""
    return sum(map(_anonymous_bytes, _tree(pid)))


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0  # it ended
    values = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(values[0]) * 1024 if values else 0  # its "kB" is 1024 bytes


def _tree(root: int) -> list[int]:
    """Return the process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir() if _PROC.is_dir() else ():
        if folder.name.isdigit():
            try:
                # After the name in parentheses, which may contain anything: state, parent.
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended
            children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:  # grows
        found += children.get(pid, [])
    return found
