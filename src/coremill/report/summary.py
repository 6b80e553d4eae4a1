"""One summary of a run, from the manifests and reports that its stages left: `summary.json` and `STATUS.md`.

`coremill report` prints it as well. Nothing is measured here, and no stage is imported.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from coremill.core.command import exit_on_error
from coremill.core.config import RunConfig
from coremill.core.diagnostics import ConversionDiagnostics, ConversionFailure, count_notices
from coremill.core.documents import read_json, write_atomic, write_json
from coremill.core.errors import GATES_FAILED, OK, StageError
from coremill.core.gates import Outcome, Severity, must_gates_ok
from coremill.core.layout import (
    RunLayout,
    diagnostics_file,
    package_dir,
    placeholder_file,
    status_file,
    summary_file,
    verification_report,
)
from coremill.core.manifest import Output, StageManifest, check_outputs, read_manifest
from coremill.core.reports import LaneSummary, RunSummary, StageSummary, VerificationReport
from coremill.core.stage import Figures
from coremill.pipeline.environments import LANES, PRIMARY_LANE
from coremill.pipeline.project import add_run_options, chosen_run
from coremill.report.status import status_markdown
from coremill.report.tables import render

SHARED_STAGES = ("dataset", "training")
"""Run once; the others run once a lane."""
LANE_STAGES = ("export", "convert", "verify")
REPORT = "report"
"""The folder of the run that the summary is written into."""

_BUILD = "nox -s pipeline"


def summarise(
    layout: RunLayout, config: RunConfig, lanes: Sequence[str], fell_back_from: str | None = None
) -> RunSummary:
    """The summary of the run in `layout`.

    Args:
        lanes: torch versions whose verification is reported; the primary one first.
        fell_back_from: the lane that was asked for, where another one was built instead.

    Raises:
        StageError: a stage has not finished, or belongs to another run.
        DigestError: a report is not the one that its stage wrote.
    """
    stages: list[StageSummary] = []
    figures: Figures = {}
    for stage in SHARED_STAGES:
        manifest = _manifest(layout.stage(stage), config, lane=None)
        stages.append(_stage_summary(manifest))
        figures.update({f"{stage}.{name}": value for name, value in manifest.figures.items()})
    summaries: list[LaneSummary] = []
    reports = [_verification(layout, config, lane) for lane in lanes]
    for lane, report in zip(lanes, reports, strict=True):
        manifests = [_manifest(layout.stage(stage, lane), config, lane) for stage in LANE_STAGES]
        stages += [_stage_summary(manifest, report) for manifest in manifests]
        summaries.append(_lane_summary(layout, config, lane, report))
    return RunSummary(
        run=config.name,
        model_type=config.model_type,
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        stages=tuple(stages),
        lanes=tuple(summaries),
        figures=figures,
        sampled_seed=reports[0].sampled_seed,
        sampled=reports[0].sampled,
        fell_back_from=fell_back_from,
        gates_ok=all(lane.gates_ok for lane in summaries),
    )


def _manifest(folder: Path, config: RunConfig, lane: str | None) -> StageManifest:
    manifest = read_manifest(folder)
    if (manifest.run, manifest.lane) != (config.name, lane):
        raise StageError(
            f"{folder} is of run {manifest.run!r}, lane {manifest.lane}",
            expected=f"run {config.name!r}, lane {lane}",
            run=_BUILD,
        )
    return manifest


def _output(folder: Path, manifest: StageManifest, name: str) -> Output:
    recorded = manifest.outputs.get(name)
    if recorded is None:
        raise StageError(f"{folder} has no {name}", expected=f"what stage {manifest.stage} writes", run=_BUILD)
    return recorded


def _checked(folder: Path, manifest: StageManifest, path: Path) -> Path:
    """`path`, an output of the stage in `folder`, hashed again before it is read."""
    recorded = _output(folder, manifest, path.name)
    check_outputs(folder, msgspec.structs.replace(manifest, outputs={path.name: recorded}))
    return path


def _verification(layout: RunLayout, config: RunConfig, lane: str) -> VerificationReport:
    folder = layout.stage("verify", lane)
    path = _checked(folder, _manifest(folder, config, lane), verification_report(folder))
    return read_json(path, VerificationReport, error=StageError, run=_BUILD)


def _stage_summary(manifest: StageManifest, report: VerificationReport | None = None) -> StageSummary:
    """Args: report: of the lane's verification."""
    reason = None
    if manifest.stage == "convert" and placeholder_file(Path()).name in manifest.outputs:
        reason = f"the conversion failed; {placeholder_file(Path()).name} says how"
    elif manifest.stage == "verify" and report is not None and not must_gates_ok(report.gates):
        blocking = [g.name for g in report.gates if g.severity is Severity.MUST and g.outcome is not Outcome.PASSED]
        reason = f"must-gates: {'; '.join(blocking) or 'none was checked'}"
    return StageSummary(
        stage=manifest.stage,
        lane=manifest.lane,
        python=manifest.toolchain.python,
        torch=manifest.toolchain.packages.get("torch"),
        duration_s=manifest.duration_s,
        started_at=manifest.started_at,
        outcome=Outcome.PASSED if reason is None else Outcome.FAILED,
        reason=reason,
    )


def _lane_summary(layout: RunLayout, config: RunConfig, lane: str, report: VerificationReport) -> LaneSummary:
    folder = layout.stage("convert", lane)
    manifest = _manifest(folder, config, lane)
    record: ConversionDiagnostics | ConversionFailure
    if placeholder_file(folder).name in manifest.outputs:
        path = _checked(folder, manifest, placeholder_file(folder))
        record = read_json(path, ConversionFailure, error=StageError, run=_BUILD)
        package_size_bytes = None
    else:
        path = _checked(folder, manifest, diagnostics_file(folder))
        record = read_json(path, ConversionDiagnostics, error=StageError, run=_BUILD)
        package_size_bytes = _output(folder, manifest, package_dir(folder, config.name).name).size_bytes
    return LaneSummary(
        lane=lane,
        toolchain=record.toolchain,
        primary=report.primary,
        gates_ok=report.gates_ok,
        gates=report.gates,
        shapes=report.shapes,
        heldout=report.heldout,
        package_size_bytes=package_size_bytes,
        convert_duration_s=manifest.duration_s,
        converter_notices=count_notices(record.notices),
    )


def write_report(summary: RunSummary, folder: Path) -> None:
    """Write `summary.json` and `STATUS.md` into `folder`, each whole or not at all."""
    write_json(summary_file(folder), summary)
    write_atomic(status_file(folder), status_markdown(summary).encode())


def exit_code(summary: RunSummary) -> int:
    """0 if every lane's must-gates passed: only they block."""
    return OK if all(must_gates_ok(lane.gates) for lane in summary.lanes) else GATES_FAILED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="coremill report",
        description="Print what a finished run did, and write it to its report/ as summary.json and STATUS.md.",
    )
    parser.add_argument(
        "--torch",
        action="append",
        choices=LANES,
        help=f"a lane, once or more often: several are compared (default: {PRIMARY_LANE})",
    )
    parser.add_argument(
        "--fell-back-from", choices=LANES, help="the lane asked for, whose conversion failed; the report says so"
    )
    add_run_options(parser)
    options = parser.parse_args(argv)
    config, layout = chosen_run(options)
    lanes = list(dict.fromkeys(options.torch or [PRIMARY_LANE]))
    summary = summarise(layout, config, lanes, options.fell_back_from)
    write_report(summary, layout.stage(REPORT))
    render(summary, Console(highlight=False))
    return exit_code(summary)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
