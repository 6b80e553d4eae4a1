"""Atomic writes: a reader sees the old or the new content, whatever interrupts the writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from coremill.core.errors import OutputError
from coremill.core.publish import check_apart, publishing, recover, replacing, write_atomic


def entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_failed_write_leaves_the_old_bytes_and_no_other_file(tmp_path, monkeypatch):
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
        f"  expected: a writable directory with free space\n  run: ls -ld {tmp_path}"
    )
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["tree.json"]


def test_interrupted_write_leaves_the_old_bytes(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_bytes(), entries(tmp_path)) == (b"old", ["f"])


@pytest.mark.parametrize("what", ["directory", "device"])
def test_only_regular_files_are_replaced(tmp_path, what):
    path = tmp_path if what == "directory" else Path(os.devnull)
    with pytest.raises(OutputError, match="is not a regular file"):
        write_atomic(path, b"new")
    assert path.exists()


def test_published_directory_replaces_the_old_one(tmp_path):
    folder = tmp_path / "stage"
    for name in ("a", "b"):
        with publishing(folder) as fresh:
            (fresh / name).write_text(name)
    assert (entries(folder), entries(tmp_path)) == (["b"], ["stage"])


def test_file_is_not_replaced_by_a_directory(tmp_path):
    (tmp_path / "stage").write_text("mine")
    with pytest.raises(OutputError, match="is not a directory"), publishing(tmp_path / "stage"):
        pass
    assert (tmp_path / "stage").read_text() == "mine"


@pytest.mark.parametrize("interrupt", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_interrupted_swap_restores_the_old_directory(tmp_path, monkeypatch, interrupt, failing):
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
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught, publishing(folder) as fresh:
        (fresh / "a").write_text("new")
    if isinstance(interrupt, OSError):
        assert str(caught.value) == (
            f"cannot replace {folder}: Input/output error\n"
            f"  expected: a writable directory with free space\n  run: ls -ld {tmp_path}"
        )
    assert (folder / "a").read_text() == "old"
    assert entries(tmp_path) == ["stage"]


@pytest.mark.parametrize("write", ["file", "directory"])
def test_parent_that_is_a_file_is_reported(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / "below" / "x"
    with pytest.raises(OutputError) as caught, (replacing if write == "file" else publishing)(path):
        pass
    what = f"cannot write {path}" if write == "file" else f"cannot write next to {path}"
    assert str(caught.value) == (
        f"{what}: {tmp_path / 'file'} is not a directory\n"
        f"  expected: a directory, or a new path\n  run: ls -ld {tmp_path / 'file'}"
    )
    assert (tmp_path / "file").read_text() == "mine"


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from coremill.core.publish import publishing
    folder = Path(sys.argv[1])
    rename = Path.rename

    def rename_and_die(source, target):
        rename(source, target)
        if sys.argv[2] == "between" and source == folder.resolve():
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = rename_and_die
    with publishing(folder) as fresh:
        (fresh / "a").write_text("new")
        if sys.argv[2] == "within":
            os.kill(os.getpid(), signal.SIGKILL)
        (fresh / "b").write_text("new")
"""


def run_killed(folder, moment):
    """Run a process that is killed while it publishes `folder`."""
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), folder, moment], check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize("then", ["recover", "publish"])
@pytest.mark.parametrize("moment", ["within", "between"])
@pytest.mark.parametrize("link", [False, True], ids=["directory", "link"])
def test_last_good_directory_is_restored_after_a_kill(tmp_path, link, moment, then):
    """The next writer restores it, even if it fails."""
    target = folder = tmp_path / "stage"
    if link:
        target = tmp_path / "disk" / "stage"
        target.mkdir(parents=True)
        folder.symlink_to(target)
    with publishing(folder) as fresh:
        (fresh / "a").write_text("old")
    run_killed(folder, moment)
    assert entries(target.parent) != ["stage"]
    if then == "recover":
        recover(folder)
    else:
        with pytest.raises(ZeroDivisionError), publishing(folder) as fresh:
            raise ZeroDivisionError
    assert {entry.name: entry.read_text() for entry in folder.iterdir()} == {"a": "old"}
    assert entries(target.parent) == ["stage"]
    assert folder.is_symlink() == link


def test_kill_before_the_first_publication_leaves_no_target(tmp_path):
    folder = tmp_path / "stage"
    run_killed(folder, "within")
    assert not folder.exists()
    assert len(entries(tmp_path)) == 1
    recover(folder)
    assert entries(tmp_path) == []


