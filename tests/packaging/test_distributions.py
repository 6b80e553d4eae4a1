"""What the sdist and the wheel contain, and the requirements in their metadata."""

from __future__ import annotations

import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from coremill.cli.commands import COMMANDS
from coremill.infra.compatibility import PARTS, CellOutcome, read_compatibility

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "coremill"
DATA = {".bin", ".json", ".mlmodel", ".npz", ".toml", ".txt"}

PYTHON = {"python_version": "3.13"}


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def extras(metadata: Message) -> dict[str, list[Requirement]]:
    """The requirements of each extra."""
    requirements = [Requirement(each) for each in metadata.get_all("Requires-Dist", [])]
    found = {
        extra: [each for each in requirements if each.marker and each.marker.evaluate({**PYTHON, "extra": extra})]
        for extra in metadata.get_all("Provides-Extra", [])
    }
    return {
        extra: [inner for each in of for inner in (found[next(iter(each.extras))] if each.extras else [each])]
        for extra, of in found.items()
    }


def test_wheel_contains_the_package_and_its_data_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    on_disk = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names == {path.relative_to(SOURCE.parent).as_posix() for path in on_disk}
    assert {Path(name).suffix for name in names if not name.endswith("/py.typed")} == {".py", *DATA}
    assert "coremill/py.typed" in names


def test_sdist_contains_source_documents_and_licence_alone(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.partition("/")[0] for name in names} == {
        *(".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "docs", "pyproject.toml", "src"),
    }
    assert {"src/coremill/infra/compatibility.toml", "docs/exit-codes.md"} <= names


def test_metadata_is_complete(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {each.partition(",")[0] for each in metadata.get_all("Project-URL")} == {
        *("Homepage", "Documentation", "Changelog", "Issues"),
    }
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.13"} <= {*metadata.get_all("Classifier")}


def test_extras_admit_the_measured_cells_that_passed_and_no_other(extras):
    bounds = {each.name: each.specifier for each in extras["mil"]}
    for cell in read_compatibility().cells:
        measured = {part: SpecifierSet(getattr(cell, part)) for part in PARTS if part != "python"}
        admitted = [
            bounds[part].contains(each.version) for part, specifiers in measured.items() for each in specifiers
        ]
        assert all(admitted) == (cell.outcome is CellOutcome.PASSED), cell.name


@pytest.mark.parametrize("command", [name for name, each in COMMANDS.items() if each.needs])
def test_extra_of_a_command_installs_what_it_needs(extras, command):
    """Each of these packages is imported by the name that it is installed by."""
    names = {each.name for each in extras[COMMANDS[command].extra]}
    assert {*COMMANDS[command].needs} <= names


def test_environments_install_the_dependencies_of_the_package(metadata):
    """requirements/coremill.in, from which every lock is made, adds only the build backend."""
    lines = (ROOT / "requirements" / "coremill.in").read_text().splitlines()
    locked = {str(Requirement(line)) for line in lines if not line.startswith("#")}
    required = {Requirement(each) for each in metadata.get_all("Requires-Dist")}
    assert locked - {"hatchling>=1.27", "editables>=0.5"} == {
        str(each) for each in required if "extra" not in str(each.marker)
    }
