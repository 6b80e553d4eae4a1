"""Print what this machine has and lacks for each stage, and the commands that set it up.

Outside a checkout, where no stage is built, it examines the packages that are installed with this coremill.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coremill.cli.examination import (
    DoctorReport,
    Finding,
    Standing,
    examine,
    examine_installation,
    this_machine,
)
from coremill.core.command import command_parser, exit_on_error
from coremill.core.errors import MachineError
from coremill.pipeline.project import project_root

_STYLES = {
    Standing.READY: "green",
    Standing.NOTE: "cyan",
    Standing.TO_DO: "yellow",
    Standing.BLOCKED: "bold red",
}


def render(report: DoctorReport, console: Console) -> None:
    """Print the report. It can be read without colour."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    sections = (
        ("machine", report.machine),
        ("interpreters", report.interpreters),
        ("environments", report.environments),
        ("lanes", report.lanes),
    )
    for title, findings in sections:
        if findings:
            _add_title(table, title)
        for finding in findings:
            _add_finding(table, finding)
    if report.stages:
        _add_title(table, "stages")
    for row in report.stages:
        stage = row.stage if row.lane is None else f"{row.stage} torch-{row.lane}"
        table.add_row(_word(row.standing), stage, f"in {row.environment}")
    console.print(table)
    console.print()


def _add_title(table: Table, title: str) -> None:
    if table.row_count:
        table.add_row()
    table.add_row("", Text(title, style="bold"))


def _add_finding(table: Table, finding: Finding) -> None:
    lines = Text(finding.found)
    if finding.run is not None:
        lines.append(f"\nrun: {finding.run}", style="bold")
    table.add_row(_word(finding.standing), Text(finding.subject), lines)


def _word(standing: Standing) -> Text:
    return Text(standing.value, style=_STYLES[standing])


def verdict(report: DoctorReport) -> str:
    """Return the report in one line."""
    if report.blockers:
        blocked = ", ".join(finding.subject for finding in report.blockers)
        return f"missing, and not available on this machine: {blocked}"
    to_do = [finding.subject for finding in report.findings if finding.standing is Standing.TO_DO]
    if to_do:
        return f"can be set up: {', '.join(to_do)}"
    return "every stage can run" if report.stages else "every command can run"


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("doctor", __doc__, example="")
    parser.parse_args(argv)
    try:
        root = project_root()
    except MachineError:
        report = examine_installation(this_machine(Path.cwd()))
    else:
        report = examine(root, this_machine(root), os.environ)
    console = Console(highlight=False)
    render(report, console)
    if report.blockers:
        raise MachineError(
            verdict(report),
            expected="a machine on which every stage can run",
            run=report.blockers[0].run,
        )
    console.print(Text(verdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
