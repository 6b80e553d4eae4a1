"""Checks of output paths, and atomic writes of several files."""

from __future__ import annotations

from pathlib import Path

import pytest

from coremill.core.errors import OutputError
from coremill.core.outputs import check_writable, write_together


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_check_writable_creates_the_directory_and_leaves_it_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a", "a/b"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^cannot write to .*/file/c: Not a directory"):
        check_writable(tmp_path / "file" / "c")


def test_files_are_written_together(tmp_path):
    write_together({tmp_path / "new" / "a": b"1", tmp_path / "new" / "b": b"2"})
    assert names(tmp_path) == ["new", "new/a", "new/b"]
    assert (tmp_path / "new" / "b").read_bytes() == b"2"


@pytest.mark.parametrize("blocked", [Path("b"), Path("/dev/full")], ids=["directory", "device"])
def test_no_file_is_written_if_one_cannot_be(tmp_path, blocked):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError, match=rf"{blocked} is not a regular file"):
        write_together({tmp_path / "a": b"new", tmp_path / blocked: b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a", "b"]
