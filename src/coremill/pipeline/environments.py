"""The environments of the build: each has its lock and its Python version.

This module defines them and finds those that are installed; nox creates them (`noxfile.py`).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec
from packaging.version import Version

from coremill.core.digest import file_digest
from coremill.core.documents import Document, read_json, write_json
from coremill.core.errors import MachineError, SchemaVersionError

log = logging.getLogger(__name__)

PRIMARY_LANE = "2.9.1"
LANES = ("2.9.1", "2.8.0")
"""The torch versions that export, conversion and verification run with; the primary one first."""

TRAIN_PYTHON = "3.13"
CONVERT_PYTHON = "3.11"

STAMP = "coremill-environment.json"


class Environment(msgspec.Struct, frozen=True):
    """A required environment: `requirements/<name>.txt` installed under Python `python`."""

    name: str
    python: str

    @property
    def session(self) -> str:
        """The nox session that creates it."""
        return f"env-{self.name}"

    def lock(self, root: Path) -> Path:
        return root / "requirements" / f"{self.name}.txt"


TRAIN = Environment("train", TRAIN_PYTHON)
CONVERT = {lane: Environment(f"convert-torch-{lane}", CONVERT_PYTHON) for lane in LANES}
TEST = (
    Environment("tests-tools", CONVERT_PYTHON),
    Environment("tests-train", TRAIN_PYTHON),
    *(Environment(f"tests-convert-torch-{lane}", CONVERT_PYTHON) for lane in LANES),
)
LINT = Environment("lint", CONVERT_PYTHON)
BUILD_ENVIRONMENTS = (TRAIN, *CONVERT.values())
"""The environments that stages run in."""
ENVIRONMENTS = (*BUILD_ENVIRONMENTS, *TEST, LINT)


class Stamp(Document):
    """Written into an environment once it is complete: its name, and the lock that it was installed from."""

    environment: str
    lock_digest: str
    checkout: str
    """The checkout that coremill was installed from: a copy of it must not run the original's sources."""


class Toolset(msgspec.Struct, frozen=True):
    """An installed environment."""

    folder: Path
    interpreter: str
    """Full version, such as `3.11.7`."""
    lock_digest: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


def installed(root: Path) -> dict[str, Toolset]:
    """Return the environments that are installed under `.nox`, by name.

    They are found by their stamps, because nox shortens long directory names. An environment whose installation was
    interrupted has no stamp.
    """
    found = {}
    for path in sorted((root / ".nox").glob(f"*/{STAMP}")):
        try:
            stamp = read_json(path, Stamp, error=MachineError)
        except (MachineError, SchemaVersionError) as error:
            # Truncated, or of another version: treated as not installed, so that nox installs it again.
            log.info("%s", error.found)
            continue
        if stamp.checkout == str(root.resolve()) and (path.parent / "bin" / "python").exists():
            found[stamp.environment] = Toolset(path.parent, _version(path.parent), stamp.lock_digest)
    return found


def is_current(root: Path, environment: Environment, folder: Path) -> bool:
    """Return whether the environment in `folder` was installed from the current lock."""
    toolset = installed(root).get(environment.name)
    return (
        toolset is not None
        and toolset.folder.resolve() == folder.resolve()
        and toolset.lock_digest == file_digest(environment.lock(root))
    )


def write_stamp(root: Path, environment: Environment, folder: Path) -> None:
    digest = file_digest(environment.lock(root))
    stamp = Stamp(environment=environment.name, lock_digest=digest, checkout=str(root.resolve()))
    write_json(folder / STAMP, stamp)


def running(root: Path, environment: Environment) -> Toolset:
    """Return the toolset of this process, which must be `environment`, installed from the current lock.

    Raises:
        MachineError: this process runs in another environment, or in an outdated one.
    """
    toolset = installed(root).get(environment.name)
    run = f"nox -s {environment.session}"
    if toolset is None or Path(sys.prefix).resolve() != toolset.folder.resolve():
        raise MachineError(
            f"this Python is {sys.prefix}",
            expected=f"the environment {environment.name!r} (Python {environment.python})",
            run=run,
        )
    if toolset.lock_digest != file_digest(environment.lock(root)):
        raise MachineError(
            f"the environment {environment.name!r} was installed from another lock",
            expected=f"the current requirements/{environment.name}.txt",
            run=run,
        )
    return toolset


def _version(folder: Path) -> str:
    """Return the interpreter's version from pyvenv.cfg, which is faster than starting it."""
    lines = (line.partition("=") for line in (folder / "pyvenv.cfg").read_text().splitlines())
    keys = {key.strip(): value.strip() for key, _, value in lines}
    version = keys.get("version_info") or keys.get("version")
    if version is None:
        raise MachineError(f"{folder / 'pyvenv.cfg'} contains no version", run=f"rm -r {folder}")
    # `version_info` may end in a release level: 3.13.0.final.0
    numbers = [part for part in version.split(".") if part.isdigit()][:3]
    return str(Version(".".join(numbers)))
