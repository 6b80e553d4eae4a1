"""The shipped compatibility matrix, and which versions a cell covers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.cli.examination import locked_versions
from coremill.core.errors import DocumentError, SchemaVersionError
from coremill.infra.compatibility import (
    Cell,
    CellOutcome,
    Compatibility,
    Versions,
    installed_versions,
    read_compatibility,
    running_versions,
)
from coremill.pipeline.environments import CONVERT, LANES

ROOT = Path(__file__).parents[2]

numbers = st.integers(0, 40)


def cell(name: str, outcome: CellOutcome = CellOutcome.PASSED, **specifiers: str) -> Cell:
    spans = {"python": "", "torch": "", "coremltools": "", "numpy": "", **specifiers}
    reason = None if outcome is CellOutcome.PASSED else "it fails"
    return Cell(name=name, outcome=outcome, measured="by hand", reason=reason, source="a test", **spans)


def versions(**parts: str | None) -> Versions:
    return Versions(**{"python": "3.11.7", "torch": "2.9.1", "coremltools": "9.0", "numpy": "2.3.5", **parts})


def find_cell(**parts: str) -> Cell | None:
    return read_compatibility().find(versions(**parts))


@pytest.mark.parametrize("lane", LANES)
def test_every_lane_is_locked_to_a_passed_cell(lane: str) -> None:
    locked = locked_versions(CONVERT[lane].lock(ROOT), CONVERT[lane].python)
    found = read_compatibility().find(locked)
    assert found is not None
    assert (found.name, found.outcome) == (f"torch-{lane}", CellOutcome.PASSED)


@pytest.mark.parametrize(
    ("python", "torch", "coremltools", "numpy", "name"),
    [
        ("3.11.7", "2.9.1", "9.0", "2.3.5", "torch-2.9.1"),
        ("3.11.0", "2.8.0", "9.0", "2.3.5", "torch-2.8.0"),
        ("3.11.7", "2.9.1+cpu", "9.0", "2.3.5", "torch-2.9.1"),
        ("3.11.7", "2.9.1", "9.0.0", "2.3.5", "torch-2.9.1"),
        ("3.11.7", "2.9.1", "9.0", "2.4.0", "numpy-2.4"),
        ("3.13.0", "2.9.1", "9.0", "2.5.5", "numpy-2.4"),
        ("3.11.7", "2.9.1", "9.0", "2.10.0", "numpy-2.4"),
        ("3.11.7", "2.9.1", "9.0", "2.4.0rc1", None),  # less than 2.4, and not 2.3.5
        ("3.11.7", "2.9.1", "9.0", "2.3.4", None),
        ("3.10.13", "2.9.1", "9.0", "2.3.5", None),
        ("3.13.0", "2.9.1", "9.0", "2.3.5", None),
        ("3.11.7", "2.9.10", "9.0", "2.3.5", None),
        ("3.11.7", "2.9.1", "8.3.0", "2.4.0", None),
    ],
)
def test_find_cell(python: str, torch: str, coremltools: str, numpy: str, name: str | None) -> None:
    found = find_cell(python=python, torch=torch, coremltools=coremltools, numpy=numpy)
    assert (found and found.name) == name


@given(major=numbers, minor=numbers, patch=numbers)
def test_exactly_numpy_2_4_and_later_fail(major: int, minor: int, patch: int) -> None:
    found = find_cell(numpy=f"{major}.{minor}.{patch}")
    fails = found is not None and found.outcome is CellOutcome.FAILED
    assert fails == ((major, minor) >= (2, 4))


@given(minor=numbers, patch=numbers)
def test_passed_cells_are_for_python_3_11_only(minor: int, patch: int) -> None:
    found = find_cell(python=f"3.{minor}.{patch}")
    assert (found is not None) == (minor == 11)


@given(absent=st.sampled_from(["torch", "coremltools", "numpy"]))
def test_absent_package_is_in_no_cell(absent: str) -> None:
    assert read_compatibility().find(versions(**{absent: None})) is None
    assert not cell("any").covers(versions(**{absent: None}))


def test_failed_cell_takes_precedence() -> None:
    good, bad = cell("good", torch=">=2"), cell("bad", CellOutcome.FAILED, numpy=">=2")
    for cells in ((good, bad), (bad, good)):
        assert Compatibility(cells=cells).find(versions()) is bad
    assert Compatibility(cells=(good, bad)).find(versions(numpy="1.26")) is good


def test_cells_have_sources_and_reasons() -> None:
    for each in read_compatibility().cells:
        assert each.measured.strip()
        assert each.source == "measured on Debian 12, x86-64, 2 cores"
    bad = find_cell(numpy="2.4.6")
    assert bad is not None
    assert str(bad) == "numpy-2.4 (coremltools ==9.0, numpy >=2.4)"
    assert bad.reason == (
        "coremltools' `_cast` raises TypeError: only 0-dimensional arrays can be converted to Python scalars"
    )


GOOD_CELL = """
[[cells]]
name = "a"
python = "==3.11.*"
torch = ""
coremltools = ""
numpy = ""
outcome = "passed"
measured = "m"
source = "s"
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD_CELL.replace("==3.11.*", "3.11"),
            "{path}: Invalid specifier: '3.11' at `$.cells[0]`",
        ),
        (
            GOOD_CELL.replace('"passed"', '"failed"'),
            "{path}: cell 'a' is failed without a reason at `$.cells[0]`",
        ),
        (
            GOOD_CELL.replace('"passed"', '"perhaps"'),
            "{path}: Invalid enum value 'perhaps' at `$.cells[0].outcome`",
        ),
        (GOOD_CELL * 2, "{path}: more than one cell is named a at `$`"),
        (GOOD_CELL + 'sauce = "s"\n', "{path}: unknown key `sauce` at `$.cells[0]`"),
    ],
)
def test_invalid_matrix_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "compatibility.toml"
    path.write_text('schema_version = "1.0"\n' + text)
    with pytest.raises(DocumentError) as failure:
        read_compatibility(path)
    assert failure.value.found == message.format(path=path)


def test_unknown_major_version_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "compatibility.toml"
    path.write_text('schema_version = "2.0"\n' + GOOD_CELL)
    with pytest.raises(SchemaVersionError):
        read_compatibility(path)


def test_invalid_version_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"`numpy` is 'newest', which is not a version"):
        versions(numpy="newest")
    assert str(versions(coremltools=None)) == "python 3.11.7, torch 2.9.1, coremltools absent, numpy 2.3.5"


def test_installed_versions_are_read_from_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "Torch-2.9.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: torch\nVersion: 2.9.1\n")
    assert installed_versions([str(tmp_path)]) == {"torch": "2.9.1", "coremltools": None, "numpy": None}
    import platform

    assert running_versions().python == platform.python_version().rstrip("+")
