"""The sdist, the wheel that is built from it, and environments with that wheel and nothing else of coremill."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import uv

from coremill.infra.interpreters import find_interpreter
from coremill.pipeline.environments import CONVERT, CONVERT_PYTHON, PRIMARY_LANE

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("COREMILL_INSTALL_PYTHON", CONVERT_PYTHON)
"""CI installs under the other supported versions too."""


class Installation:
    """An environment into which coremill was installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside the checkout."""
        command = [str(self.folder / "bin" / program), *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=clean_environ(), capture_output=True, text=True, check=False
        )


def clean_environ() -> dict[str, str]:
    """The environment variables, except those that change Python's imports or the width of the output."""
    changing = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "COLUMNS"}
    return {name: value for name, value in os.environ.items() if name not in changing}


def run_uv(*arguments: str) -> None:
    ended = subprocess.run(
        [uv.find_uv_bin(), *arguments],
        env=clean_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def install(folder: Path, requirement: str) -> Installation:
    run_uv("venv", "--quiet", "--python", str(find_interpreter(PYTHON, os.environ) or PYTHON), str(folder))
    # With the versions of a lock, uv's cache has them already. The locks are for one Python.
    lock = ("--constraint", str(CONVERT[PRIMARY_LANE].lock(ROOT))) if PYTHON == CONVERT_PYTHON else ()
    run_uv("pip", "install", "--quiet", "--python", str(folder), *lock, requirement)
    return Installation(folder)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run_uv("build", "--quiet", "--sdist", "--out-dir", str(folder), str(ROOT))
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_uv("build", "--quiet", "--wheel", "--out-dir", str(folder), str(sdist))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """`pip install coremill`."""
    folder = tmp_path_factory.mktemp("light") / "env"
    yield install(folder, str(wheel))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def mil(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """`pip install 'coremill[mil]'`."""
    folder = tmp_path_factory.mktemp("mil") / "env"
    yield install(folder, f"{wheel}[mil]")
    shutil.rmtree(folder)
