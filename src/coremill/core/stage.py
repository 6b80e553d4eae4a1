"""The interface between the pipeline and a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from coremill.core.config import BaseRun, RunConfig

Figures = dict[str, float | int | str]
"""What a stage measured of its own work, for the manifest and the report."""

AnyRun = TypeVar("AnyRun", bound=BaseRun, covariant=True)


class StageContext(msgspec.Struct, Generic[AnyRun], frozen=True, kw_only=True):
    """One run of one stage.

    The pipeline publishes the files in `out` when the stage returns, and none of them if it raises.
    """

    config: AnyRun
    lane: str | None
    inputs: Mapping[str, Path]
    """The directories of the stages that this one reads, by stage name; the pipeline has checked their digests."""
    out: Path

    @property
    def model_dir(self) -> Path:
        """The directory of the run's checkpoint, which was trained or imported."""
        return self.inputs[self.config.model_stage]

    @property
    def tokenizer_dir(self) -> Path:
        """The directory of `tokenizer.json`, which was trained on the dataset or imported."""
        return self.inputs[self.config.tokenizer_stage]

    @property
    def prompts_dir(self) -> Path:
        """The directory of what the model is run on: the dataset's held-out rows, or texts and chat prompts."""
        return self.inputs[self.config.prompts_stage]


StageFunction = Callable[[StageContext[RunConfig]], Figures]
