"""Builds: stages side by side where memory allows, failures that stop only what needs them, and dry runs."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.pipeline.conftest import CONFIG

from coremill.core.errors import RunLockedError
from coremill.core.layout import checkpoint_file
from coremill.core.manifest import read_manifest
from coremill.pipeline import build as build_module
from coremill.pipeline import status
from coremill.pipeline.build import Build, Task, tasks_for
from coremill.pipeline.environments import LANES, Toolset
from coremill.pipeline.lock import RunLock
from coremill.pipeline.stages import DISTILLED, IMPORTED, Stage

# `left` and `right` need `first`, `last` needs `left`.
NEEDS = {"first": (), "left": ("first",), "right": ("first",), "last": ("left",)}
STAGES = tuple(
    Stage(name=name, module=f"tiny_{name}", reads=(), needs=needs, per_lane=False, purpose=name)
    for name, needs in NEEDS.items()
)
FIRST, LEFT, RIGHT, LAST = (Task(stage, None) for stage in STAGES)

# Stands for an environment's `python -m coremill stage NAME --config CONFIG --build-dir BUILD …`.
PYTHON = """\
#!{python}
import sys

def main():
    from pathlib import Path
    from coremill.core.config import read_config
    from coremill.core.layout import RunLayout
    from coremill.pipeline.environments import Toolset
    from coremill.pipeline.runner import run_stage
    from coremill.pipeline.stages import Stage

    name, build = sys.argv[4], Path(sys.argv[8])
    assert sys.argv[1:4] + sys.argv[5:8:2] == ["-m", "coremill", "stage", "--config", "--build-dir"]
    stages = tuple(
        Stage(name=name, module="tiny_" + name, reads=(), needs=needs, per_lane=False, purpose=name)
        for name, needs in {needs!r}.items()
    )
    stage = next(stage for stage in stages if stage.name == name)
    config = read_config(Path(sys.argv[6]))
    toolset = Toolset(Path({tmp!r}) / "env", "3.11.7", "sha256:lock")
    run_stage(
        stage, config, RunLayout(build, config.name), toolset, None, stages=stages, force="--force" in sys.argv
    )
    return 0

if __name__ == "__main__":
    from coremill.core.command import exit_on_error
    sys.path.insert(0, {modules!r})
    sys.exit(exit_on_error(main))
"""
MEET = """
    import time
    from pathlib import Path
    (Path({tmp!r}) / {own!r}).touch()
    deadline = time.monotonic() + 30
    while not (Path({tmp!r}) / {other!r}).exists():
        assert time.monotonic() < deadline, "the other stage did not start"
        time.sleep(0.01)
"""


class Run:
    """A build of STAGES, whose output is in `lines`."""

    def __init__(self, tmp: Path, config, layout) -> None:
        self.tmp, self.config, self.layout = tmp, config, layout
        self.lines: list[str] = []
        self.failed: list[Task] = []
        self.unrecorded: list[Task] = []
        (tmp / "modules").mkdir()
        for name in NEEDS:
            self.write(name, "return {}")
        python = tmp / "env" / "bin" / "python"
        python.parent.mkdir(parents=True)
        modules = str(tmp / "modules")
        python.write_text(PYTHON.format(python=sys.executable, modules=modules, tmp=str(tmp), needs=NEEDS))
        python.chmod(0o755)

    def write(self, name: str, body: str) -> None:
        text = f"def run_stage(context):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n    return {{}}\n"
        (self.tmp / "modules" / f"tiny_{name}.py").write_text(text)

    def meet(self, name: str, other: str) -> None:
        """Let the stage end only when the other one has started."""
        self.write(name, MEET.format(tmp=str(self.tmp), own=name, other=other))

    def show(self, task: Task, line: str) -> None:
        self.lines.append(f"{task} | {line}")

    def build(self, names=None, *, force=None, dry_run=False) -> None:
        root = Path(__file__).parents[2]
        with Build(
            root, CONFIG, self.config, self.layout, env={}, force=force, dry_run=dry_run, show=self.show
        ) as build:
            build.run(tasks_for(names, STAGES, LANES[:1]))
            self.failed, self.unrecorded = build.failed, build.unrecorded_failures

    def published(self) -> list[str]:
        return [name for name in NEEDS if (self.layout.stage(name) / "manifest.json").exists()]


@pytest.fixture
def run(tmp_path, config, layout, monkeypatch) -> Run:
    toolset = Toolset(folder=tmp_path / "env", interpreter="3.11.7", lock_digest="sha256:lock")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.syspath_prepend(tmp_path / "modules")  # for the digest of their sources
    monkeypatch.setattr(build_module, "stages_of", lambda config: STAGES)
    monkeypatch.setattr(status, "stages_of", lambda config: STAGES)
    for module in (build_module, status):
        monkeypatch.setattr(module, "installed", lambda root: {"train": toolset})
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return Run(tmp_path, config, layout)


def test_independent_stages_run_side_by_side(run):
    run.meet("left", "right")
    run.meet("right", "left")
    run.build()
    assert (run.failed, run.published()) == ([], list(NEEDS))
    done = [line.split(" in ")[0] for line in run.lines if "| done in" in line]
    assert (done[0], done[-1], sorted(done)) == (
        "first | done", "last | done", ["first | done", "last | done", "left | done", "right | done"],
    )  # fmt: skip
    assert "first | runs: never ran" in run.lines
    run.lines.clear()
    run.build()
    assert sorted(run.lines) == ["first | fresh", "last | fresh", "left | fresh", "right | fresh"]


@pytest.mark.parametrize("reason", ["memory", "cores"])
def test_stages_wait_for_one_another(run, monkeypatch, reason):
    if reason == "memory":
        monkeypatch.setattr(build_module, "available_memory_bytes", lambda: 0)
        monkeypatch.setattr(build_module, "held_bytes", lambda pid: 900_000_000)
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for name in NEEDS:
        run.write(name, "import time; time.sleep(0.2)")
    run.build()
    assert run.failed == []
    events = [line.split(" ")[0] for line in run.lines if "| runs: " in line or "| done in" in line]
    assert events[0::2] == events[1::2]
    assert sorted(events[0::2]) == sorted(NEEDS)


def test_estimate_grows_with_the_checkpoint(run, layout, monkeypatch):
    """A stage of 1.5 GB and three times the checkpoint's 10 MB: two need 3,060 MB."""
    layout.stage("training").mkdir(parents=True)
    checkpoint_file(layout.stage("training"), run.config.name).write_bytes(b"x" * 10_000_000)
    with Build(Path(), CONFIG, run.config, layout, env={}, force=None, dry_run=True, show=run.show) as build:
        for available, fits in ((3_059_999_999, False), (3_060_000_000, True)):
            monkeypatch.setattr(build_module, "available_memory_bytes", lambda available=available: available)
            assert build._fits(1) is fits
        assert build._fits(0)


