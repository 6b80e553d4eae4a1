"""Free memory and disk space: the system's figures, a container's limit, and the errors."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from coremill.core import machine
from coremill.core.errors import MachineError, OutputError
from coremill.core.machine import available_memory_bytes, check_disk, check_memory


@pytest.fixture
def system(tmp_path, monkeypatch):
    """An empty /proc/meminfo and control group."""
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    return tmp_path


def test_available_memory_of_this_machine():
    assert 50e6 < available_memory_bytes() < 1e14


def test_available_memory_excludes_swap(system):
    (system / "meminfo").write_text(
        "MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:   1500 kB\nSwapFree: 9 kB\n"
    )
    assert available_memory_bytes() == 1500 * 1024


def test_without_meminfo_all_memory_is_available(system):
    # As on macOS. On Linux the total of sysconf equals that of /proc/meminfo.
    total = available_memory_bytes()
    if sys.platform == "linux":
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
        assert total == int(line.split()[1]) * 1024
    assert total > 50e6


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "7", 4096), ("3000", "1000", 2000), ("3000", "5000", 0), ("9999", "0", 4096)],
)
def test_limit_of_a_container_is_respected(system, limit, used, expected):
    (system / "meminfo").write_text("MemAvailable: 4 kB\n")
    (system / "memory.max").write_text(limit + "\n")
    (system / "memory.current").write_text(used + "\n")
    assert available_memory_bytes() == expected


def test_too_little_memory_names_both_figures(monkeypatch):
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1_999_000_000)
    check_memory(1_999_000_000, why="for nothing")
    with pytest.raises(MachineError) as caught:
        check_memory(2_500_000_000, why="for a shape")
    assert str(caught.value) == (
        "1,999 MB of memory is available\n  expected: 2,500 MB, for a shape\n  run: coremill doctor"
    )


def test_too_little_disk_names_both_figures(monkeypatch, tmp_path):
    check_disk(tmp_path / "new" / "folders", 1, why="for nothing")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 3_000_000))
    with pytest.raises(OutputError) as caught:
        check_disk(tmp_path / "new" / "folders", 4_000_000, why="for a file")
    assert str(caught.value) == (f"{tmp_path} has 3 MB free\n  expected: 4 MB, for a file\n  run: df -h {tmp_path}")
