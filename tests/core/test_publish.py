"""Atomic publishing: a reader sees the old or the new, whatever interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from coremill.core.errors import OutputError
from coremill.core.publish import check_apart, publishing, recover, replacing, write_atomic


def entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_failed_write_leaves_the_old_bytes_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "tree.json"
    write_atomic(path, b"old")

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OutputError) as caught:
        write_atomic(path, b"new")
    assert caught.value.exit_code == 52
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device\n"
        f"  expected: a writable place with room\n  run: ls -ld {tmp_path}"
    )
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["tree.json"]


def test_an_interrupted_write_leaves_the_old_bytes(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_bytes(), entries(tmp_path)) == (b"old", ["f"])


@pytest.mark.parametrize("what", ["folder", "device"])
def test_what_is_no_file_is_not_replaced(tmp_path, what):
    path = tmp_path if what == "folder" else Path(os.devnull)
    with pytest.raises(OutputError, match="is in the way"):
        write_atomic(path, b"new")
    assert path.exists()


def test_a_published_folder_replaces_the_old_one_whole(tmp_path):
    folder = tmp_path / "stage"
    for name in ("a", "b"):
        with publishing(folder) as fresh:
            (fresh / name).write_text(name)
    assert (entries(folder), entries(tmp_path)) == (["b"], ["stage"])


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "stage").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"), publishing(tmp_path / "stage"):
        pass
    assert (tmp_path / "stage").read_text() == "mine"


@pytest.mark.parametrize("interrupt", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupted_exchange_puts_the_old_folder_back(tmp_path, monkeypatch, interrupt, failing):
    folder = tmp_path / "stage"
    with publishing(folder) as fresh:
        (fresh / "a").write_text("old")
    rename, calls = Path.rename, []

    def fail(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise interrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(interrupt)), publishing(folder) as fresh:
        (fresh / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    assert entries(tmp_path) == ["stage"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from coremill.core.publish import check_apart, publishing
    folder = Path(sys.argv[1])
    rename = Path.rename

    def rename_and_die(source, target):
        rename(source, target)
        if sys.argv[2] == "between" and source == folder:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = rename_and_die
    with publishing(folder) as fresh:
        (fresh / "a").write_text("new")
        if sys.argv[2] == "within":
            os.kill(os.getpid(), signal.SIGKILL)
        (fresh / "b").write_text("new")
"""


@pytest.mark.parametrize("moment", ["within", "between"])
def test_a_killed_process_leaves_the_last_good_folder(tmp_path, moment):
    folder = tmp_path / "stage"
    with publishing(folder) as fresh:
        (fresh / "a").write_text("old")
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    ended = subprocess.run([sys.executable, script, folder, moment], check=False)
    assert ended.returncode == -signal.SIGKILL
    recover(folder)
    assert {entry.name: entry.read_text() for entry in folder.iterdir()} == {"a": "old"}
    assert entries(tmp_path) == ["killed.py", "stage"]


def test_a_killed_first_process_leaves_nothing_that_looks_finished(tmp_path):
    folder = tmp_path / "stage"
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    subprocess.run([sys.executable, script, folder, "within"], check=False)
    assert not folder.exists()
    recover(folder)
    assert entries(tmp_path) == ["killed.py"]


def test_two_writers_never_share_a_folder(tmp_path):
    with publishing(tmp_path / "stage") as first, publishing(tmp_path / "stage") as second:
        assert first != second
        (first / "a").write_text("1")
        (second / "b").write_text("2")
    assert entries(tmp_path / "stage") == ["a"]


def test_an_output_in_the_place_of_an_input_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OutputError) as caught:
        check_apart([tmp_path / "b", tmp_path / "." / "a"], [None, tmp_path / "a"])
    assert str(caught.value) == (
        f"{tmp_path / 'a'} is read and would be overwritten\n  expected: an output beside the inputs"
    )
    check_apart([tmp_path / "b"], [tmp_path / "a"])
