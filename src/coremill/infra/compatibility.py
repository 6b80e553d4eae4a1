"""The compatibility matrix: combinations of python × torch × coremltools × numpy that were measured.

The data is in `compatibility.toml`, next to this module. A cell is a set of versions, given by PEP 440 specifiers,
with the result of converting a model and running the package with them.
"""

from __future__ import annotations

import enum
import functools
import sys
from importlib import metadata
from pathlib import Path

import msgspec
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from coremill.core.documents import Document, Record, read_toml

DATA = Path(__file__).with_name("compatibility.toml")
PARTS = ("python", "torch", "coremltools", "numpy")
"""The parts of a cell."""


class CellOutcome(str, enum.Enum):
    PASSED = "passed"
    """The conversion succeeded, and the package's outputs were right."""
    FAILED = "failed"


class Versions(Record):
    """The versions of one environment; None for a package that is not installed.

    Raises:
        ValueError: a version is not valid in PEP 440.
    """

    python: str
    torch: str | None
    coremltools: str | None
    numpy: str | None

    def __post_init__(self) -> None:
        for part in PARTS:
            found = getattr(self, part)
            try:
                Version(found or "0")
            except InvalidVersion as failure:
                raise ValueError(f"`{part}` is {found!r}, which is not a version") from failure

    def __str__(self) -> str:
        return ", ".join(f"{part} {getattr(self, part) or 'absent'}" for part in PARTS)


class Cell(Record):
    """A measured combination.

    Raises:
        ValueError: a specifier is malformed, or a failed cell has no reason.
    """

    name: str
    """The name of the cell in gates and errors."""
    python: str
    torch: str
    coremltools: str
    numpy: str
    outcome: CellOutcome
    measured: str
    """The conversion and the figures."""
    reason: str | None = None
    """Why it fails."""
    source: str
    """The machine that it was measured on."""
    date: str | None = None
    """The date, ISO 8601; None if it was not recorded."""

    def __post_init__(self) -> None:
        for part in PARTS:
            SpecifierSet(getattr(self, part))
        if self.outcome is CellOutcome.FAILED and not self.reason:
            raise ValueError(f"cell {self.name!r} is failed without a reason")

    def covers(self, versions: Versions) -> bool:
        """Return whether all versions are within the cell's specifiers; a package that is absent is not.

        A local version matches as its release: `2.9.1+cpu` is within `==2.9.1`.
        """
        for part in PARTS:
            found = getattr(versions, part)
            # Pre-releases match like any other version: they are only installed on purpose.
            if found is None or not SpecifierSet(getattr(self, part)).contains(found, prereleases=True):
                return False
        return True

    def __str__(self) -> str:
        spans = [f"{part} {getattr(self, part)}" for part in PARTS if getattr(self, part)]
        return f"{self.name} ({', '.join(spans)})"


class Compatibility(Document):
    """`compatibility.toml`.

    Raises:
        ValueError: two cells have the same name.
    """

    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than one cell is named {', '.join(twice)}")

    def find(self, versions: Versions) -> Cell | None:
        """Return the cell that covers `versions`, or None if there is none; a failed cell takes precedence."""
        covering = [cell for cell in self.cells if cell.covers(versions)]
        return min(covering, key=lambda cell: cell.outcome is not CellOutcome.FAILED, default=None)


@functools.cache
def read_compatibility(path: Path = DATA) -> Compatibility:
    """Read the matrix.

    Raises:
        DocumentError: it is unreadable or invalid; names the path in it.
    """
    return read_toml(path, Compatibility)


def running_versions() -> Versions:
    """Return the versions of this process from package metadata, without importing the packages."""
    # Not `platform.python_version()`: that of a development build ends in '+', which is not valid in PEP 440.
    python = "{}.{}.{}".format(*sys.version_info[:3])
    return msgspec.convert({"python": python, **installed_versions(sys.path)}, Versions)


def installed_versions(path: list[str]) -> dict[str, str | None]:
    """Return the versions of a cell's packages that are installed in the directories of `path`; None if absent."""
    found: dict[str, str | None] = {}
    for part in PARTS[1:]:
        holders = metadata.distributions(name=part, path=path)
        found[part] = next((holder.version for holder in holders), None)
    return found
