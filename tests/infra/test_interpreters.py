"""Links to a real interpreter, and shims that fail as those of pyenv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from coremill.infra.interpreters import candidates, find_interpreter, interpreter_directories, probe_version

HERE = "{}.{}".format(*sys.version_info[:2])
REAL = Path(sys.executable).resolve()
FAILING_SHIM = f"""#!/bin/sh
echo "pyenv: python{HERE}: command not found" >&2
exit 127
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def link(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(REAL)
    return path


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    return script(tmp_path / "home" / ".pyenv" / "shims" / f"python{HERE}", FAILING_SHIM)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty PATH, a home, and a Homebrew prefix that does not exist."""
    return {"HOME": str(tmp_path / "home"), "HOMEBREW_PREFIX": str(tmp_path / "brew"), "PATH": ""}


def pyenv(environ: dict[str, str], version: str) -> Path:
    return link(Path(environ["HOME"]) / ".pyenv" / "versions" / version / "bin" / f"python{HERE}")


def test_failing_shim_is_skipped(shim: Path, environ: dict[str, str]) -> None:
    real = pyenv(environ, f"{HERE}.7")
    environ["PATH"] = str(shim.parent)
    assert find_interpreter(HERE, environ) == real
    assert interpreter_directories([HERE], environ) == [real.parent]


def test_failing_shim_alone_is_not_an_interpreter(shim: Path, environ: dict[str, str]) -> None:
    environ["PATH"] = str(shim.parent)
    assert list(candidates(HERE, environ)) == [shim]
    assert probe_version(shim) is None
    assert find_interpreter(HERE, environ) is None
    assert interpreter_directories([HERE], environ) == []


def test_working_shim_is_used_last(tmp_path: Path, environ: dict[str, str]) -> None:
    shim = script(tmp_path / "asdf" / "shims" / f"python{HERE}", f'#!/bin/sh\nexec "{REAL}" "$@"\n')
    environ["PATH"] = str(shim.parent)
    assert find_interpreter(HERE, environ) == shim
    assert interpreter_directories([HERE], environ) == []  # it is already the first on PATH


def test_pyenv_comes_in_the_position_of_its_shims(tmp_path: Path, shim: Path, environ: dict[str, str]) -> None:
    """Directories before the shims come first, and those after them later."""
    early, late = link(tmp_path / "early" / f"python{HERE}"), link(tmp_path / "late" / f"python{HERE}")
    real = pyenv(environ, f"{HERE}.7")
    environ["PATH"] = f"{early.parent}:{shim.parent}:{late.parent}"
    assert list(candidates(HERE, environ)) == [early, real, late, shim]
    assert interpreter_directories([HERE], environ) == []
    environ["PATH"] = f"{shim.parent}:{late.parent}"
    assert find_interpreter(HERE, environ) == real


def test_newest_patch_release_comes_first(environ: dict[str, str]) -> None:
    newest = pyenv(environ, f"{HERE}.10")
    for version in (f"{HERE}.9", f"{HERE}.2", f"{HERE}-dev", f"{HERE}1.99", "mambaforge"):
        pyenv(environ, version)
    found = list(candidates(HERE, environ))
    assert [path.parent.parent.name for path in found] == [f"{HERE}.10", f"{HERE}.9", f"{HERE}.2"]
    assert find_interpreter(HERE, environ) == newest


def test_homebrew_comes_before_uv(tmp_path: Path, environ: dict[str, str]) -> None:
    uv = link(tmp_path / "home/.local/share/uv/python" / f"cpython-{HERE}.5-linux-x86_64-gnu/bin" / f"python{HERE}")
    assert find_interpreter(HERE, environ) == uv
    brew = link(tmp_path / "brew" / "opt" / f"python@{HERE}" / "bin" / f"python{HERE}")
    assert list(candidates(HERE, environ)) == [brew, uv]
    assert find_interpreter(HERE, environ) == brew


def test_environment_variables_change_the_directories(tmp_path: Path, environ: dict[str, str]) -> None:
    moved = link(tmp_path / "elsewhere" / "versions" / f"{HERE}.1" / "bin" / f"python{HERE}")
    managed = link(tmp_path / "managed" / f"cpython-{HERE}.1-macos-aarch64-none" / "bin" / f"python{HERE}")
    environ |= {"PYENV_ROOT": str(tmp_path / "elsewhere"), "UV_PYTHON_INSTALL_DIR": str(tmp_path / "managed")}
    assert list(candidates(HERE, environ)) == [moved, managed]


def test_interpreter_of_another_version_is_skipped(tmp_path: Path, environ: dict[str, str]) -> None:
    liar = tmp_path / "bin" / "python3.99"
    liar.parent.mkdir()
    liar.symlink_to(REAL)
    environ["PATH"] = str(liar.parent)
    assert probe_version(liar) is not None
    assert find_interpreter("3.99", environ) is None


def test_file_that_is_not_executable_is_not_a_candidate(tmp_path: Path, environ: dict[str, str]) -> None:
    path = script(tmp_path / "bin" / f"python{HERE}", FAILING_SHIM)
    path.chmod(0o644)
    environ["PATH"] = str(path.parent)
    assert list(candidates(HERE, environ)) == []


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("#!/bin/sh\necho Python 3.13.0\n", "3.13.0"),
        ("#!/bin/sh\necho Python 3.14.0a1+\n", "3.14.0a1"),
        ("#!/bin/sh\necho Python\n", None),
        ("#!/bin/sh\necho Python none\n", None),
        ("#!/bin/sh\necho Python 3.13.0; exit 1\n", None),
        ("#!/bin/sh\nprintf '\\377\\376'\n", None),
        ("#!/does/not/exist\n", None),
        ("not a program", None),
    ],
)
def test_probe_version_of_any_file(tmp_path: Path, text: str, version: str | None) -> None:
    found = probe_version(script(tmp_path / "python", text))
    assert found == (Version(version) if version else None)


def test_probe_version_of_this_interpreter() -> None:
    assert probe_version(REAL) == Version("{}.{}.{}".format(*sys.version_info[:3]))


def test_uv_venv_succeeds_with_the_directories_on_path(tmp_path: Path, shim: Path, environ: dict[str, str]) -> None:
    """With the real uv: it fails with the shim alone."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert uv is not None
    real = pyenv(environ, f"{HERE}.7")
    environ |= {"PATH": str(shim.parent), "UV_PYTHON_DOWNLOADS": "never", "UV_CACHE_DIR": str(tmp_path / "cache")}

    def make(name: str) -> subprocess.CompletedProcess[str]:
        command = [uv, "venv", "--no-config", "--offline", "-p", HERE, str(tmp_path / name)]
        return subprocess.run(command, env=environ, capture_output=True, text=True)

    before = make("before")
    assert before.returncode != 0
    directories = interpreter_directories([HERE], environ)
    environ["PATH"] = os.pathsep.join([*map(str, directories), environ["PATH"]])
    after = make("after")
    assert (after.returncode, directories) == (0, [real.parent]), after.stderr
    assert (tmp_path / "after" / "pyvenv.cfg").is_file()
