"""Run one stage in this interpreter: check its inputs, run it, publish its outputs with a manifest."""

from __future__ import annotations

import datetime
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import RunConfig
from coremill.core.documents import write_json
from coremill.core.layout import MANIFEST, REPORT, RunLayout
from coremill.core.manifest import Fingerprint, StageManifest, check_outputs, measure_outputs, read_manifest
from coremill.core.publish import publishing, recover
from coremill.core.stage import StageContext
from coremill.core.toolchain import current_toolchain
from coremill.pipeline.environments import LANES, Toolset, running
from coremill.pipeline.freshness import fingerprint, freshness, input_digests
from coremill.pipeline.lock import RunLock, WriterLock
from coremill.pipeline.project import add_run_options, chosen_run, project_root
from coremill.pipeline.stages import EVERY_STAGE, Stage, find_stage, stage_folder, stages_of
from coremill.pipeline.worker import work

log = logging.getLogger(__name__)


def run_stage(
    stage: Stage,
    config: RunConfig,
    layout: RunLayout,
    toolset: Toolset,
    lane: str | None,
    *,
    stages: Sequence[Stage],
    force: bool = False,
) -> StageManifest:
    """Run `stage`, one of the run's `stages`, unless it is fresh, and publish its directory with a manifest.

    Raises:
        RunLockedError: another process is building this run.
        StageError: a stage that this one needs has not run.
        DigestError: an input differs from what its producer recorded.
        CoremillError: the stage failed.
    """
    lane = lane if stage.per_lane else None
    folder = stage_folder(layout, stage, lane)
    with RunLock(layout), WriterLock(layout, stage.name, lane):
        recover(folder)
        if not force and freshness(stage, config, layout, toolset, lane, stages).fresh:
            return read_manifest(folder)
        producers = {need: stage_folder(layout, find_stage(need, stages), lane) for need in stage.needs}
        for producer in producers.values():
            check_outputs(producer, read_manifest(producer))
        # Before the work, so that a change while the stage runs leaves it stale.
        before = fingerprint(stage, config, toolset, input_digests(layout, stage, lane, stages))
        with publishing(folder) as fresh:
            context = StageContext(config=config, lane=lane, inputs=producers, out=fresh)
            manifest = _work(stage, context, before, layout)
        # The report of the previous state is no longer valid.
        shutil.rmtree(layout.stage(REPORT), ignore_errors=True)
    log.info("%s: published %s", stage.name, _relative(folder))
    return manifest


def _work(stage: Stage, context: StageContext[RunConfig], before: Fingerprint, layout: RunLayout) -> StageManifest:
    """Run the stage in `context.out`; if it fails, move its files to `<stage>.failed/`."""
    failed = layout.failed_stage(stage.name, context.lane)
    started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    start = time.perf_counter()

    figures, error = work(stage, context)
    manifest = StageManifest(
        outcome="succeeded" if error is None else "failed",
        error=None if error is None else str(error),
        error_kind=None if error is None else error.kind,
        stage=stage.name,
        run=context.config.name,
        lane=context.lane,
        fingerprint=before,
        config=stage.config_slice(context.config),
        toolchain=current_toolchain(),
        outputs=measure_outputs(context.out),
        figures=figures,
        started_at=started_at,
        duration_s=round(time.perf_counter() - start, 3),
    )
    write_json(context.out / MANIFEST, manifest)
    shutil.rmtree(failed, ignore_errors=True)
    if error is not None:
        context.out.rename(failed)
        shutil.rmtree(layout.stage(REPORT), ignore_errors=True)
        log.error("%s: failed; its files are in %s", stage.name, _relative(failed))
        raise error
    return manifest


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("stage", __doc__, example="export --torch 2.9.1")
    parser.add_argument("name", choices=[stage.name for stage in EVERY_STAGE], help="the stage")
    parser.add_argument("--torch", choices=LANES, help="the lane, for a stage that runs once per lane")
    parser.add_argument("--force", action="store_true", help="run it even if it is fresh")
    add_run_options(parser)
    options = parser.parse_args(argv)
    config, layout = chosen_run(options)
    stages = stages_of(config)
    stage = find_stage(options.name, stages)
    if stage.per_lane != (options.torch is not None):
        parser.error(
            f"stage {stage.name} runs "
            + ("once per lane: add --torch" if stage.per_lane else "without a lane: remove --torch")
        )
    toolset = running(project_root(), stage.environment(options.torch))
    run_stage(stage, config, layout, toolset, options.torch, stages=stages, force=options.force)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
