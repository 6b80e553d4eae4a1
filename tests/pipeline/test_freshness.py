"""Each reason for which a stage is stale, and changes that leave it fresh."""

from __future__ import annotations

import os
import re
import time
from io import StringIO

import msgspec
import pytest
from rich.console import Console

from coremill.core.manifest import read_manifest
from coremill.pipeline import freshness as freshness_module
from coremill.pipeline.freshness import freshness
from coremill.pipeline.runner import run_stage
from coremill.pipeline.status import status_table


@pytest.fixture
def built(stages, config, layout, toolset):
    for stage in stages:
        run_stage(stage, config, layout, toolset, None, stages=stages)
    return lambda name="training", config=config, toolset=toolset, stages=stages: (
        freshness(
            next(stage for stage in stages if stage.name == name), config, layout, toolset, None, stages
        ).reasons
    )


def test_stage_that_never_ran_is_stale(stages, config, layout, toolset):
    state = freshness(stages[0], config, layout, toolset, None, stages)
    assert not state.fresh
    assert state.reasons == ("never ran",)


def test_unchanged_stages_are_fresh(built):
    assert built("dataset") == built("training") == ()


def test_modification_times_are_ignored(built, layout):
    for path in layout.root.rglob("*"):
        os.utime(path, (time.time() + 1000, time.time() + 1000))
    assert built() == ()


def test_changed_setting_makes_only_its_readers_stale(built, config):
    changed = msgspec.structs.replace(config, training=msgspec.structs.replace(config.training, epochs=9))
    assert built(config=changed) == (f"configuration: training.epochs {config.training.epochs} → 9",)
    assert built("dataset", config=changed) == ()


def test_changed_interpreter_and_lock(built, toolset):
    other = msgspec.structs.replace(toolset, interpreter="3.11.9", lock_digest="sha256:other")
    assert built(toolset=other) == ("its environment's lock changed", "interpreter: 3.11.7 → 3.11.9")


def test_missing_environment(built):
    assert built(toolset=None) == ("no environment 'train'",)


def test_changed_definition(built, stages):
    changed = tuple(msgspec.structs.replace(stage, reads=("training",)) for stage in stages)
    assert built("dataset", stages=changed)[0] == "the stage's definition changed"


def test_changed_source_files(built, monkeypatch):
    monkeypatch.setattr(freshness_module, "source_digest", lambda module: "sha256:other")
    assert built() == ("its source files changed",)


def test_altered_output(built, layout):
    path = layout.stage("training") / "out.txt"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert built() == ("output out.txt was altered",)


def test_missing_output(built, layout):
    (layout.stage("training") / "out.txt").unlink()
    assert built() == ("output out.txt is missing",)


def test_changed_input(built, stages, config, layout, toolset):
    changed = msgspec.structs.replace(config, dataset=msgspec.structs.replace(config.dataset, seed=99))
    run_stage(stages[0], changed, layout, toolset, None, stages=stages)
    assert built() == ("input dataset/out.txt changed",)


def test_changed_record_makes_no_stage_stale(stages, config, layout, toolset):
    recording = (msgspec.structs.replace(stages[0], records=("out.txt",)), stages[1])
    for stage in recording:
        run_stage(stage, config, layout, toolset, None, stages=recording)
    changed = msgspec.structs.replace(config, dataset=msgspec.structs.replace(config.dataset, seed=99))
    run_stage(recording[0], changed, layout, toolset, None, stages=recording)
    assert freshness(recording[1], config, layout, toolset, None, recording).fresh


def test_unreadable_manifest(built, layout):
    (layout.stage("training") / "manifest.json").write_text("{")
    (reason,) = built()
    assert reason.startswith("unreadable manifest: ")


def test_missing_producer(built, layout):
    (layout.stage("dataset") / "manifest.json").unlink()
    (reason,) = built()
    assert reason.startswith("an input is missing: ")


def test_manifest_of_a_finished_stage(built, layout, toolset, config):
    manifest = read_manifest(layout.stage("training"))
    assert (layout.stage("training") / "out.txt").read_text() == f"{config.dataset.seed}{config.training.seed}"
    assert manifest.figures.keys() == {"characters", "peak_anonymous_bytes"}
    assert manifest.figures["characters"] == len(str(config.dataset.seed))
    assert list(manifest.outputs) == ["out.txt"]
    assert manifest.fingerprint.inputs.keys() == {"dataset/out.txt"}
    assert manifest.fingerprint.interpreter == toolset.interpreter
    assert manifest.config == {"training": msgspec.to_builtins(config.training)}


def test_status_shows_the_peak_memory(built, layout, stages, config, toolset):
    peak = read_manifest(layout.stage("training")).peak_anonymous_bytes
    assert peak is not None
    states = [freshness(stage, config, layout, toolset, None, stages) for stage in stages]
    assert states[1].peak_anonymous_bytes == peak
    console = Console(width=100, record=True, file=StringIO())
    console.print(status_table("magic-8-ball", states))
    assert re.search(rf"training +│ +│ fresh +│ {peak / 1e6:.0f} MB", console.export_text())
