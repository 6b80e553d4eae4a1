"""The version gate: export and conversion run only with versions that can work.

- Python other than 3.10 and 3.11, or a cell of the compatibility matrix that was measured to fail, is an error.
  `--toy` also allows Python 3.13, for a checkpoint whose model type is a toy.
- A cell that was measured to work passes.
- An unmeasured cell passes with a logged warning. Most such combinations work, and verification detects the others:
  it runs every package, and the gate "No compatibility warnings" passes only with a measured cell.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

from packaging.specifiers import SpecifierSet

from coremill.core.config import TOY_MODEL_TYPES
from coremill.core.errors import MachineError, ToyRefusedError, VersionGateError
from coremill.infra.compatibility import (
    Cell,
    CellOutcome,
    Versions,
    read_compatibility,
    running_versions,
)

log = logging.getLogger(__name__)

EXPORT_PYTHON = SpecifierSet(">=3.10,<3.12")
TOY_PYTHON = SpecifierSet(">=3.13,<3.14")
"""Also allowed with `--toy`."""

_IN_THE_RIGHT_PYTHON = "nox -s pipeline, which uses Python 3.11; coremill doctor shows where it searches for it"


def check_export_versions(*, toy: bool, model_type: str, versions: Versions | None = None) -> None:
    """Check that export and conversion can run with these versions; log a warning if they were not measured.

    Args:
        toy: whether `--toy` was given.
        model_type: of the checkpoint or the contract.
        versions: by default those of this process.

    Raises:
        ToyRefusedError: `toy`, and `model_type` is not a toy.
        VersionGateError: the Python version is not supported, or the cell was measured to fail.
        MachineError: torch is not installed.
    """
    versions = versions or running_versions()
    if toy and model_type not in TOY_MODEL_TYPES:
        raise ToyRefusedError(
            f"--toy with a checkpoint of model type {model_type!r}",
            expected=f"a toy ({', '.join(sorted(TOY_MODEL_TYPES))})",
            run="the same command without --toy, in Python 3.11",
        )
    check_python(toy=toy, versions=versions)
    _check_packages(versions)


def check_python(*, toy: bool, versions: Versions | None = None) -> None:
    """Check that export and conversion support the Python version; this needs no checkpoint.

    Raises:
        VersionGateError: it is not 3.10 or 3.11 (or 3.13 with `toy`).
    """
    versions = versions or running_versions()
    if EXPORT_PYTHON.contains(versions.python, prereleases=True):
        return
    if TOY_PYTHON.contains(versions.python, prereleases=True):
        if toy:
            log.warning("--toy: exporting with Python %s, which was not measured", versions.python)
            return
        expected = "Python 3.10 or 3.11; --toy allows 3.13 for a toy"
    else:
        expected = "Python 3.10 or 3.11"
    raise VersionGateError(
        f"export and conversion do not support Python {versions.python} ({sys.executable})",
        expected=expected,
        run=_IN_THE_RIGHT_PYTHON,
    )


def check_installed(*packages: str) -> None:
    """Check that `packages` are installed, without importing them.

    Raises:
        MachineError: some are missing; names them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MachineError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in {sys.prefix}",
            expected=f"an environment with {', '.join(packages)}",
            run=_IN_THE_RIGHT_PYTHON,
        )


def _check_packages(versions: Versions) -> None:
    if versions.torch is None:
        raise MachineError(
            f"torch is not installed in {sys.prefix}",
            expected="an environment with torch",
            run=_IN_THE_RIGHT_PYTHON,
        )
    cell = read_compatibility().find(versions)
    if cell is None:
        log.warning("not measured: %s; verification decides", versions)
    elif cell.outcome is CellOutcome.FAILED:
        raise VersionGateError(
            f"{versions}: measured to fail as cell {cell}: {cell.reason}",
            expected=_passing(versions),
            run="nox -s pipeline, which uses the locked versions",
        )


def _passing(versions: Versions) -> str:
    """Describe the cells that work: those with the installed torch, or else all."""
    cells = [cell for cell in read_compatibility().cells if cell.outcome is CellOutcome.PASSED]
    same = [cell for cell in cells if SpecifierSet(cell.torch).contains(versions.torch or "", prereleases=True)]
    return "a cell that was measured to work: " + "; ".join(str(cell) for cell in same or cells)


def cite_cell(versions: Versions) -> Cell | None:
    """Return the cell of `versions` if it was measured to work, otherwise None."""
    cell = read_compatibility().find(versions)
    return cell if cell is not None and cell.outcome is CellOutcome.PASSED else None
