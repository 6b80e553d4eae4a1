"""The version gate: export and conversion run only where they can work.

Three answers, by what is known of the running versions:

- Python outside 3.10 and 3.11, or a cell of the compatibility matrix that was measured to fail: an error.
  `--toy` admits Python 3.13 as well, for a checkpoint of a toy's model type and for no other.
- A cell that was measured to work: nothing to say.
- An unmeasured cell: a logged warning. It is not an error, because most combinations are unmeasured and good,
  and because nothing slips through: verification runs the package whatever made it, and the gate "No
  compatibility warnings" cites a measured pass or does not pass.
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
"""Admitted besides, by `--toy`."""

_IN_THE_RIGHT_PYTHON = "nox -s pipeline, which takes Python 3.11; coremill doctor tells where it looks for it"


def check_export_versions(*, toy: bool, model_type: str, versions: Versions | None = None) -> None:
    """Refuse to export or convert where it cannot work; warn where nobody has measured whether it does.

    Args:
        toy: `--toy` was given.
        model_type: of the checkpoint or the contract.
        versions: those of this process, unless given.

    Raises:
        ToyRefusedError: `toy`, and `model_type` is not a toy's; in any Python.
        VersionGateError: a Python in which export and conversion do not run, or a cell measured to fail.
        MachineError: torch is not installed here.
    """
    versions = versions or running_versions()
    if toy and model_type not in TOY_MODEL_TYPES:
        raise ToyRefusedError(
            f"--toy with a checkpoint of model type {model_type!r}",
            expected=f"a toy ({', '.join(sorted(TOY_MODEL_TYPES))}), or no --toy",
            run="the same command without --toy, in Python 3.11",
        )
    check_python(toy=toy, versions=versions)
    _check_packages(versions)


def check_python(*, toy: bool, versions: Versions | None = None) -> None:
    """Refuse a Python in which export and conversion do not run; needs no checkpoint, so it can come first.

    Raises:
        VersionGateError: not Python 3.10 or 3.11 (nor 3.13 with `toy`).
    """
    versions = versions or running_versions()
    if EXPORT_PYTHON.contains(versions.python, prereleases=True):
        return
    if TOY_PYTHON.contains(versions.python, prereleases=True):
        if toy:
            log.warning("--toy: exporting in Python %s, which is not measured", versions.python)
            return
        expected = "Python 3.10 or 3.11; --toy admits 3.13 for a toy"
    else:
        expected = "Python 3.10 or 3.11"
    raise VersionGateError(
        f"Python {versions.python} ({sys.executable}) does not run export and conversion",
        expected=expected,
        run=_IN_THE_RIGHT_PYTHON,
    )


def check_installed(*packages: str) -> None:
    """Refuse an environment that lacks one of `packages`; nothing is imported.

    Raises:
        MachineError: names those that are missing.
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
    """Cells that work, those of the torch at hand first."""
    cells = [cell for cell in read_compatibility().cells if cell.outcome is CellOutcome.PASSED]
    same = [cell for cell in cells if SpecifierSet(cell.torch).contains(versions.torch or "", prereleases=True)]
    return "a cell that was measured to work: " + "; ".join(str(cell) for cell in same or cells)


def cite_cell(versions: Versions) -> Cell | None:
    """The measured pass of this very cell, for a gate to cite; None if it was not measured or failed."""
    cell = read_compatibility().find(versions)
    return cell if cell is not None and cell.outcome is CellOutcome.PASSED else None
