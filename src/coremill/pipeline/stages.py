"""The stage tables, one for each kind of run: each stage's module, environment, configuration and inputs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec

from coremill.core.config import BaseRun, DistilledRun, FormatName, ImportedRun, NamesFiles, RunConfig
from coremill.core.errors import StageError
from coremill.core.layout import RunLayout
from coremill.core.plain import Plain
from coremill.core.stage import StageFunction
from coremill.pipeline.environments import CONVERT, TRAIN, Environment


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A stage of the build."""

    name: str
    module: str
    """The module of `run_stage`; the source files of the stage are those that it uses."""
    reads: tuple[str, ...]
    """The parts of the configuration that it reads; changes to others leave it fresh."""
    needs: tuple[str, ...]
    """The stages whose directories it reads."""
    per_lane: bool
    purpose: str
    records: tuple[str, ...] = ()
    """Outputs that no stage reads, such as logs with times; a change of them makes no stage stale."""

    def environment(self, lane: str | None) -> Environment:
        return TRAIN if lane is None else CONVERT[lane]

    def function(self) -> StageFunction:
        """Import the stage's module, which needs the packages of its environment."""
        function: StageFunction = importlib.import_module(self.module).run_stage
        return function

    def config_slice(self, config: RunConfig) -> dict[str, Plain]:
        return {part: msgspec.to_builtins(getattr(config, part)) for part in self.reads}

    def files(self, config: RunConfig) -> tuple[Path, ...]:
        """Return the files and directories outside the build that its part of the configuration names."""
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
            purpose="export the graph and its contract",
        ),
        Stage(
            name="convert",
            module="coremill.conversion.convert_coreml",
            reads=("name", "model_type", "convert"),
            needs=("export",),
            per_lane=True,
            purpose="convert the graph to a Core ML package",
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
            purpose="write the Hugging Face directory and run it with transformers",
        ),
        Stage(
            name="gguf",
            module="coremill.conversion.export_gguf",
            reads=("name", "model_type", "gguf"),
            needs=model,
            per_lane=False,
            purpose="write GGUF files and the Modelfile, and run them with llama.cpp",
        ),
    )


# Each table is in the order in which its stages run. A stage reads `name` for file names, and `model_type` for the
# checkpoint or the contract.
DISTILLED = (
    Stage(
        name="dataset",
        module="coremill.data.make_toy_kd",
        reads=("dataset",),
        needs=(),
        per_lane=False,
        purpose="generate questions, the teacher's answers and the tokenizer",
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
        module="coremill.data.write_texts",
        reads=("texts",),
        needs=(),
        per_lane=False,
        purpose="write the texts and chat prompts that the model is run on",
    ),
    Stage(
        name="import",
        module="coremill.training.import_model",
        reads=("name", "model_type", "weights"),
        needs=(),
        per_lane=False,
        purpose="import the model's weights and its tokenizer",
    ),
    *_shared_stages(ImportedRun),
)
_TABLES: dict[type[BaseRun], tuple[Stage, ...]] = {DistilledRun: DISTILLED, ImportedRun: IMPORTED}
EVERY_STAGE = (*DISTILLED, *(stage for stage in IMPORTED if stage.name not in {each.name for each in DISTILLED}))
"""All stages, each once, for commands without a run."""


FORMATS = get_args(FormatName)
"""The stages that a configuration can switch off, each named after its format."""


def table_of(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages of a run's kind, including those that its configuration switches off."""
    return _TABLES[type(config)]


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages of a run, in the order in which they run."""
    off = switched_off(config)
    return tuple(stage for stage in table_of(config) if stage.name not in off)


def switched_off(config: RunConfig) -> tuple[str, ...]:
    """Return the stages that the configuration switches off."""
    return tuple(name for name in FORMATS if name not in config.formats)


def find_stage(name: str, stages: Sequence[Stage]) -> Stage:
    """Return the stage of that name.

    Raises:
        StageError: there is none.
    """
    for stage in stages:
        if stage.name == name:
            return stage
    if name in FORMATS:
        raise StageError(
            f"the configuration switches stage {name!r} off",
            expected=f"`formats` with {name!r}",
            run="coremill status",
        )
    names = ", ".join(stage.name for stage in stages)
    raise StageError(f"there is no stage {name!r}", expected=f"one of {names}", run="coremill status")


def stage_folder(layout: RunLayout, stage: Stage, lane: str | None) -> Path:
    """Return the directory that the stage publishes when `lane` is built."""
    return layout.stage(stage.name, lane if stage.per_lane else None)
