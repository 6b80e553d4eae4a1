"""What this machine has free, asked before work that would not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from coremill.core.errors import MachineError, OutputError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Memory that can be had without swapping; where the system does not say (macOS), all that there is.

    A container's own limit counts: the system's figures are the host's.
    """
    available = _meminfo_available()
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limited = _cgroup_available()
    return available if limited is None else min(available, limited)


def _meminfo_available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(values[0]) * 1024 if values else None  # "kB" there are 1024 bytes


def _cgroup_available() -> int | None:
    """What the control group (version 2) that this process sees as its root leaves free; None without a limit."""
    try:
        limit, used = (_CGROUP / "memory.max").read_text().strip(), (_CGROUP / "memory.current").read_text()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


def check_memory(needed_bytes: int, *, why: str) -> None:
    """Check that `needed_bytes` of memory can be had.

    Raises:
        MachineError: there is less; names both.
    """
    if (available := available_memory_bytes()) < needed_bytes:
        raise MachineError(
            f"{available / 1e6:,.0f} MB of memory are available",
            expected=f"{needed_bytes / 1e6:,.0f} MB, {why}",
            run="coremill doctor",
        )


def check_disk(folder: Path, needed_bytes: int, *, why: str) -> None:
    """Check that the disk of `folder`, which need not exist yet, has `needed_bytes` free.

    Raises:
        OutputError: it has less; names both.
    """
    existing = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
    if (free := shutil.disk_usage(existing).free) < needed_bytes:
        raise OutputError(
            f"{existing} has {free / 1e6:,.0f} MB free",
            expected=f"{needed_bytes / 1e6:,.0f} MB, {why}",
            run=f"df -h {existing}",
        )
