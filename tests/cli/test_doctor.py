"""The text and exit codes of `coremill doctor`."""

from __future__ import annotations

import io
import platform
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from coremill.cli import doctor
from coremill.cli.examination import DoctorReport, Machine, examine
from coremill.core.command import exit_on_error
from coremill.pipeline.environments import CONVERT, TRAIN

ONE_LANE_IN_PLACE = """\
       machine
ready  system               Linux x86_64
ready  size                 2 cores, 25.0 GB of memory
ready  disk                 60.0 GB free; 2 missing environments: up to 9.4 GB,
                            less with a warm uv cache
ready  coremltools          has a wheel for this platform
note   Core ML              not_run here (needs macOS); coremill.mil runs the
                            package and checks its numbers
note   CUDA                 no device; no stage needs one

       interpreters
to do  python 3.13          not found on PATH, in pyenv, Homebrew or uv
                            run: make e2e (uv downloads it), or pyenv install
                            3.13, or brew install python@3.13
to do  python 3.11          not found on PATH, in pyenv, Homebrew or uv
                            run: make e2e (uv downloads it), or pyenv install
                            3.11, or brew install python@3.11

       environments
to do  train                missing (Python 3.13)
                            run: make e2e
to do  convert-torch-2.9.1  missing (Python 3.11)
                            run: make e2e
ready  convert-torch-2.8.0  Python 3.11.7, torch 2.8.0, coremltools 9.0, numpy
                            2.3.5

       lanes
ready  lane torch-2.9.1     works: cell torch-2.9.1, measured on Debian 12,
                            x86-64, 2 cores
ready  lane torch-2.8.0     works: cell torch-2.8.0, measured on Debian 12,
                            x86-64, 2 cores

       stages
to do  dataset              in train
to do  training             in train
to do  export torch-2.9.1   in convert-torch-2.9.1
ready  export torch-2.8.0   in convert-torch-2.8.0
to do  convert torch-2.9.1  in convert-torch-2.9.1
ready  convert torch-2.8.0  in convert-torch-2.8.0
to do  verify torch-2.9.1   in convert-torch-2.9.1
ready  verify torch-2.8.0   in convert-torch-2.8.0
to do  hf                   in train
to do  gguf                 in train
to do  texts                in train
to do  import               in train

"""


def printed(report: DoctorReport, width: int) -> str:
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=width, highlight=False))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def test_report_at_80_columns(checkout, linux) -> None:
    checkout.install(CONVERT["2.8.0"], "3.11.7", torch="2.8.0", coremltools="9.0", numpy="2.3.5")
    assert printed(examine(checkout.root, linux, checkout.environ), 80) == ONE_LANE_IN_PLACE


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_word_is_lost_at_any_width(checkout, linux, width: int) -> None:
    report = examine(checkout.root, linux, checkout.environ)
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    for finding in report.findings:
        for word in f"{finding.found} {finding.run or ''}".split():
            assert word in text.split(), word


@pytest.fixture
def run_doctor(checkout, monkeypatch: pytest.MonkeyPatch):
    """The command, in the checkout, on a given machine."""

    def run(machine: Machine) -> int:
        monkeypatch.chdir(checkout.root)
        monkeypatch.setattr(doctor, "this_machine", lambda root: machine)
        monkeypatch.setattr(doctor.os, "environ", checkout.environ)
        return exit_on_error(lambda: doctor.main([]))

    return run


def test_machine_that_can_be_set_up_passes(run_doctor, linux, capsys) -> None:
    assert run_doctor(linux) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert " ".join(out.split("\n\n")[-1].split()) == (
        "can be set up: python 3.13, python 3.11, train, convert-torch-2.9.1, convert-torch-2.8.0"
    )


def test_machine_that_cannot_be_set_up_is_an_error(run_doctor, linux, capsys) -> None:
    assert run_doctor(msgspec.structs.replace(linux, architecture="aarch64")) == 32
    out, err = capsys.readouterr()
    assert "blocked  coremltools" in out
    assert err == (
        "machine error: missing, and not available on this machine: coremltools\n"
        "  expected: a machine on which every stage can run\n"
        "  run: make e2e, on Linux x86-64 or a Mac; here: nox -s training\n"
    )


def test_every_stage_can_run_with_every_environment(checkout, linux) -> None:
    checkout.install(TRAIN, "3.13.0", torch="2.9.1", numpy="2.5.5")
    for lane, environment in CONVERT.items():
        checkout.install(environment, "3.11.7", torch=lane, coremltools="9.0", numpy="2.3.5")
    assert doctor.verdict(examine(checkout.root, linux, checkout.environ)) == "every stage can run"


def test_outside_a_checkout_the_installed_packages_are_examined(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_on_error(lambda: doctor.main([])) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f" interpreters ready python {platform.python_version()} {sys.executable} environments " in out
    assert " coremill[mil] for mil inspect, mil run, mil compare, mil bisect, mil lint, mil selftest; " in out
    assert " not installed: torch, coremltools, numpy run: pip install 'coremill[mil]' " in out
    assert " lanes " not in out
    assert " stages " not in out
    assert out.endswith(" can be set up: coremill[train], coremill[convert], coremill[mil]")
