"""What the pipeline gives a stage, and what a stage gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from coremill.core.config import ImportedRun, RunConfig

Figures = dict[str, float | int | str]
"""What a stage measured of its own work, for the manifest and the report."""


class StageContext(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one stage.

    `inputs` are the folders of the stages that this one reads, by stage name; the pipeline has checked
    their digests. Whatever the stage leaves in `out` is published when it returns, and nothing if it raises.
    """

    config: RunConfig
    lane: str | None
    inputs: Mapping[str, Path]
    out: Path

    @property
    def model_dir(self) -> Path:
        """The folder of the run's checkpoint: it was trained, or imported."""
        return self.inputs["import" if isinstance(self.config, ImportedRun) else "training"]

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of `tokenizer.json`: it was trained on the dataset, or imported."""
        return self.inputs["import" if isinstance(self.config, ImportedRun) else "dataset"]

    @property
    def prompts_dir(self) -> Path:
        """The folder of what the model is run on: the dataset's held-out rows, or real texts and chat prompts."""
        return self.inputs["texts" if isinstance(self.config, ImportedRun) else "dataset"]


StageFunction = Callable[[StageContext], Figures]
