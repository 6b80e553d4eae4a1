"""A command whose packages are not installed restarts in an environment that has them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coremill.cli import restart
from coremill.cli.commands import COMMANDS
from coremill.cli.main import main
from coremill.pipeline.environments import CONVERT, TRAIN, Toolset

SOURCE = Path(__file__).parents[2] / "src" / "coremill"


@pytest.fixture
def without_torch(monkeypatch):
    """Neither torch nor coremltools can be found, whatever this interpreter has."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("torch", "coremltools") else find_spec(name)
    )


@pytest.fixture
def started(without_torch, monkeypatch, tmp_path):
    """The command lines that would replace this process; every environment of the build exists."""
    environments = [TRAIN, *CONVERT.values()]
    toolsets = {each.name: Toolset(tmp_path / each.name, "3.11.7", "sha256:0") for each in environments}
    monkeypatch.setattr(restart, "installed", lambda root: toolsets)
    found: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda python, arguments: found.append(arguments) or sys.exit(7))
    return found


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ("train", "train"),
        ("import a-model --out m.ckpt", "train"),
        ("export --checkpoint m.ckpt", "convert-torch-2.9.1"),
        ("mil inspect p --json", "convert-torch-2.9.1"),
        ("agree --run tiny", "convert-torch-2.9.1"),
        ("agree --run tiny --torch 2.8.0", "convert-torch-2.8.0"),
        ("agree --run tiny --torch=2.8.0", "convert-torch-2.8.0"),
        ("agree --run tiny --torch", "convert-torch-2.9.1"),
    ],
)
def test_restarts_in_the_environment_of_the_command(started, tmp_path, command, environment):
    with pytest.raises(SystemExit, match="7"):
        main(command.split())
    python = str(tmp_path / environment / "bin" / "python")
    assert started == [[python, "-m", "coremill", *command.split()]]


def test_every_extra_has_environments():
    assert {each.extra for each in COMMANDS.values() if each.needs} == restart.ENVIRONMENTS.keys()


def test_restarts_in_the_first_environment_that_exists(started, monkeypatch, tmp_path):
    toolset = Toolset(tmp_path / "env", "3.11.7", "sha256:0")
    monkeypatch.setattr(restart, "installed", lambda root: {"convert-torch-2.8.0": toolset})
    with pytest.raises(SystemExit, match="7"):
        main(["mil", "inspect", "some package"])
    assert started == [[str(toolset.python), "-m", "coremill", "mil", "inspect", "some package"]]


@pytest.mark.parametrize(
    "environments", [{}, {"convert-torch-2.9.1": Toolset(Path(sys.prefix), "3.11.7", "sha256:0")}]
)
def test_without_an_environment_is_an_error(started, monkeypatch, capsys, environments):
    """None exists; or it is this one, which lacks what it should have and would restart itself without end."""
    monkeypatch.setattr(restart, "installed", lambda root: environments)
    assert main(["mil", "inspect", "p"]) == 32
    missing = [name for name in COMMANDS["mil inspect"].needs if importlib.util.find_spec(name) is None]
    assert capsys.readouterr().err == (
        f"machine error: {' and '.join(missing)} are not installed in {sys.prefix}\n"
        "  expected: an environment with torch, coremltools, numpy\n"
        "  run: pip install 'coremill[mil]', or nox -s env-convert-torch-2.9.1 in a checkout\n"
    )
    assert started == []


@pytest.mark.parametrize("command", ["import", "export", "convert", "verify", "gguf", "hf", "agree"])
def test_help_of_a_command_with_a_light_module_needs_nothing(started, capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: coremill {command} ")
    assert started == []


def test_process_is_replaced(checkout, linux):
    """A copy of the package in a checkout whose environment's Python prints its arguments."""
    package = checkout.root / "src" / "coremill"
    for name in ("cli", "core", "pipeline", "__init__.py", "__main__.py"):
        (shutil.copytree if (SOURCE / name).is_dir() else shutil.copyfile)(SOURCE / name, package / name)
    python = checkout.install(CONVERT["2.9.1"], "3.11.7") / "bin" / "python"
    python.unlink()
    python.write_text('#!/bin/sh\necho "$@"\nexit 9\n')
    python.chmod(0o755)
    ended = subprocess.run(
        [sys.executable, "-m", "coremill", "mil", "run", "p", "--input", "x.npz"],
        env={**os.environ, "PYTHONPATH": str(checkout.root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (9, "-m coremill mil run p --input x.npz\n")
    assert ended.stderr.startswith(f"INFO coremill.cli.restart: running in {python.parents[1]}: torch, ")
