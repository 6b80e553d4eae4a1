"""Checks of output paths."""

from __future__ import annotations

import pytest

from coremill.core.errors import OutputError
from coremill.core.outputs import check_writable


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_check_writable_creates_the_directory_and_leaves_it_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a", "a/b"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^cannot write to .*/file/c: Not a directory"):
        check_writable(tmp_path / "file" / "c")
