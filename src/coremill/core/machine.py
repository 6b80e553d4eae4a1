"""Free memory and disk space, checked before the work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from coremill.core.errors import MachineError, OutputError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Return the memory that is available without swapping; on macOS, which does not report it, all memory.

    The limit of a container is respected: /proc/meminfo has the host's figures.
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
    return int(values[0]) * 1024 if values else None  # its "kB" is 1024 bytes


def _cgroup_available() -> int | None:
    """Return what the limit of the root control group (version 2) leaves free, or None without a limit."""
    try:
        limit, used = (_CGROUP / "memory.max").read_text().strip(), (_CGROUP / "memory.current").read_text()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


def check_memory(needed_bytes: int, *, why: str) -> None:
    """Check that `needed_bytes` of memory are available.

    Raises:
        MachineError: less is available; names both figures.
    """
    if (available := available_memory_bytes()) < needed_bytes:
        raise MachineError(
            f"{available / 1e6:,.0f} MB of memory is available",
            expected=f"{needed_bytes / 1e6:,.0f} MB, {why}",
            run="coremill doctor",
        )


def check_disk(folder: Path, needed_bytes: int, *, why: str) -> None:
    """Check that the disk of `folder`, which may not exist yet, has `needed_bytes` free.

    Raises:
        OutputError: it has less; names both figures.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    if (free := shutil.disk_usage(existing).free) < needed_bytes:
        raise OutputError(
            f"{existing} has {free / 1e6:,.0f} MB free",
            expected=f"{needed_bytes / 1e6:,.0f} MB, {why}",
            run=f"df -h {existing}",
        )
