"""Free memory and disk space: the system's figures, a container's limit, and the errors."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from coremill.core import machine
from coremill.core.errors import MachineError, OutputError
from coremill.core.machine import (
    available_memory_bytes,
    check_disk,
    check_memory,
    out_of_memory_kills,
    total_memory_bytes,
)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """An empty /proc/meminfo and control group."""
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
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


@pytest.fixture
def group(system, monkeypatch):
    """Write the files of a control group, and name it as this process's."""
    (system / "meminfo").write_text("MemAvailable: 4 kB\n")

    def write(own: str, folder: str, **files: str):
        (system / "own").write_text(f"1:cpu:/x\n{own}\n")
        monkeypatch.setattr(machine, "_OWN_CGROUP", system / "own")
        (system / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (system / folder / f"memory.{name}").write_text(text + "\n")

    return write


def test_lowest_limit_of_nested_groups_counts(group):
    group("0::/outer/inner", "outer", max="2000", current="500")
    group("0::/outer/inner", "outer/inner", max="1900", current="100")
    assert available_memory_bytes() == 1500
    assert total_memory_bytes() == 1900


def test_limit_of_version_1(group):
    group("4:memory:/box", "memory/box", limit_in_bytes="3000", usage_in_bytes="1000", oom_control="oom_kill 3")
    group("4:memory:/box", "memory", limit_in_bytes="9223372036854771712", usage_in_bytes="5000")
    assert (available_memory_bytes(), total_memory_bytes(), out_of_memory_kills()) == (2000, 3000, 3)


def test_group_of_the_host_that_a_container_does_not_show(group):
    group("0::/docker/1234", "", max="3000", current="1000", events="oom 4\noom_kill 2")
    assert (available_memory_bytes(), out_of_memory_kills()) == (2000, 2)


def test_cached_files_count_as_available(group):
    pages = "anon 100\nactive_file 700\ninactive_file 100\n"
    group("0::/", "", max="3000", current="1000", stat=pages)
    assert available_memory_bytes() == 2800
    pages += "total_active_file 50"
    group("4:memory:/", "memory", limit_in_bytes="3000", usage_in_bytes="1000", stat=pages)
    assert available_memory_bytes() == 3000 - 1000 + 50 + 100


def test_without_a_counter_kills_are_unknown(system):
    assert out_of_memory_kills() is None
