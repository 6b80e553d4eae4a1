"""Fixtures that run commands as a shell does, and save packages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coremill.cli.main import main
from coremill.mil.commands.selftest import BUNDLE


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def mil(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`mil("inspect", path)` returns the exit code and output of `coremill mil inspect path`, at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: Any) -> Ended:
        capsys.readouterr()
        try:
            code = main(["mil", *map(str, arguments)])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        # rich pads the cells of a table to the width of their column.
        return Ended(code, "".join(line.rstrip() + "\n" for line in captured.out.splitlines()), captured.err)

    return run


@pytest.fixture(scope="session")
def save_in(build: Callable[..., Any]) -> Callable[..., Path]:
    """`save_in(folder, "name", …)` saves a package in the directory; the other arguments are those of `build`."""

    def save_model(folder: Path, name: str, *arguments: Any, **options: Any) -> Path:
        path = folder / f"{name}.mlpackage"
        build(*arguments, **options).save(str(path))
        return path

    return save_model


@pytest.fixture
def save(save_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`save_in` for the test's temporary directory."""
    return functools.partial(save_in, tmp_path)


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The packages of `coremill mil selftest`."""
    return BUNDLE
