"""The environments of the build: one a lock, each with its interpreter pinned.

Nox makes and fills them (`noxfile.py`); this module says what they are and reads what is there.
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
"""Torch versions in which export, conversion and verification run; the primary one first."""

TRAIN_PYTHON = "3.13"
CONVERT_PYTHON = "3.11"

STAMP = "coremill-environment.json"


class Environment(msgspec.Struct, frozen=True):
    """An environment as it should be: `requirements/<name>.txt` installed under Python `python`."""

    name: str
    python: str

    @property
    def session(self) -> str:
        """The nox session that makes it."""
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
"""Those that a stage of the build runs in."""
ENVIRONMENTS = (*BUILD_ENVIRONMENTS, *TEST, LINT)


class Stamp(Document):
    """Written into an environment once it is whole: which one it is, and the lock that it was filled from."""

    environment: str
    lock_digest: str
    checkout: str
    """Where coremill itself was installed from: a copied checkout must not run the sources of the first one."""


class Toolset(msgspec.Struct, frozen=True):
    """An environment as it is."""

    folder: Path
    interpreter: str
    """Full version, such as `3.11.7`."""
    lock_digest: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


def installed(root: Path) -> dict[str, Toolset]:
    """The environments that are in place under `.nox`, by name.

    They are found by their stamps, because nox shortens a folder's name where the path grows long. One
    whose filling was cut short has no stamp, and is not here.
    """
    found = {}
    for path in sorted((root / ".nox").glob(f"*/{STAMP}")):
        try:
            stamp = read_json(path, Stamp, error=MachineError)
        except (MachineError, SchemaVersionError) as error:
            # Another version's stamp, or half of one: not in place, so that it is filled anew.
            log.info("%s", error.found)
            continue
        if stamp.checkout == str(root.resolve()) and (path.parent / "bin" / "python").exists():
            found[stamp.environment] = Toolset(path.parent, _version(path.parent), stamp.lock_digest)
    return found


def is_current(root: Path, environment: Environment, folder: Path) -> bool:
    """Whether the environment in `folder` was filled from the lock as it is now."""
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
    """The toolset of this very process, which must be `environment`, filled from the lock as it is now.

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
            f"the environment {environment.name!r} was filled from another lock",
            expected=f"requirements/{environment.name}.txt as it is now",
            run=run,
        )
    return toolset


def _version(folder: Path) -> str:
    """The interpreter's version, from pyvenv.cfg: reading a file costs less than starting a Python."""
    lines = (line.partition("=") for line in (folder / "pyvenv.cfg").read_text().splitlines())
    keys = {key.strip(): value.strip() for key, _, value in lines}
    version = keys.get("version_info") or keys.get("version")
    if version is None:
        raise MachineError(f"{folder / 'pyvenv.cfg'} names no version", run=f"rm -r {folder}")
    # `version_info` may carry a release level behind the numbers: 3.13.0.final.0
    numbers = [part for part in version.split(".") if part.isdigit()][:3]
    return str(Version(".".join(numbers)))
