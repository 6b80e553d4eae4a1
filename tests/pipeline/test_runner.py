"""Running a stage: skipped when fresh, published whole, its inputs hashed again, one build at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from coremill.core.errors import DigestError, RunLockedError, StageError
from coremill.core.manifest import read_manifest
from coremill.pipeline.lock import TOKEN_VARIABLE, RunLock
from coremill.pipeline.publish import publishing, recover
from coremill.pipeline.runner import run_stage
from coremill.pipeline.stages import find_stage


def build(stages, config, layout, toolset, name, **options):
    return run_stage(find_stage(name, stages), config, layout, toolset, None, stages=stages, **options)


def test_a_fresh_stage_does_not_run_again(stages, config, layout, toolset):
    first = build(stages, config, layout, toolset, "dataset")
    assert build(stages, config, layout, toolset, "dataset") == first
    time.sleep(1.1)  # started_at counts whole seconds
    forced = build(stages, config, layout, toolset, "dataset", force=True)
    assert forced.started_at > first.started_at
    assert forced.outputs == first.outputs


def test_a_stage_without_its_input_is_refused(stages, config, layout, toolset):
    with pytest.raises(StageError) as caught:
        build(stages, config, layout, toolset, "training")
    assert str(caught.value) == (
        f"{layout.stage('dataset')} has no manifest.json\n  expected: a finished stage\n  run: nox -s pipeline"
    )
    assert not layout.stage("training").exists()


def test_an_altered_input_is_refused_and_the_old_output_stays(stages, config, layout, toolset):
    build(stages, config, layout, toolset, "dataset")
    old = build(stages, config, layout, toolset, "training")
    (layout.stage("dataset") / "out.txt").write_text("tampered")
    with pytest.raises(DigestError, match="nox -s pipeline -- --force dataset") as caught:
        build(stages, config, layout, toolset, "training", force=True)
    assert caught.value.exit_code == 13
    assert read_manifest(layout.stage("training")) == old


def test_a_stage_that_fails_leaves_what_was_there(stages, config, layout, toolset, tmp_path):
    old = build(stages, config, layout, toolset, "dataset")
    module = tmp_path / "modules" / "tiny_dataset.py"
    module.write_text(
        "def run_stage(context):\n    (context.out / 'half').write_text('x')\n    raise OSError('disk')\n"
    )
    sys.modules.pop("tiny_dataset")
    with pytest.raises(OSError, match="disk"):
        build(stages, config, layout, toolset, "dataset", force=True)
    assert read_manifest(layout.stage("dataset")) == old
    assert sorted(entry.name for entry in layout.root.iterdir()) == ["dataset"]


def test_a_second_build_is_refused_and_told_who_is_first(stages, config, layout, toolset):
    with RunLock(layout.lock), pytest.raises(RunLockedError) as caught:
        build(stages, config, layout, toolset, "dataset")
    assert caught.value.exit_code == 50
    assert f"is held by process {os.getpid()}, since 20" in caught.value.found
    build(stages, config, layout, toolset, "dataset")


def test_a_stage_of_the_build_that_holds_the_lock_may_run(stages, config, layout, toolset, monkeypatch):
    with RunLock(layout.lock) as lock:
        monkeypatch.setenv(TOKEN_VARIABLE, lock.token)
        build(stages, config, layout, toolset, "dataset")
        monkeypatch.setenv(TOKEN_VARIABLE, "another")
        with pytest.raises(RunLockedError):
            build(stages, config, layout, toolset, "dataset")


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from coremill.pipeline.lock import RunLock
    from coremill.pipeline.publish import publishing
    folder = Path(sys.argv[1])
    rename = Path.rename

    def rename_and_die(source, target):
        rename(source, target)
        if sys.argv[2] == "between" and source == folder:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = rename_and_die
    with RunLock(folder.parent / "lock"):
        with publishing(folder) as fresh:
            (fresh / "a").write_text("new")
            if sys.argv[2] == "within":
                os.kill(os.getpid(), signal.SIGKILL)
            (fresh / "b").write_text("new")
"""


@pytest.mark.parametrize("moment", ["within", "between"])
def test_a_killed_build_leaves_the_last_good_artifact(tmp_path, moment):
    folder = tmp_path / "stage"
    with publishing(folder) as fresh:
        (fresh / "a").write_text("old")
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    ended = subprocess.run([sys.executable, script, folder, moment], check=False)
    assert ended.returncode == -signal.SIGKILL
    with RunLock(tmp_path / "lock"):  # the kernel released the dead one's
        recover(folder)
    assert {entry.name: entry.read_text() for entry in folder.iterdir()} == {"a": "old"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["killed.py", "lock", "stage"]


def test_a_killed_first_build_leaves_nothing_that_looks_finished(tmp_path):
    folder = tmp_path / "stage"
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    subprocess.run([sys.executable, script, folder, "within"], check=False)
    assert not folder.exists()
    with publishing(folder) as fresh:
        assert list(fresh.iterdir()) == []
        (fresh / "a").write_text("whole")
    assert (folder / "a").read_text() == "whole"


def test_a_published_folder_replaces_the_old_one_whole(tmp_path):
    folder = tmp_path / "stage"
    for name in ("a", "b"):
        with publishing(folder) as fresh:
            (fresh / name).write_text(name)
    assert [entry.name for entry in folder.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage"]