def test_leftover_of_a_killed_writer_is_removed(tmp_path):
    path = tmp_path / "a[1].gguf"
    source = """
        import os, signal, sys
        from pathlib import Path
        from coremill.core.publish import replacing
        with replacing(Path(sys.argv[1])) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(source), path], check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = entries(tmp_path)
    assert left.startswith(".a[1].gguf.new-")
    kept = [".a[1].gguf.new-notes", ".other.gguf.new-abcd1234"]
    for name in kept:
        (tmp_path / name).write_text("of another")
    write_atomic(path, b"whole")
    assert entries(tmp_path) == [*kept, "a[1].gguf"]
    assert path.read_bytes() == b"whole"


def test_files_of_a_live_process_are_not_removed(tmp_path):
    """This process is writing a file and a directory while another one writes both."""
    with replacing(tmp_path / "file") as file, publishing(tmp_path / "stage") as fresh:
        file.write(b"slow")
        (fresh / "a").write_text("slow")
        source = """
            import sys
            from pathlib import Path
            from coremill.core.publish import publishing, recover, write_atomic
            write_atomic(Path(sys.argv[1]) / "file", b"quick")
            with publishing(Path(sys.argv[1]) / "stage") as fresh:
                (fresh / "a").write_text("quick")
            recover(Path(sys.argv[1]) / "stage")
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(source), tmp_path], check=True)
        assert (tmp_path / "file").read_bytes() == b"quick"
        assert (tmp_path / "stage" / "a").read_text() == "quick"
    assert (tmp_path / "file").read_bytes() == b"slow"
    assert (tmp_path / "stage" / "a").read_text() == "slow"
    assert entries(tmp_path) == ["file", "stage"]


def test_file_is_locked_until_it_is_renamed(tmp_path, monkeypatch):
    replace = Path.replace

    def replace_after_another_write(source, target):
        monkeypatch.setattr(Path, "replace", replace)
        write_atomic(tmp_path / "file", b"quick")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", replace_after_another_write)
    write_atomic(tmp_path / "file", b"slow")
    assert (tmp_path / "file").read_bytes() == b"slow"
    assert entries(tmp_path) == ["file"]


def test_recover_does_not_interfere_with_a_live_swap(tmp_path):
    folder, old = tmp_path / "stage", tmp_path / ".stage.old"
    folder.mkdir()
    with publishing(folder):
        folder.rename(old)
        recover(folder)
        assert not folder.exists()
        old.rename(folder)
    assert entries(tmp_path) == ["stage"]


def test_temporary_that_another_process_removed_is_recreated(tmp_path, monkeypatch):
    """Another process can remove a file or directory between its creation and its lock."""
    real, made = {name: getattr(tempfile, name) for name in ("mkdtemp", "mkstemp")}, []

    def lost(name, remove):
        def make(**options):
            result = real[name](**options)
            path = result if name == "mkdtemp" else result[1]
            if len(made) % 2 == 0:
                remove(path)
            made.append(path)
            return result

        return make

    monkeypatch.setattr(tempfile, "mkdtemp", lost("mkdtemp", os.rmdir))
    monkeypatch.setattr(tempfile, "mkstemp", lost("mkstemp", os.unlink))
    with publishing(tmp_path / "stage") as fresh:
        (fresh / "a").write_text("1")
    write_atomic(tmp_path / "file", b"2")
    assert len(made) == 4
    assert entries(tmp_path) == ["file", "stage"]


@pytest.mark.parametrize("exists", [True, False])
def test_target_of_a_link_is_replaced(tmp_path, exists):
    target, link = tmp_path / "disk" / "target", tmp_path / "stage"
    target.parent.mkdir()
    if exists:
        target.mkdir()
    (tmp_path / "way").symlink_to(target)
    link.symlink_to("way")  # a relative link to another link
    for name in ("a", "b", "c"):
        with publishing(link) as fresh:
            (fresh / name).write_text(name)
        assert entries(target) == [name]
    recover(link)
    assert (link.readlink(), entries(link)) == (Path("way"), ["c"])
    assert (entries(tmp_path), entries(target.parent)) == (["disk", "stage", "way"], ["target"])


def test_dangling_and_circular_links_are_rejected(tmp_path):
    link, loop = tmp_path / "link", tmp_path / "loop"
    link.symlink_to(tmp_path / "disk" / "target")
    with pytest.raises(OutputError) as caught, publishing(link):
        pass
    assert str(caught.value) == (
        f"{link} is a link to {tmp_path}/disk/target, and {tmp_path}/disk does not exist\n"
        f"  expected: a link to a directory, or to a new path in an existing one\n  run: ls -ld {link}"
    )
    loop.symlink_to(loop)
    with pytest.raises(OutputError, match=f"^{loop} is not a directory\n"), publishing(loop):
        pass
    assert entries(tmp_path) == ["link", "loop"]


def test_leftover_link_of_an_earlier_version_is_removed(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").write_text("mine")
    (tmp_path / "stage").mkdir()
    (tmp_path / ".stage.old").symlink_to("target")
    recover(tmp_path / "stage")
    assert entries(tmp_path) == ["stage", "target"]
    assert entries(tmp_path / "target") == ["a"]


def test_concurrent_writers_have_separate_directories(tmp_path):
    with publishing(tmp_path / "stage") as first, publishing(tmp_path / "stage") as second:
        assert first != second
        (first / "a").write_text("1")
        (second / "b").write_text("2")
    assert entries(tmp_path / "stage") == ["a"]


def test_output_path_that_is_an_input_is_rejected(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OutputError) as caught:
        check_apart([tmp_path / "b", tmp_path / "." / "a"], [None, tmp_path / "a"])
    assert str(caught.value) == (
        f"{tmp_path / 'a'} is read and would be overwritten\n  expected: an output path that is not an input"
    )
    check_apart([tmp_path / "b"], [tmp_path / "a"])
