"""The stage tables, one a kind of run: what runs where, what it reads, and what it needs first."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from coremill.core.config import BaseRun, DistilledRun, ImportedRun, NamesFiles, RunConfig
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

    def files(self, config: RunConfig) -> tuple[Path, ...]:
        """The files and folders outside the build that the parts of the configuration it reads name."""
        parts = [getattr(config, part) for part in self.reads]
        return tuple(path for part in parts if isinstance(part, NamesFiles) for path in part.paths)


def _shared_stages(kind: type[BaseRun]) -> tuple[Stage, ...]:
    """The stages that every kind of run has: those of a lane, then the formats other than Core ML."""
    model = tuple(dict.fromkeys((kind.prompts_stage, kind.tokenizer_stage, kind.model_stage)))
    return (
        Stage(
            name="export",
            module="coremill.conversion.export_pytorch",
            reads=("name", "model_type", "shapes", "export"),
            needs=model,
            per_lane=True,
            purpose="the graph and its contract",
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
            reads=("name", "model_type", "export", "verify"),
            needs=(*model, "export", "convert"),
            per_lane=True,
            purpose="run the package and check it",
        ),
        Stage(
            name="hf",
            module="coremill.conversion.export_hf",
            reads=("name", "model_type", "hf"),
            needs=model,
            per_lane=False,
            purpose="the Hugging Face directory, run with transformers",
        ),
        Stage(
            name="gguf",
            module="coremill.conversion.export_gguf",
            reads=("name", "model_type", "gguf"),
            needs=model,
            per_lane=False,
            purpose="GGUF files and the Modelfile, run with llama.cpp",
        ),
    )


# Each table is in the order in which its stages run. The name and the model type are read where they shape names of
# files, and the checkpoint.
DISTILLED = (
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
    *_shared_stages(DistilledRun),
)
IMPORTED = (
    Stage(
        name="texts",
        module="coremill.data.corpora",
        reads=("texts",),
        needs=(),
        per_lane=False,
        purpose="real texts and chat prompts to run the model on",
    ),
    Stage(
        name="import",
        module="coremill.training.import_model",
        reads=("name", "model_type", "weights"),
        needs=(),
        per_lane=False,
        purpose="bring the model's weights and its tokenizer in",
    ),
    *_shared_stages(ImportedRun),
)
_TABLES: dict[type[BaseRun], tuple[Stage, ...]] = {DistilledRun: DISTILLED, ImportedRun: IMPORTED}
EVERY_STAGE = (*DISTILLED, *(stage for stage in IMPORTED if stage.name not in {each.name for each in DISTILLED}))
"""Each name once, for those that ask by name and know of no run."""


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in the order in which they run."""
    return _TABLES[type(config)]


def find_stage(name: str, stages: Sequence[Stage]) -> Stage:
    for stage in stages:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in stages)
    raise StageError(f"there is no stage {name!r}", expected=f"one of {names}", run="coremill status")


def stage_folder(layout: RunLayout, stage: Stage, lane: str | None) -> Path:
    """Where the stage publishes, given the lane that is being built."""
    return layout.stage(stage.name, lane if stage.per_lane else None)
