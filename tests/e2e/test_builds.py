"""Reproducible builds, and builds with altered outputs, killed stages, other builds and failed conversions."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coremill.core import layout as names
from coremill.core.documents import read_json
from coremill.core.gates import Outcome
from coremill.core.layout import RunLayout
from coremill.core.manifest import check_outputs, read_manifest
from coremill.core.reports import RunSummary
from coremill.pipeline.environments import LANES, PRIMARY_LANE, installed
from coremill.pipeline.lock import RunLock

ROOT = Path(__file__).parents[2]
OTHER_LANE = next(lane for lane in LANES if lane != PRIMARY_LANE)
CONVERT = f"convert(torch='{PRIMARY_LANE}')"


@pytest.fixture(scope="module")
def build(nox_build, tiny_config, tmp_path_factory):
    """Build the tiny run up to the package; return the function that runs its sessions."""
    layout = RunLayout(build=tmp_path_factory.mktemp("build"), run="tiny")

    def run(session=CONVERT, *arguments, build_dir=layout.build):
        return nox_build(session, build_dir, "--config", str(tiny_config), *arguments)

    ended = run()
    assert ended.returncode == 0, ended.stdout[-3000:]
    run.layout = layout
    return run


def digests(layout):
    found = {}
    for stage, lane in (("dataset", None), ("training", None), ("export", PRIMARY_LANE), ("convert", PRIMARY_LANE)):
        folder = layout.stage(stage, lane)
        manifest = read_manifest(folder)
        check_outputs(folder, manifest)
        found[stage] = {name: output.digest for name, output in manifest.outputs.items()}
    return found


def test_builds_are_reproducible(build, tmp_path):
    assert build(build_dir=tmp_path).returncode == 0
    first, second = digests(build.layout), digests(RunLayout(build=tmp_path, run="tiny"))
    assert first["dataset"] == second["dataset"]
    assert first["training"]["tiny.ckpt"] == second["training"]["tiny.ckpt"]
    assert first["export"]["tiny.pt"] == second["export"]["tiny.pt"]
    assert first["convert"]["tiny.mlpackage"] == second["convert"]["tiny.mlpackage"]


def test_altered_output_is_rebuilt_with_the_same_bytes(build):
    before = digests(build.layout)
    folder = build.layout.stage("training")
    checkpoint = names.checkpoint_file(folder, "tiny")
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    ended = build()
    assert ended.returncode == 0
    assert "output tiny.ckpt was altered" in ended.stdout
    after = digests(build.layout)
    assert after["training"]["tiny.ckpt"] == before["training"]["tiny.ckpt"]
    assert after["convert"] == before["convert"]
    # The rebuilt output has the same bytes, so the stages that read it are fresh.
    assert ended.stdout.count("| fresh\n") == 3


def left_behind(layout):
    return list(layout.root.glob(".training.new-*"))


def test_killed_stage_leaves_the_last_good_output(build, tiny_config):
    before = digests(build.layout)
    python = installed(ROOT)["train"].python
    command = [python, "-m", "coremill", "stage", "training", "--force", "--config", tiny_config]
    command += ["--build-dir", build.layout.build]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, cwd=ROOT, env=environ)
    deadline = time.monotonic() + 60
    while not left_behind(build.layout) and time.monotonic() < deadline:
        assert process.poll() is None, "the stage ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left_behind(build.layout)
    assert digests(build.layout) == before
    ended = build()
    assert ended.returncode == 0
    assert not left_behind(build.layout)
    assert digests(build.layout) == before


def test_second_build_of_a_run_is_rejected(build):
    before = digests(build.layout)
    with RunLock(build.layout):
        ended = build(CONVERT, "--force")
    assert ended.returncode == 1
    assert f"is held by process {os.getpid()}, since 20" in ended.stdout
    assert digests(build.layout) == before


def test_stage_in_another_interpreter_is_rejected(build, tiny_config):
    command = [sys.executable, "-m", "coremill", "stage", "training", "--config", tiny_config]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 32
    assert "expected: the environment 'train' (Python 3.13)\n  run: nox -s env-train" in ended.stderr


def test_fallback_to_the_other_lane_is_reported(nox_build, tiny_config, tmp_path):
    """Uses a copy of the project, with its own environments, whose conversion fails in the primary lane."""
    copy = tmp_path / "project"
    leave = shutil.ignore_patterns(".git", ".nox", ".venv", "build", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=leave)
    module = copy / "src" / "coremill" / "conversion" / "convert_coreml.py"
    planted = (
        "def run_stage(context: StageContext) -> Figures:\n"
        f"    if context.lane == {PRIMARY_LANE!r}:\n"
        "        from coremill.core.errors import ConversionError\n"
        "        raise ConversionError('a planted failure')\n"
    )
    text, found = re.subn(r"^def run_stage\(.*\) -> Figures:\n", planted, module.read_text(), flags=re.MULTILINE)
    assert found == 1
    module.write_text(text)

    def run(*arguments):
        return nox_build("pipeline", copy / "build", "--config", str(tiny_config), *arguments, root=copy)

    failed = run()
    assert failed.returncode == 1
    assert f"convert-{PRIMARY_LANE} | conversion error: a planted failure" in failed.stdout
    layout = RunLayout(build=copy / "build", run="tiny")
    assert not layout.stage("convert", PRIMARY_LANE).exists()
    stopped = read_json(names.summary_file(layout.stage("report")), RunSummary)
    assert {row.stage: row.reason for row in stopped.stages if row.outcome is not Outcome.PASSED} == {
        "convert": "a planted failure",
        "verify": "stage convert did not complete",
    }

    fallen_back = run("--fallback")
    assert f"conversion failed with torch {PRIMARY_LANE}: building with torch {OTHER_LANE}" in fallen_back.stdout
    summary = read_json(names.summary_file(layout.stage("report")), RunSummary)
    assert summary.fell_back_from == PRIMARY_LANE
    assert [lane.lane for lane in summary.lanes] == [OTHER_LANE]
    assert read_manifest(layout.stage("convert", OTHER_LANE)).toolchain.packages["torch"] == OTHER_LANE
    assert not layout.stage("convert", PRIMARY_LANE).exists()
    assert PRIMARY_LANE in names.status_file(layout.stage("report")).read_text()
    # A tiny model's answers are nonsense: its must-gates fail, and so does the build.
    assert not summary.gates_ok
    assert fallen_back.returncode == 1
