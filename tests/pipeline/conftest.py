"""A build of two small stages that really run and publish files."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from coremill.core.config import DistilledRun, read_distilled_config
from coremill.core.layout import RunLayout
from coremill.pipeline.environments import Toolset
from coremill.pipeline.stages import Stage

CONFIG = Path(__file__).parents[2] / "configs" / "magic-8-ball.toml"

SCRIPT = """
    def run_stage(context):
        text = "".join((context.inputs[name] / "out.txt").read_text() for name in context.inputs)
        (context.out / "out.txt").write_text(text + str(context.config.{section}.seed))
        return {{"characters": len(text)}}
"""


@pytest.fixture
def config() -> DistilledRun:
    return read_distilled_config(CONFIG)


@pytest.fixture
def layout(tmp_path) -> RunLayout:
    return RunLayout(build=tmp_path / "build", run="magic-8-ball")


@pytest.fixture
def toolset() -> Toolset:
    return Toolset(folder=Path(sys.prefix), interpreter="3.11.7", lock_digest="sha256:lock")


@pytest.fixture
def stages(tmp_path, monkeypatch) -> tuple[Stage, ...]:
    """`dataset` writes its seed; `training` appends its own seed to its input."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("dataset", "training"):
        (folder / f"tiny_{name}.py").write_text(textwrap.dedent(SCRIPT.format(section=name)))
        monkeypatch.delitem(sys.modules, f"tiny_{name}", raising=False)
    monkeypatch.syspath_prepend(folder)
    return tuple(
        Stage(name=name, module=f"tiny_{name}", reads=(name,), needs=needs, per_lane=False, purpose=name)
        for name, needs in (("dataset", ()), ("training", ("dataset",)))
    )
