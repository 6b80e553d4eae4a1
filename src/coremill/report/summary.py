"""Summarises a run from the manifests and reports of its stages: `summary.json`, `STATUS.md` and the terminal.

Nothing is measured here, and no stage is imported.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import RunConfig
from coremill.core.diagnostics import ConversionDiagnostics, count_notices
from coremill.core.documents import read_json, write_json
from coremill.core.errors import GATES_FAILED, OK, StageError
from coremill.core.gates import Outcome, Severity, must_gates_ok
from coremill.core.layout import (
    REPORT,
    RunLayout,
    contract_file,
    diagnostics_file,
    package_dir,
    status_file,
    summary_file,
    verification_report,
)
from coremill.core.manifest import PEAK
from coremill.core.publish import write_atomic
from coremill.core.reports import (
    LaneSummary,
    LaneVerified,
    RunSummary,
    StageSummary,
    VerificationReport,
    lane_failed,
    shared_stages_ok,
)
from coremill.core.stage import Figures
from coremill.pipeline.environments import LANES, PRIMARY_LANE
from coremill.pipeline.project import add_run_options, chosen_run
from coremill.pipeline.stages import stages_of, switched_off
from coremill.report.attempts import Attempt, Completed, build_command, completed, first_failed, read_attempts
from coremill.report.status import status_markdown
from coremill.report.tables import render


def summarise(
    layout: RunLayout, config: RunConfig, lanes: Sequence[str], fell_back_from: str | None = None
) -> RunSummary:
    """Return the summary of the run in `layout`; a lane with a stage that failed or was never run is a failed lane.

    Args:
        lanes: the torch versions to report, the primary one first; at least one.
        fell_back_from: the requested lane, if another one was built instead.

    Raises:
        StageError: nothing was built; a stage belongs to another run, or was run with another configuration or with
            other inputs; a verification is of another package or contract.
        DigestError: an output differs from its manifest.
    """
    shared = [stage.name for stage in stages_of(config) if not stage.per_lane]
    per_lane = [stage.name for stage in stages_of(config) if stage.per_lane]
    attempts = {lane: read_attempts(layout, config, lane) for lane in lanes}
    reports = {
        lane: _verification(completed(ran), config, lane)
        for lane, ran in attempts.items()
        if "verify" in completed(ran)
    }
    stages = _stage_rows(shared, attempts[lanes[0]], None, None)
    figures: Figures = {}
    for stage, done in completed(attempts[lanes[0]]).items():
        if stage in shared:
            measured = {name: value for name, value in done.manifest.figures.items() if name != PEAK}
            figures.update({f"{stage}.{name}": value for name, value in measured.items()})
    summaries: list[LaneSummary] = []
    for lane, ran in attempts.items():
        report = reports.get(lane)
        stages += _stage_rows(per_lane, ran, lane, report)
        if report is None:
            summaries.append(_lane_stopped(lane, ran))
        else:
            summaries.append(_lane_verified(lane, completed(ran)["convert"], config, report))
    first = next(iter(reports.values()), None)
    return RunSummary(
        run=config.name,
        model_type=config.model_type,
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        stages=tuple(stages),
        lanes=tuple(summaries),
        figures=figures,
        sampled_seed=None if first is None else first.sampled_seed,
        sampled=() if first is None else first.sampled,
        switched_off=switched_off(config),
        fell_back_from=fell_back_from,
        gates_ok=shared_stages_ok(stages) and all(lane.gates_ok for lane in summaries),
    )


def _verification(done: dict[str, Completed], config: RunConfig, lane: str) -> VerificationReport:
    """Return the lane's verification; a StageError if it is not of the current package and contract."""
    verify, export, convert = done["verify"], done["export"], done["convert"]
    path = verify.checked(verification_report(verify.folder))
    again = build_command(config, lane, force="verify")
    report = read_json(path, VerificationReport, error=StageError, run=again)
    contract, package = contract_file(export.folder, config.name), package_dir(convert.folder, config.name)
    for found, artifact, recorded in (
        (report.contract_digest, contract, export.output(contract.name)),
        (report.package_digest, package, convert.output(package.name)),
    ):
        if found != recorded.digest:
            raise StageError(
                f"{path} is about {artifact.name} {found}",
                expected=f"{recorded.digest}, as in the manifest next to {artifact}",
                run=again,
            )
    return report


