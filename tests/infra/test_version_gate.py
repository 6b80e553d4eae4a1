"""The version gate: its errors, exit codes, and its result for every Python version."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.command import exit_on_error
from coremill.core.config import TOY_MODEL_TYPES
from coremill.core.errors import MachineError, ToyRefusedError, VersionGateError
from coremill.infra.compatibility import Versions
from coremill.infra.version_gate import check_export_versions, check_python, cite_cell

NOX = "nox -s pipeline, which uses Python 3.11; coremill doctor shows where it searches for it"


def versions(python: str = "3.11.7", **packages: str | None) -> Versions:
    held = {"torch": "2.9.1", "coremltools": "9.0", "numpy": "2.3.5", **packages}
    return Versions(python=python, **held)


def test_passed_cell_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        check_export_versions(toy=False, model_type="production", versions=versions())
        check_export_versions(toy=True, model_type="magic-8-ball", versions=versions(torch="2.8.0"))
    assert caplog.text == ""


def test_unsupported_python_is_rejected() -> None:
    with pytest.raises(VersionGateError) as failure:
        check_export_versions(toy=False, model_type="magic-8-ball", versions=versions("3.12.1"))
    assert str(failure.value) == (
        f"export and conversion do not support Python 3.12.1 ({sys.executable})\n"
        "  expected: Python 3.10 or 3.11\n"
        f"  run: {NOX}"
    )


def test_python_3_13_is_rejected_without_toy() -> None:
    with pytest.raises(VersionGateError) as failure:
        check_export_versions(toy=False, model_type="magic-8-ball", versions=versions("3.13.0"))
    assert failure.value.expected == "Python 3.10 or 3.11; --toy allows 3.13 for a toy"
    assert failure.value.exit_code == 30


def test_toy_allows_python_3_13(caplog: pytest.LogCaptureFixture) -> None:
    for model_type in TOY_MODEL_TYPES:
        check_export_versions(toy=True, model_type=model_type, versions=versions("3.13.0", coremltools=None))
    assert "--toy: exporting with Python 3.13.0, which was not measured" in caplog.text


@pytest.mark.parametrize("python", ["3.9.1", "3.10.13", "3.11.7", "3.13.0"])
def test_toy_is_rejected_for_other_model_types(python: str) -> None:
    with pytest.raises(ToyRefusedError) as failure:
        check_export_versions(toy=True, model_type="llama", versions=versions(python))
    assert str(failure.value) == (
        "--toy with a checkpoint of model type 'llama'\n"
        "  expected: a toy (magic-8-ball, toy)\n"
        "  run: the same command without --toy, in Python 3.11"
    )
    assert failure.value.exit_code == 31


@given(
    major=st.integers(2, 4),
    minor=st.integers(0, 40),
    patch=st.integers(0, 30),
    toy=st.booleans(),
    model_type=st.sampled_from(["magic-8-ball", "toy", "llama", "toys", ""]),
)
def test_gate_for_all_python_versions(major: int, minor: int, patch: int, toy: bool, model_type: str) -> None:
    wrong_python = (major, minor) not in [(3, 10), (3, 11)] and not (toy and (major, minor) == (3, 13))
    running = versions(f"{major}.{minor}.{patch}")
    if toy and model_type not in ("magic-8-ball", "toy"):
        with pytest.raises(ToyRefusedError):
            check_export_versions(toy=toy, model_type=model_type, versions=running)
    elif wrong_python:
        with pytest.raises(VersionGateError):
            check_export_versions(toy=toy, model_type=model_type, versions=running)
    else:
        check_export_versions(toy=toy, model_type=model_type, versions=running)


def test_release_candidate_belongs_to_its_minor_version() -> None:
    check_python(toy=False, versions=versions("3.11.0rc2"))
    with pytest.raises(VersionGateError):
        check_python(toy=False, versions=versions("3.12.0rc1"))


@pytest.mark.parametrize("numpy", ["2.4.0", "2.5.5", "2.10.1"])
def test_failed_cell_is_rejected(numpy: str) -> None:
    with pytest.raises(VersionGateError) as failure:
        check_export_versions(toy=False, model_type="llama", versions=versions(numpy=numpy))
    assert str(failure.value) == (
        f"python 3.11.7, torch 2.9.1, coremltools 9.0, numpy {numpy}: measured to fail as cell numpy-2.4 "
        "(coremltools ==9.0, numpy >=2.4): coremltools' `_cast` raises TypeError: only 0-dimensional arrays can be "
        "converted to Python scalars\n"
        "  expected: a cell that was measured to work: "
        "torch-2.9.1 (python ==3.11.*, torch ==2.9.1, coremltools ==9.0, numpy ==2.3.5)\n"
        "  run: nox -s pipeline, which uses the locked versions"
    )


def test_toy_does_not_allow_a_failed_cell() -> None:
    with pytest.raises(VersionGateError, match=r"cell numpy-2\.4 "):
        check_export_versions(toy=True, model_type="toy", versions=versions("3.13.0", numpy="2.5.5"))


def test_all_passed_cells_are_listed_for_an_unmeasured_torch() -> None:
    with pytest.raises(VersionGateError) as failure:
        check_export_versions(toy=False, model_type="llama", versions=versions(torch="2.7.0", numpy="2.4.0"))
    assert failure.value.expected is not None
    assert "torch-2.9.1 (" in failure.value.expected
    assert "torch-2.8.0 (" in failure.value.expected


def test_unmeasured_cell_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_export_versions(toy=False, model_type="llama", versions=versions("3.10.13"))
    assert caplog.messages == [
        "not measured: python 3.10.13, torch 2.9.1, coremltools 9.0, numpy 2.3.5; verification decides"
    ]


def test_cite_cell_returns_only_passed_cells() -> None:
    cited = cite_cell(versions())
    assert cited is not None
    assert cited.name == "torch-2.9.1"
    assert cite_cell(versions(numpy="2.4.0")) is None
    assert cite_cell(versions("3.10.13")) is None
    assert cite_cell(versions(coremltools=None)) is None


def test_environment_without_torch_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    """These tests run in a light environment, which really has no torch."""

    def command() -> int:
        check_export_versions(toy=True, model_type="toy")
        return 0

    assert exit_on_error(command) == MachineError.exit_code == 32
    assert capsys.readouterr().err == (
        f"machine error: torch is not installed in {sys.prefix}\n"
        "  expected: an environment with torch\n"
        f"  run: {NOX}\n"
    )


def test_gate_imports_neither_torch_nor_coremltools() -> None:
    code = (
        "import sys; from coremill.infra import version_gate, interpreters; from coremill.cli import doctor; "
        "print([name for name in ('torch', 'coremltools', 'numpy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
