"""The findings for machines that have everything, nothing or a part of it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from coremill.cli.examination import (
    GB,
    DoctorReport,
    Finding,
    Standing,
    examine,
    locked_versions,
    this_machine,
)
from coremill.core.errors import MachineError
from coremill.pipeline.environments import CONVERT, TRAIN

ROOT = Path(__file__).parents[2]
READY, NOTE, TO_DO, BLOCKED = Standing.READY, Standing.NOTE, Standing.TO_DO, Standing.BLOCKED


@pytest.fixture
def look(checkout, linux):
    """Examine the checkout, on a Linux machine that has all that a build needs, except for `changes`."""

    def examined(environ: dict[str, str] | None = None, **changes) -> DoctorReport:
        machine = msgspec.structs.replace(linux, **changes)
        return examine(checkout.root, machine, {**checkout.environ, **(environ or {})})

    return examined


def finding(report: DoctorReport, subject: str) -> Finding:
    return next(each for each in report.findings if each.subject == subject)


def standings(report: DoctorReport) -> dict[str, Standing]:
    return {f"{row.stage} {row.lane}" if row.lane else row.stage: row.standing for row in report.stages}


def install_all(checkout) -> None:
    checkout.install(TRAIN, "3.13.0", torch="2.9.1", numpy="2.5.5")
    for lane, environment in CONVERT.items():
        checkout.install(environment, "3.11.7", torch=lane, coremltools="9.0", numpy="2.3.5")


def test_machine_with_everything_is_ready(checkout, look) -> None:
    install_all(checkout)
    for version in ("3.13.0", "3.11.7"):
        checkout.interpreter(version)
    report = look()
    assert {each.standing for each in report.findings} == {READY, NOTE}
    assert set(standings(report).values()) == {READY}
    assert finding(report, "convert-torch-2.8.0").found == (
        "Python 3.11.7, torch 2.8.0, coremltools 9.0, numpy 2.3.5"
    )
    assert finding(report, "lane torch-2.8.0").found == (
        "works: cell torch-2.8.0, measured on Debian 12, x86-64, 2 cores"
    )
    path = checkout.root / ".pyenv/versions/3.13.0/bin/python3.13"
    assert finding(report, "python 3.13").found == f"3.13.0 at {path}"
    assert finding(report, "Core ML") == Finding(
        subject="Core ML",
        standing=NOTE,
        found="not_run here (needs macOS); coremill.mil runs the package and checks its numbers",
    )


def test_fresh_machine_is_to_do_with_commands(checkout, look) -> None:
    report = look()
    assert report.blockers == ()
    assert set(standings(report).values()) == {TO_DO}
    assert finding(report, "python 3.11") == Finding(
        subject="python 3.11",
        standing=TO_DO,
        found="not found on PATH, in pyenv, Homebrew or uv",
        run="make e2e (uv downloads it), or pyenv install 3.11, or brew install python@3.11",
    )
    assert finding(report, "train").run == "make e2e"
    assert finding(report, "convert-torch-2.9.1").run == "make e2e"
    assert finding(report, "convert-torch-2.8.0").run == "make matrix"
    assert finding(report, "disk").found == (
        "60.0 GB free; 3 missing environments: up to 12.0 GB, less with a warm uv cache"
    )
    # Before anything is installed, the cell of the lock.
    assert finding(report, "lane torch-2.9.1").standing is READY


def test_missing_environment_affects_its_stages_alone(checkout, look) -> None:
    install_all(checkout)
    for version in ("3.13.0", "3.11.7"):
        checkout.interpreter(version)
    stamp = checkout.root / ".nox" / "convert-torch-2.8.0" / "coremill-environment.json"
    stamp.unlink()  # as a killed installation leaves it
    found = standings(look())
    assert [name for name, standing in found.items() if standing is TO_DO] == [
        "export 2.8.0",
        "convert 2.8.0",
        "verify 2.8.0",
    ]


@pytest.mark.parametrize(
    ("name", "value"), [("UV_OFFLINE", "1"), ("UV_PYTHON_DOWNLOADS", "never"), ("NOX_DOWNLOAD_PYTHON", "never")]
)
def test_interpreter_whose_download_is_forbidden_blocks(checkout, look, name: str, value: str) -> None:
    checkout.interpreter("3.11.7")
    report = look({name: value})
    assert report.blockers == (
        Finding(
            subject="python 3.13",
            standing=BLOCKED,
            found=f"not found on PATH, in pyenv, Homebrew or uv; {name}={value} prevents uv from downloading it",
            run="pyenv install 3.13, or brew install python@3.13",
        ),
    )
    assert standings(report)["training"] is BLOCKED
    assert standings(report)["export 2.9.1"] is TO_DO


def test_shim_that_fails_is_named(checkout, look) -> None:
    shim = checkout.root / ".pyenv" / "shims" / "python3.13"
    shim.parent.mkdir(parents=True)
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    report = look({"PATH": str(shim.parent)})
    assert finding(report, "python 3.13").found == (
        f"not found on PATH, in pyenv, Homebrew or uv; ignored, because they do not run as Python 3.13: {shim}"
    )


def test_interpreter_that_is_not_needed_is_a_note(checkout, look) -> None:
    install_all(checkout)
    report = look({"UV_OFFLINE": "1"})
    assert finding(report, "python 3.13").standing is NOTE
    assert set(standings(report).values()) == {READY}


def test_linux_on_arm_has_no_coremltools(checkout, look) -> None:
    report = look(architecture="aarch64")
    assert report.blockers == (
        Finding(
            subject="coremltools",
            standing=BLOCKED,
            found="no wheel for Linux aarch64: no export, conversion or verification",
            run="make e2e, on Linux x86-64 or a Mac; here: nox -s training",
        ),
    )
    found = standings(report)
    assert {name for name, standing in found.items() if standing is BLOCKED} == {
        f"{stage} {lane}" for stage in ("export", "convert", "verify") for lane in CONVERT
    }
    assert found["training"] is TO_DO


def test_mac_can_predict_and_its_disk_is_a_note(checkout, look) -> None:
    report = look(system="Darwin", architecture="arm64", free_bytes=9 * GB)
    assert report.blockers == ()
    assert finding(report, "Core ML").found == "can predict here"
    assert finding(report, "disk") == Finding(
        subject="disk",
        standing=NOTE,
        found="9.0 GB free; the size of the 3 missing environments was not measured on this platform",
    )


def test_other_system_blocks_every_stage(checkout, look) -> None:
    report = look(system="Windows", architecture="AMD64")
    assert [each.subject for each in report.blockers] == ["system"]
    assert set(standings(report).values()) == {BLOCKED}


@pytest.mark.parametrize(
    ("missing", "free_gb", "standing"),
    [(3, 11.9, BLOCKED), (3, 12.1, READY), (1, 6.7, BLOCKED), (1, 6.9, READY), (0, 0.1, READY)],
)
def test_disk_space_is_checked_for_the_missing_environments(
    checkout, look, missing: int, free_gb: float, standing: Standing
) -> None:
    for environment in (*CONVERT.values(), TRAIN)[missing:]:
        checkout.install(environment, f"{environment.python}.1", torch="2.9.1", numpy="2.5.5")
    report = look(free_bytes=int(free_gb * GB))
    assert finding(report, "disk").standing is standing
    found = standings(report)
    assert found["verify 2.9.1"] is (BLOCKED if standing is BLOCKED else TO_DO)
    # A stage whose environment exists needs no space.
    assert found["training"] is (
        BLOCKED if standing is BLOCKED and missing == 3 else TO_DO if missing == 3 else READY
    )


def test_outdated_environment_is_to_do(checkout, look) -> None:
    install_all(checkout)
    lock = CONVERT["2.9.1"].lock(checkout.root)
    lock.write_text(lock.read_text() + "# changed\n")
    found = finding(look(), "convert-torch-2.9.1")
    assert (found.standing, found.run) == (TO_DO, "make e2e")
    assert found.found.endswith("; installed from an older convert-torch-2.9.1.txt")


def test_environment_with_another_python_is_to_do(checkout, look) -> None:
    checkout.install(CONVERT["2.9.1"], "3.1.7", torch="2.9.1", coremltools="9.0", numpy="2.3.5")
    found = finding(look(), "convert-torch-2.9.1")
    assert (found.standing, found.run) == (TO_DO, "make e2e")
    assert found.found.endswith("; its Python is not 3.11")


def test_environment_changed_to_a_failing_cell_is_to_do(checkout, look) -> None:
    folder = checkout.install(CONVERT["2.9.1"], "3.11.7", torch="2.9.1", coremltools="9.0", numpy="2.4.6")
    report = look()
    assert finding(report, "convert-torch-2.9.1") == Finding(
        subject="convert-torch-2.9.1",
        standing=TO_DO,
        found="Python 3.11.7, torch 2.9.1, coremltools 9.0, numpy 2.4.6; its lock has torch 2.9.1, "
        "coremltools 9.0, numpy 2.3.5: it was changed by hand",
        run=f"rm -r {folder}, then make e2e",
    )
    lane = finding(report, "lane torch-2.9.1")
    assert lane.standing is TO_DO
    assert "measured to fail as cell numpy-2.4" in lane.found


def test_lock_of_a_failing_cell_blocks(checkout, look) -> None:
    lock = CONVERT["2.9.1"].lock(checkout.root)
    lock.write_text(lock.read_text().replace("numpy==2.3.5", "numpy==2.4.6"))
    report = look()
    lane = finding(report, "lane torch-2.9.1")
    assert lane.standing is BLOCKED
    assert lane.run == "nox -s lock, after correcting requirements/convert-torch-2.9.1.in; then make e2e"
    assert standings(report)["verify 2.9.1"] is BLOCKED
    assert standings(report)["verify 2.8.0"] is TO_DO


def test_lock_of_an_unmeasured_cell_is_a_note(checkout, look) -> None:
    lock = CONVERT["2.9.1"].lock(checkout.root)
    lock.write_text(lock.read_text().replace("numpy==2.3.5", "numpy==2.3.4"))
    found = finding(look(), "lane torch-2.9.1")
    assert found.standing is NOTE
    assert found.found.startswith("not measured: python 3.11.0, torch 2.9.1, coremltools 9.0, numpy 2.3.4")


def test_locked_versions_follow_the_markers(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "numpy==2.2.6 ; python_full_version < '3.11' \\\n    --hash=sha256:00\n"
        "numpy==2.3.5 ; python_full_version >= '3.11' \\\n    --hash=sha256:00\n"
        "    # via torch\ntorch==2.9.1\n"
    )
    assert locked_versions(lock, "3.10").numpy == "2.2.6"
    assert str(locked_versions(lock, "3.11")) == "python 3.11.0, torch 2.9.1, coremltools absent, numpy 2.3.5"
    lock.write_text("torch==2.9.1\nnumpy two\n")
    with pytest.raises(MachineError, match=r"lock\.txt:2: Expected"):
        locked_versions(lock, "3.11")


def test_directory_without_locks_is_rejected(tmp_path: Path, linux) -> None:
    with pytest.raises(MachineError) as failure:
        examine(tmp_path, linux, {})
    assert str(failure.value) == (
        f"{tmp_path} has no requirements/train.txt\n  expected: a lock for each environment\n  run: nox -s lock"
    )


def test_finding_without_a_command_is_rejected() -> None:
    for standing in (TO_DO, BLOCKED):
        with pytest.raises(ValueError, match=r"without a command to run"):
            Finding(subject="disk", standing=standing, found="none")


def test_this_machine_and_this_checkout() -> None:
    machine = this_machine(ROOT)
    assert machine.system in ("Linux", "Darwin")
    assert machine.cores >= 1
    assert machine.memory_bytes > GB
    report = examine(ROOT, machine, os.environ)
    assert [row.stage for row in report.stages][:2] == ["dataset", "training"]
