"""Installed environments are found on disk, and incomplete ones are not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from coremill.core.errors import MachineError
from coremill.pipeline.environments import (
    ENVIRONMENTS,
    STAMP,
    Environment,
    installed,
    is_current,
    running,
    write_stamp,
)

ROOT = Path(__file__).parents[2]
TOY = Environment("toy", "3.11")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "requirements").mkdir()
    TOY.lock(tmp_path).write_text("packaging==26.3\n")
    folder = tmp_path / ".nox" / "env-toy"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "pyvenv.cfg").write_text("home = /x\nimplementation = CPython\nversion_info = 3.11.7\n")
    write_stamp(tmp_path, TOY, folder)
    return tmp_path


def test_installed_environment_is_found(root):
    toolset = installed(root)["toy"]
    assert toolset.interpreter == "3.11.7"
    assert toolset.python == root / ".nox" / "env-toy" / "bin" / "python"
    assert is_current(root, TOY, toolset.folder)


@pytest.mark.parametrize("line", ["version_info = 3.13.0.final.0", "version = 3.13.0"])
def test_versions_of_uv_and_venv(root, line):
    (root / ".nox" / "env-toy" / "pyvenv.cfg").write_text(f"home = /x\n{line}\n")
    assert installed(root)["toy"].interpreter == "3.13.0"


def test_changed_lock_makes_it_outdated(root):
    TOY.lock(root).write_text("packaging==26.4\n")
    assert not is_current(root, TOY, root / ".nox" / "env-toy")


def test_environment_without_a_stamp_is_not_installed(root):
    (root / ".nox" / "env-toy" / STAMP).unlink()
    assert installed(root) == {}
    assert not is_current(root, TOY, root / ".nox" / "env-toy")


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": "9.0"}', '{"schema_version": "1.0"}'])
def test_environment_with_an_unreadable_stamp_is_not_installed(root, text):
    (root / ".nox" / "env-toy" / STAMP).write_text(text)
    assert installed(root) == {}


def test_environment_of_a_copied_checkout_is_not_installed(root, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(root, copy, symlinks=True)
    assert installed(copy) == {}


def test_environment_without_an_interpreter_is_not_installed(root):
    (root / ".nox" / "env-toy" / "bin" / "python").unlink()
    assert installed(root) == {}


def test_other_environment_is_rejected(root):
    with pytest.raises(MachineError) as caught:
        running(root, TOY)
    assert str(caught.value) == (
        f"this Python is {sys.prefix}\n  expected: the environment 'toy' (Python 3.11)\n  run: nox -s env-toy"
    )
    assert caught.value.exit_code == 32


def test_running_environment_is_rejected_when_its_lock_changes(root, monkeypatch):
    folder = root / ".nox" / "env-toy"
    monkeypatch.setattr(sys, "prefix", str(folder))
    assert running(root, TOY).folder == folder
    TOY.lock(root).write_text("packaging==26.4\n")
    with pytest.raises(MachineError, match="was installed from another lock"):
        running(root, TOY)


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda environment: environment.name)
def test_every_environment_has_a_hashed_lock(environment):
    text = environment.lock(ROOT).read_text()
    pins = [line for line in text.splitlines() if "==" in line and not line.startswith((" ", "#"))]
    assert pins
    assert text.count("--hash=sha256:") >= len(pins)
    assert "index-url" not in text
    assert "find-links" not in text
