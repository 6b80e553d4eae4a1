"""The stage table: what runs where, what it reads, and what it needs first."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

import msgspec

from coremill.core.config import RunConfig
from coremill.core.errors import StageError
from coremill.core.layout import RunLayout
from coremill.core.stage import StageFunction
from coremill.pipeline.environments import CONVERT, TRAIN, Environment


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of the build."""

    name: str
    module: str
    """Its `run_stage` does the work; its imports decide which source files count."""
    reads: tuple[str, ...]
    """The parts of the configuration that it reads; a change elsewhere leaves it fresh."""
    needs: tuple[str, ...]
    """The stages whose folders it reads."""
    per_lane: bool
    purpose: str
    records: tuple[str, ...] = ()
    """Outputs for people, with times in them; no stage reads them, so that a difference makes nothing stale."""

    def environment(self, lane: str | None) -> Environment:
        return TRAIN if lane is None else CONVERT[lane]

    def function(self) -> StageFunction:
        """Import the stage's code; only where it is to run."""
        return cast(StageFunction, importlib.import_module(self.module).run_stage)

    def config_slice(self, config: RunConfig) -> dict[str, Any]:
        return {part: msgspec.to_builtins(getattr(config, part)) for part in self.reads}


# In the order in which they run. The name and the model type shape file names and the checkpoint.
STAGES = (
    Stage(
        name="dataset",
        module="coremill.data.make_toy_kd",
        reads=("dataset",),
        needs=(),
        per_lane=False,
        purpose="questions, the teacher's answers, the tokenizer",
    ),
    Stage(
        name="training",
        module="coremill.training.run_toy_distill",
        reads=("name", "model_type", "model", "training"),
        needs=("dataset",),
        per_lane=False,
        purpose="distil the student",
        records=("metrics.jsonl",),
    ),
    Stage(
        name="export",
        module="coremill.conversion.export_pytorch",
        reads=("name", "model_type", "shapes"),
        needs=("dataset", "training"),
        per_lane=True,
        purpose="TorchScript and its contract",
    ),
    Stage(
        name="convert",
        module="coremill.conversion.convert_coreml",
        reads=("name", "model_type", "convert"),
        needs=("export",),
        per_lane=True,
        purpose="the Core ML package",
        records=("conversion.log",),
    ),
    Stage(
        name="verify",
        module="coremill.conversion.verify_contract",
        reads=("name", "model_type", "verify"),
        needs=("dataset", "training", "export", "convert"),
        per_lane=True,
        purpose="run the package and check it",
    ),
)


def find_stage(name: str, stages: tuple[Stage, ...] = STAGES) -> Stage:
    for stage in stages:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in stages)
    raise StageError(f"there is no stage {name!r}", expected=f"one of {names}", run="coremill status")


def stage_folder(layout: RunLayout, stage: Stage, lane: str | None) -> Path:
    """Where the stage publishes, given the lane that is being built."""
    return layout.stage(stage.name, lane if stage.per_lane else None)
