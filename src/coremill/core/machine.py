"""Memory and disk space of the machine: what is free, checked before the work, and what a container allows."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import shutil
from pathlib import Path

from coremill.core.errors import MachineError, OutputError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_memory_bytes() -> int:
    """Return the memory that is available without swapping; on macOS, which does not report it, all memory.

    The limit of a container is respected: /proc/meminfo has the host's figures.
    """
    available = _meminfo("MemAvailable")
    return min([_physical_bytes() if available is None else available, *_left_in_control_groups()])


def total_memory_bytes() -> int:
    """Return the memory of the machine, or of the container if that has a lower limit."""
    return min([_physical_bytes(), *(limit for limit, _ in _limits())])


def process_limit_bytes() -> int | None:
    """Return the limit that `ulimit` sets on the memory of this process and its children; None without one."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=None)


def out_of_memory_kills() -> int | None:
    """Return how many processes of this control group the kernel has killed for memory; None without a count."""
    for group in _control_groups():
        for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
            if (kills := _table(group / name).get("oom_kill")) is not None:
                return kills
    return None


def whole_megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _meminfo(name: str) -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(values[0]) * 1024 if values else None  # its "kB" is 1024 bytes


def _control_groups() -> list[Path]:
    """Return the directories of the memory control groups of this process, the innermost first.

    A container may show only its own group, as the root.
    """
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):  # version 2, version 1
            root = _CGROUP / controllers if controllers else _CGROUP
            own = root / path.lstrip("/")
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(root) and folder.is_dir()]
    return found


def _limits() -> list[tuple[int, Path]]:
    """Return the memory limits of the control groups, in bytes, with their directories."""
    limits = []
    for group in _control_groups():
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, version 1
            limit = _number(group / name)  # None for "max"
            if limit is not None:
                limits.append((limit, group))
    return limits


def _left_in_control_groups() -> list[int]:
    left = []
    for limit, group in _limits():
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        # The cache of files counts as used, and the kernel drops it when memory is needed.
        pages = _table(group / "memory.stat")
        cached = sum(pages.get(f"total_{name}", pages.get(name, 0)) for name in ("active_file", "inactive_file"))
        left.append(max(0, limit - max(0, used - cached)))
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line; empty if there is no such file."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2}


def release_memory() -> None:
    """Return memory that is no longer used to the system.

    Traced modules refer to one another, so that only the garbage collector frees them. glibc keeps freed blocks of
    up to 32 MB, which add up to gigabytes.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


_checked: list[int] = []


def largest_check_bytes() -> int | None:
    """Return the most memory that :func:`check_memory` was asked for in this process: the estimate of its work."""
    return max(_checked, default=None)


def check_memory(needed_bytes: int, *, why: str) -> None:
    """Check that `needed_bytes` of memory are available.

    Raises:
        MachineError: less is available; names both figures.
    """
    _checked.append(needed_bytes)
    if (available := available_memory_bytes()) < needed_bytes:
        raise MachineError(
            f"{whole_megabytes(available)} of memory is available",
            expected=f"{whole_megabytes(needed_bytes)}, {why}",
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
            f"{existing} has {whole_megabytes(free)} free",
            expected=f"{whole_megabytes(needed_bytes)}, {why}",
            run=f"df -h {existing}",
        )
