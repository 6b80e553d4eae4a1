"""Find interpreters that run.

pyenv has a shim for every version that it has installed, and a shim fails for versions that are not selected. With
such a shim on PATH, `uv venv` fails and nox skips the session. A candidate is therefore run before it is used.
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
    """Return the first interpreter of `version` that runs, or None.

    The order is PATH, pyenv, Homebrew, uv's own interpreters, and last the shims on PATH, which are slow and often
    fail. If PATH contains shims, pyenv's directories come in their position.

    Args:
        version: major and minor, such as `3.13`.
        environ: by default that of this process (PATH, HOME, PYENV_ROOT, HOMEBREW_PREFIX, UV_PYTHON_INSTALL_DIR and
            XDG_DATA_HOME are read).
    """
    wanted = Version(version)
    for candidate in candidates(version, environ):
        found = probe_version(candidate)
        if found is not None and found.release[:2] == wanted.release[:2]:
            return candidate
        log.debug("skipped %s: it %s", candidate, f"is Python {found}" if found else "does not run")
    return None


def candidates(version: str, environ: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield every executable file named `python<version>`, in the order of :func:`find_interpreter`."""
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
    yield from _executables(version, dict.fromkeys([*real, *pyenv, *_other_folders(version, environ), *shims]))


def interpreter_directories(versions: Iterable[str], environ: Mapping[str, str] | None = None) -> list[Path]:
    """Return the directories to prepend to PATH so that each `python<version>` runs.

    None is needed for a version whose first candidate on PATH runs, or that is not found.
    """
    environ = os.environ if environ is None else environ
    folders: list[Path] = []
    for version in versions:
        found = find_interpreter(version, environ)
        if found is not None and found != next(_executables(version, _path_folders(environ)), None):
            folders.append(found.parent)
    return list(dict.fromkeys(folders))


def probe_version(candidate: Path) -> Version | None:
    """Return the version that `candidate` reports, or None if it fails or reports something else."""
    try:
        # `--version` exits before the interpreter is initialised: 3 ms instead of 10 with `-c`.
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


def _executables(version: str, folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        candidate = folder / f"python{version}"
        if candidate.is_file() and os.access(candidate, os.X_OK):
            yield candidate


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def _pyenv_folders(version: str, environ: Mapping[str, str]) -> list[Path]:
    root = Path(environ.get("PYENV_ROOT") or _home(environ) / ".pyenv")
    return _newest_first(root / "versions", rf"{re.escape(version)}\.(\d+)")


def _other_folders(version: str, environ: Mapping[str, str]) -> list[Path]:
    """Return the `bin` directories of `version` in Homebrew and of uv's own interpreters."""
    prefix = environ.get("HOMEBREW_PREFIX")
    homebrew = [Path(root) / "opt" / f"python@{version}" / "bin" for root in ([prefix] if prefix else _HOMEBREW)]
    data = Path(environ.get("XDG_DATA_HOME") or _home(environ) / ".local" / "share")
    uv = Path(environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")
    return [*homebrew, *_newest_first(uv, rf"cpython-{re.escape(version)}\.(\d+)-.*")]


def _newest_first(folder: Path, name: str) -> list[Path]:
    """Return the `bin` directories of the versions in `folder` that match; `name` captures the patch number."""
    if not folder.is_dir():
        return []
    matches = [(re.fullmatch(name, entry.name), entry) for entry in folder.iterdir()]
    found = sorted((int(match[1]), entry) for match, entry in matches if match)
    return [entry / "bin" for _, entry in reversed(found)]