def test_failure_stops_only_what_needs_it(run, layout):
    run.write("left", "from coremill.core.errors import GgufError; raise GgufError('no such type')")
    run.build()
    assert (run.failed, run.unrecorded, run.published()) == ([LEFT], [], ["first", "right"])
    assert "left | GGUF error: no such type" in run.lines
    assert "left | failed with exit code 49" in run.lines
    assert run.lines.count("last | not run: it needs left") == 1
    assert read_manifest(layout.failed_stage("left")).error == "no such type"


def test_failed_first_stage_stops_all(run):
    run.write("first", "import os; os.kill(os.getpid(), 9)")
    run.build()
    assert (run.failed, run.published()) == ([FIRST], [])
    assert "first | failed with exit code 33" in run.lines
    assert run.lines[-3:] == [
        "left | not run: it needs first", "right | not run: it needs first", "last | not run: it needs left",
    ]  # fmt: skip


def test_failure_before_the_work_is_not_recorded(run, monkeypatch):
    monkeypatch.setattr(build_module, "installed", lambda root: {})
    run.build()
    assert (run.failed, run.unrecorded) == ([FIRST], [FIRST])
    assert run.lines[:2] == [
        "first | machine error: the environment 'train' is not installed", "first |   run: nox -s env-train",
    ]  # fmt: skip


def test_named_stage_runs_with_those_that_it_needs(run):
    run.build(["left"])
    assert run.published() == ["first", "left"]
    run.lines.clear()
    run.build(["left"], force="left")
    assert run.lines[:2] == ["first | fresh", "left | runs: forced"]


def test_dry_run_shows_reasons_and_runs_nothing(run, layout):
    run.build(["left"])
    run.lines.clear()
    with RunLock(layout):  # needs no lock
        run.build(force="first", dry_run=True)
    assert run.lines == [
        "first | would run: forced",
        "left | fresh",
        "right | would run: never ran",
        "last | would run: never ran",
    ]
    assert run.published() == ["first", "left"]


def test_second_build_is_rejected(run, layout):
    with RunLock(layout), pytest.raises(RunLockedError):
        run.build()


def test_error_of_the_build_ends_its_stages(run, tmp_path):
    body = "import os, time\n(context.out / '../../../pid').write_text(str(os.getpid()))\ntime.sleep(100)"
    run.write("right", body)

    def show(task: Task, line: str) -> None:
        if (tmp_path / "pid").exists():
            raise BrokenPipeError

    run.show = show
    run.write("left", "import time; time.sleep(2); print('line')")
    with pytest.raises(BrokenPipeError):
        run.build()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_progress_bar_is_one_line(run):
    run.write("first", r"import sys; sys.stderr.write('1 %\r2 %\r100 %\n')")
    run.build(["first"])
    assert "first | 100 %" in run.lines
    assert not any("1 %" in line for line in run.lines if "100" not in line)


def test_tasks_of_lanes_share_stages():
    names = [str(task) for task in tasks_for(None, IMPORTED, LANES)]
    assert names == [
        "texts", "import", "export-2.9.1", "convert-2.9.1", "verify-2.9.1", "hf", "gguf",
        "export-2.8.0", "convert-2.8.0", "verify-2.8.0",
    ]  # fmt: skip
    assert [str(task) for task in tasks_for(["gguf"], DISTILLED, LANES)] == ["dataset", "training", "gguf"]
    assert [task.stage.name for task in tasks_for(["convert"], IMPORTED, ["2.8.0"])] == [
        "texts", "import", "export", "convert",
    ]  # fmt: skip