def _stage_rows(
    names: Sequence[str], attempts: Sequence[Attempt], lane: str | None, report: VerificationReport | None
) -> list[StageSummary]:
    """Return the named stages of a lane (None: those that lanes share); stages after a failed one are not_run."""
    by_stage = {each.stage: each for each in attempts}
    stopped = first_failed(attempts)
    return [
        _stage_row(by_stage[name], lane, report)
        if name in by_stage
        else _not_run(name, lane, f"stage {stopped.stage if stopped else name} did not complete")
        for name in names
    ]


def _not_run(stage: str, lane: str | None, reason: str) -> StageSummary:
    return StageSummary(stage=stage, lane=lane, outcome=Outcome.NOT_RUN, reason=reason)


def _stage_row(attempt: Attempt, lane: str | None, report: VerificationReport | None) -> StageSummary:
    """Args: report: the lane's verification."""
    manifest, reason = attempt.manifest, attempt.failure
    if manifest is None:
        return _not_run(attempt.stage, lane, "the stage was never run")
    if attempt.stage == "verify" and report is not None and not must_gates_ok(report.gates):
        blocking = [g.name for g in report.gates if g.severity is Severity.MUST and g.outcome is not Outcome.PASSED]
        reason = f"must-gates: {'; '.join(blocking) or 'none was checked'}"
    return StageSummary(
        stage=attempt.stage,
        lane=lane,
        outcome=Outcome.PASSED if reason is None else Outcome.FAILED,
        reason=reason,
        python=manifest.toolchain.python,
        torch=manifest.toolchain.packages.get("torch"),
        duration_s=manifest.duration_s,
        started_at=manifest.started_at,
        peak_anonymous_bytes=manifest.peak_anonymous_bytes,
    )


def _lane_stopped(lane: str, attempts: Sequence[Attempt]) -> LaneSummary:
    last = first_failed(attempts)
    assert last is not None, "every stage completed"  # otherwise there would be a verification
    reason = last.failure
    assert reason is not None
    toolchain = None if last.manifest is None else last.manifest.toolchain
    return lane_failed(lane, last.stage, reason, toolchain)


def _lane_verified(lane: str, convert: Completed, config: RunConfig, report: VerificationReport) -> LaneSummary:
    path = convert.checked(diagnostics_file(convert.folder))
    diagnostics = read_json(
        path, ConversionDiagnostics, error=StageError, run=build_command(config, lane, force="convert")
    )
    return LaneVerified(
        lane=lane,
        toolchain=diagnostics.toolchain,
        primary=report.primary,
        gates_ok=report.gates_ok,
        gates=report.gates,
        shapes=report.shapes,
        stateful=report.stateful,
        heldout=report.heldout,
        package_size_bytes=convert.output(package_dir(convert.folder, config.name).name).size_bytes,
        convert_duration_s=convert.manifest.duration_s,
        converter_notices=count_notices(diagnostics.notices),
    )


def write_report(summary: RunSummary, folder: Path) -> None:
    """Write `summary.json` and `STATUS.md` into `folder`, each atomically."""
    write_json(summary_file(folder), summary)
    write_atomic(status_file(folder), status_markdown(summary).encode())


def exit_code(summary: RunSummary) -> int:
    """Return 0 if every lane's must-gates passed and every stage that lanes share completed."""
    gates = [lane.gates for lane in summary.lanes]
    return OK if shared_stages_ok(summary.stages) and all(map(must_gates_ok, gates)) else GATES_FAILED


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(
        "report",
        "Print the results of a run, and write them to its report/ directory as summary.json and STATUS.md.",
        example="--config configs/smollm2-135m.toml",
    )
    parser.add_argument(
        "--torch",
        action="append",
        choices=LANES,
        help=f"a lane; may be repeated to compare lanes (default: {PRIMARY_LANE})",
    )
    parser.add_argument(
        "--fell-back-from", choices=LANES, help="the requested lane, whose conversion failed; for the report"
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
