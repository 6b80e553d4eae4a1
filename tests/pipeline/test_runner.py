"""A fresh stage is skipped, outputs are published atomically, inputs are checked, and one build runs at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import pytest

from coremill.core.errors import DefectError, DigestError, RunLockedError, StageError
from coremill.core.manifest import read_manifest
from coremill.pipeline.lock import TOKEN_VARIABLE, RunLock
from coremill.pipeline.runner import run_stage
from coremill.pipeline.stages import find_stage


def build(stages, config, layout, toolset, name, **options):
    return run_stage(find_stage(name, stages), config, layout, toolset, None, stages=stages, **options)


def test_fresh_stage_is_not_run(stages, config, layout, toolset):
    first = build(stages, config, layout, toolset, "dataset")
    assert build(stages, config, layout, toolset, "dataset") == first
    time.sleep(1.1)  # started_at is in whole seconds
    forced = build(stages, config, layout, toolset, "dataset", force=True)
    assert forced.started_at > first.started_at
    assert forced.outputs == first.outputs


def test_stage_without_its_input_is_rejected(stages, config, layout, toolset):
    with pytest.raises(StageError) as caught:
        build(stages, config, layout, toolset, "training")
    assert str(caught.value) == (
        f"{layout.stage('dataset')} has no manifest.json\n  expected: a finished stage\n  run: nox -s pipeline"
    )
    assert not layout.stage("training").exists()


def test_altered_input_is_rejected_and_the_old_output_stays(stages, config, layout, toolset):
    build(stages, config, layout, toolset, "dataset")
    old = build(stages, config, layout, toolset, "training")
    (layout.stage("dataset") / "out.txt").write_text("tampered")
    with pytest.raises(DigestError, match="nox -s pipeline -- --force dataset") as caught:
        build(stages, config, layout, toolset, "training", force=True)
    assert caught.value.exit_code == 13
    assert read_manifest(layout.stage("training")) == old


def test_failed_stage_leaves_the_old_output(stages, config, layout, toolset, tmp_path):
    old = build(stages, config, layout, toolset, "dataset")
    module = tmp_path / "modules" / "tiny_dataset.py"
    module.write_text(
        "def run_stage(context):\n    (context.out / 'half').write_text('x')\n    raise OSError('disk')\n"
    )
    with pytest.raises(DefectError, match="OSError: disk"):
        build(stages, config, layout, toolset, "dataset", force=True)
    assert read_manifest(layout.stage("dataset")) == old
    assert sorted(entry.name for entry in layout.root.iterdir()) == ["dataset", "dataset.failed"]
    left = read_manifest(layout.failed_stage("dataset"))
    assert (left.outcome, left.error, list(left.outputs)) == ("failed", "OSError: disk", ["half"])
    module.write_text("def run_stage(context):\n    return {}\n")
    build(stages, config, layout, toolset, "dataset", force=True)
    assert sorted(entry.name for entry in layout.root.iterdir()) == ["dataset"]


def test_second_build_is_rejected_with_the_holder_of_the_lock(stages, config, layout, toolset):
    with RunLock(layout), pytest.raises(RunLockedError) as caught:
        build(stages, config, layout, toolset, "dataset")
    assert caught.value.exit_code == 50
    assert f"is held by process {os.getpid()}, since 20" in caught.value.found
    build(stages, config, layout, toolset, "dataset")


def test_stage_shares_the_lock_of_its_build(stages, config, layout, toolset, monkeypatch):
    with RunLock(layout) as lock:
        monkeypatch.setenv(TOKEN_VARIABLE, lock.token)
        build(stages, config, layout, toolset, "dataset")
        monkeypatch.setenv(TOKEN_VARIABLE, "another")
        with pytest.raises(RunLockedError):
            build(stages, config, layout, toolset, "dataset")


ORPHAN = """
    import sys, time
    from pathlib import Path
    from coremill.core.layout import RunLayout
    from coremill.pipeline.lock import RunLock, WriterLock
    layout = RunLayout(build=Path(sys.argv[1]), run="magic-8-ball")
    with RunLock(layout), WriterLock(layout, "dataset", None):
        print("writing", flush=True)
        sys.stdin.read()
"""


def test_orphaned_stage_blocks_other_builds(stages, config, layout, toolset, tmp_path, monkeypatch):
    """After the build is killed, its stage still runs: no other build may start before it ends."""
    script = tmp_path / "orphan.py"
    script.write_text(textwrap.dedent(ORPHAN))
    lock = RunLock(layout)
    environ = {**os.environ, TOKEN_VARIABLE: lock.token}
    command = [sys.executable, script, layout.build]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stage:
        assert stage.stdout.readline() == b"writing\n"
        lock.release()  # what the kernel does when the build is killed
        with pytest.raises(RunLockedError, match=f"is held by process {stage.pid}, since 20"):
            build(stages, config, layout, toolset, "dataset")
        stage.stdin.close()
        stage.wait()
    build(stages, config, layout, toolset, "dataset")


def test_token_of_a_finished_build_is_invalid(layout, monkeypatch):
    ended = RunLock(layout)
    monkeypatch.setenv(TOKEN_VARIABLE, ended.token)
    ended.release()
    with RunLock(layout) as mine:
        assert mine.token != ended.token


def test_removed_lock_file_is_created_again(layout):
    with RunLock(layout):
        layout.lock.unlink()
        with RunLock(layout) as second:  # `make clean` removed the run, so this is another build
            assert layout.lock.exists()
            with pytest.raises(RunLockedError):
                RunLock(layout)
            assert second.token
