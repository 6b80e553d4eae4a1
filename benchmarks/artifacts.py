"""The artifacts of a finished build that benchmarks read."""

from __future__ import annotations

from pathlib import Path

import msgspec

from coremill.core import layout
from coremill.data.prompts import Prompts, load_prompts


class Artifacts(msgspec.Struct, frozen=True):
    """The artifacts of a run, which trained or imported its model."""

    run: layout.RunLayout

    @property
    def imported(self) -> bool:
        return self.run.stage("import").is_dir()

    @property
    def checkpoint(self) -> Path:
        return layout.checkpoint_file(self.run.stage("import" if self.imported else "training"), self.run.run)

    def prompts(self, *, rows: int) -> Prompts:
        tokenizer = layout.tokenizer_file(self.run.stage("import" if self.imported else "dataset"))
        return load_prompts(tokenizer, self.run.stage("texts" if self.imported else "dataset"), rows=rows)
