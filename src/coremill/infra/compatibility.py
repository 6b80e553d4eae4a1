"""The compatibility matrix: cells of python × torch × coremltools × numpy that were measured, as data.

The data is `compatibility.toml`, beside this module. A cell is a set of versions, given by PEP 440
specifiers, and what came of converting a model and running the package with them.
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
"""What a cell is made of."""


class CellOutcome(str, enum.Enum):
    PASSED = "passed"
    """Converted, and the package computed the right numbers."""
    FAILED = "failed"


class Versions(Record):
    """The versions of one environment; None for a package that it does not hold.

    Raises:
        ValueError: a version is not one in the sense of PEP 440.
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
                raise ValueError(f"`{part}` is {found!r}, which is no version") from failure

    def __str__(self) -> str:
        return ", ".join(f"{part} {getattr(self, part) or 'absent'}" for part in PARTS)


class Cell(Record):
    """One measured combination.

    Raises:
        ValueError: a specifier is malformed, or a failed cell gives no reason.
    """

    name: str
    """What a gate or an error calls the cell."""
    python: str
    torch: str
    coremltools: str
    numpy: str
    outcome: CellOutcome
    measured: str
    """What was tried, and the figures."""
    reason: str | None = None
    """Why it fails."""
    source: str
    """Where it was measured."""
    date: str | None = None
    """The day, ISO 8601; None where it was not written down."""

    def __post_init__(self) -> None:
        for part in PARTS:
            SpecifierSet(getattr(self, part))
        if self.outcome is CellOutcome.FAILED and not self.reason:
            raise ValueError(f"cell {self.name!r} is failed without a reason")

    def covers(self, versions: Versions) -> bool:
        """Whether every version is within the cell's specifiers; a package that is absent never is.

        A local version counts as the release it was built from, so `2.9.1+cpu` is within `==2.9.1`.
        """
        for part in PARTS:
            found = getattr(versions, part)
            # Pre-releases are compared like any other version: an environment holds one only on purpose.
            if found is None or not SpecifierSet(getattr(self, part)).contains(found, prereleases=True):
                return False
        return True

    def __str__(self) -> str:
        spans = [f"{part} {getattr(self, part)}" for part in PARTS if getattr(self, part)]
        return f"{self.name} ({', '.join(spans)})"


class Compatibility(Document):
    """`compatibility.toml`.

    Raises:
        ValueError: two cells share a name.
    """

    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than one cell is called {', '.join(twice)}")

    def find(self, versions: Versions) -> Cell | None:
        """The cell of `versions`, or None if it was not measured; of several, a failed one."""
        covering = [cell for cell in self.cells if cell.covers(versions)]
        return min(covering, key=lambda cell: cell.outcome is not CellOutcome.FAILED, default=None)


@functools.cache
def read_compatibility(path: Path = DATA) -> Compatibility:
    """Read the matrix.

    Raises:
        DocumentError: unreadable, or not a matrix; names the place in it.
    """
    return read_toml(path, Compatibility)


def find_cell(python: str, torch: str, coremltools: str, numpy: str) -> Cell | None:
    """The measured cell of these versions, or None; of several, a failed one.

    Raises:
        ValueError: a version is not one in the sense of PEP 440.
    """
    versions = Versions(python=python, torch=torch, coremltools=coremltools, numpy=numpy)
    return read_compatibility().find(versions)


def running_versions() -> Versions:
    """The versions of this process, from package metadata: nothing is imported."""
    # Not `platform.python_version()`: a development build ends in '+', which PEP 440 does not admit.
    python = "{}.{}.{}".format(*sys.version_info[:3])
    return msgspec.convert({"python": python, **installed_versions(sys.path)}, Versions)


def installed_versions(path: list[str]) -> dict[str, str | None]:
    """Versions of the cell's packages that are installed in the folders of `path`; None for an absent one."""
    found: dict[str, str | None] = {}
    for part in PARTS[1:]:
        holders = metadata.distributions(name=part, path=path)
        found[part] = next((holder.version for holder in holders), None)
    return found
