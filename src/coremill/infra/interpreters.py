"""Finding real interpreters: a name on PATH is a promise, a Python that runs is a fact.

A pyenv shim exists for every version that pyenv knows and fails for those that are not selected; `uv venv`
dies on it and nox skips the session. So a candidate counts only if it runs and reports the version.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.version import InvalidVersion, Version

log = logging.getLogger(__name__)

_REPORT = re.compile(r"Python (\S+?)\+?\s*")  # a development build's version ends in '+'
_PROBE_TIMEOUT_S = 10.0
_HOMEBREW = ("/opt/homebrew", "/usr/local", "/home/linuxbrew/.linuxbrew")


def find_interpreter(version: str, environ: Mapping[str, str] | None = None) -> Path | None:
    """The first interpreter of `version` (such as `3.13`) that runs, or None.

    Looks on PATH, then in pyenv, Homebrew and what uv installed, and last at shims on PATH, which are slow
    and often fail; where PATH has shims, pyenv's own folders take their place. Costs one start of a Python,
    about 10 ms, when the first candidate is good.

    Args:
        version: major and minor.
        environ: this process's environment, unless given (PATH, HOME, PYENV_ROOT, HOMEBREW_PREFIX,
            UV_PYTHON_INSTALL_DIR and XDG_DATA_HOME are read).
    """
    wanted = Version(version)
    for candidate in candidates(version, environ):
        found = probe_version(candidate)
        if found is not None and found.release[:2] == wanted.release[:2]:
            return candidate
        log.debug("passed over %s: it %s", candidate, f"is Python {found}" if found else "does not run")
    return None


def candidates(version: str, environ: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Every executable file that claims to be Python `version`, the likeliest first; none was run."""
    environ = os.environ if environ is None else environ
    pyenv = _pyenv_folders(version, environ)
    real: list[Path] = []
    shims: list[Path] = []
    for folder in _path_folders(environ):
        if folder.name == "shims":
            real += pyenv
            shims.append(folder)
        else:
            real.append(folder)
    for folder in dict.fromkeys([*real, *pyenv, *_other_folders(version, environ), *shims]):
        candidate = folder / f"python{version}"
        if candidate.is_file() and os.access(candidate, os.X_OK):
            yield candidate


def interpreter_directories(versions: Iterable[str], environ: Mapping[str, str] | None = None) -> list[Path]:
    """The folders to put in front of PATH so that `python<version>` is a Python that runs.

    A version whose first name on PATH is good already, or that is nowhere, adds nothing.
    """
    environ = os.environ if environ is None else environ
    folders: list[Path] = []
    for version in versions:
        found = find_interpreter(version, environ)
        if found is not None and found != _first_on_path(version, environ) and found.parent not in folders:
            folders.append(found.parent)
    return folders


def probe_version(candidate: Path) -> Version | None:
    """The version that `candidate` reports when it is run; None if it fails, or says something else."""
    try:
        # `--version` ends before the interpreter is set up: 3 ms where `-c` takes 10.
        ran = subprocess.run(
            [candidate, "--version"], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as failure:
        log.debug("%s does not run: %s", candidate, failure)
        return None
    report = _REPORT.fullmatch(ran.stdout)
    if ran.returncode != 0 or report is None:
        return None
    try:
        return Version(report[1])
    except InvalidVersion:
        return None


def _path_folders(environ: Mapping[str, str]) -> list[Path]:
    return [Path(part) for part in environ.get("PATH", "").split(os.pathsep) if part]


def _first_on_path(version: str, environ: Mapping[str, str]) -> Path | None:
    for folder in _path_folders(environ):
        candidate = folder / f"python{version}"
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    return None


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def _pyenv_folders(version: str, environ: Mapping[str, str]) -> list[Path]:
    root = Path(environ.get("PYENV_ROOT") or _home(environ) / ".pyenv")
    return _newest_first(root / "versions", rf"{re.escape(version)}\.(\d+)")


def _other_folders(version: str, environ: Mapping[str, str]) -> list[Path]:
    """The `bin` folders of `version` in Homebrew, and of what uv installed."""
    prefix = environ.get("HOMEBREW_PREFIX")
    homebrew = [Path(root) / "opt" / f"python@{version}" / "bin" for root in ([prefix] if prefix else _HOMEBREW)]
    data = Path(environ.get("XDG_DATA_HOME") or _home(environ) / ".local" / "share")
    uv = Path(environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")
    return [*homebrew, *_newest_first(uv, rf"cpython-{re.escape(version)}\.(\d+)-.*")]


def _newest_first(folder: Path, name: str) -> list[Path]:
    """The `bin` folders of the versions in `folder` whose names match; group 1 of `name` is the patch release."""
    if not folder.is_dir():
        return []
    matches = [(re.fullmatch(name, entry.name), entry) for entry in folder.iterdir()]
    found = sorted((int(match[1]), entry) for match, entry in matches if match)
    return [entry / "bin" for _, entry in reversed(found)]
