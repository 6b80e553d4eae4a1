"""The summary in a terminal: stages, shapes, gates, answers, and `gates_ok` in the last line.

It is readable at 80 columns and in a pipe: every outcome is a word, colour only repeats it, and long texts wrap.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from coremill.core.reports import LaneSummary, LaneVerified, RunSummary
from coremill.report.rows import (
    LANE_SHAPES,
    Column,
    Note,
    Rows,
    answer_text,
    answer_verdict,
    answers_questions,
    answers_title,
    backends,
    count_outcomes,
    fallback_text,
    final_line,
    gate_notes,
    gate_rows,
    heldout_text,
    in_lanes,
    lane_gate_rows,
    lane_name,
    lane_rows,
    learned_to_answer,
    megabytes,
    notices,
    perplexity_text,
    rightness,
    shape_notes,
    shape_rows,
    stage_notes,
    stage_rows,
    stateful_text,
    total_s,
)

_LONGEST_FIGURE = 12
"""Characters of a measured value; a longer one is printed below the table."""
_STYLES = {
    "passed": "green",
    "ok": "green",
    "right": "green",
    "true": "green",
    "failed": "bold red",
    "error": "bold red",
    "wrong": "red",
    "false": "bold red",
    "not_run": "yellow",
}
"""The colours of outcomes."""


def render(summary: RunSummary, console: Console) -> None:
    """Print the summary; for several lanes, their comparison instead of the figures of each."""
    console.print(stages_table(summary))
    if len(summary.lanes) == 1:
        lane = summary.lanes[0]
        if isinstance(lane, LaneVerified):
            console.print(shapes_table(lane))
        console.print(gates_table(lane))
    else:
        console.print(comparison_table(summary))
    if answers_questions(summary):
        console.print(answers_list(summary))
    if fallback := fallback_text(summary):
        console.print(Text(fallback, style="bold yellow"))
    console.print(Text(final_line(summary), style="bold green" if summary.gates_ok else "bold red"))


def stages_table(summary: RunSummary) -> RenderableType:
    title = f"{summary.run}: last runs of the stages, {total_s(summary):.1f} s in total"
    return Group(_title(title), _table(stage_rows(summary)), *_notes(stage_notes(summary)), "")


def shapes_table(lane: LaneVerified) -> RenderableType:
    title = f"{lane_name(lane.lane)}: shapes, run by {backends(lane)}, compared with the checkpoint"
    size = f"package {megabytes(lane.package_size_bytes)}; converter notices: {notices(lane.converter_notices)}"
    more = [_below(Text(text)) for text in (perplexity_text(lane), stateful_text(lane.stateful)) if text]
    return Group(_title(title), _table(shape_rows(lane)), *_notes(shape_notes(lane)), *more, _below(Text(size)), "")


def gates_table(lane: LaneSummary) -> RenderableType:
    title = f"{lane_name(lane.lane)}: gates, {count_outcomes(lane)}"
    rows, notes = gate_rows(lane, longest=_LONGEST_FIGURE), gate_notes(lane, longest=_LONGEST_FIGURE)
    return Group(_title(title), _grouped(rows), *_notes(notes), "")


def comparison_table(summary: RunSummary) -> RenderableType:
    """Return the lanes of a run side by side."""
    return Group(
        _title(f"{summary.run}: lanes; {LANE_SHAPES}"),
        _table(lane_rows(summary)),
        *_notes(in_lanes(summary, shape_notes)),
        "",
        _title(f"{summary.run}: gates in each lane"),
        _grouped(lane_gate_rows(summary)),
        *_notes(in_lanes(summary, gate_notes)),
        "",
    )


def answers_list(summary: RunSummary) -> RenderableType:
    """Return each question with the answer below it; next to each other, a tool call would wrap into four lines."""
    lines: list[RenderableType] = []
    for answer in summary.sampled:
        kind, word = answer_verdict(summary, answer)
        verdict = Text.assemble((kind, "dim"), (word, _STYLES[rightness(answer)]))
        lines.append(Text(answer.prompt))
        lines.append(Padding(Text.assemble((answer_text(answer), "bold"), "  ", verdict), (0, 0, 0, 2)))
    lanes = summary.verified[:1] if learned_to_answer(summary) else ()
    heldout = [_below(Text(heldout_text(lane.heldout))) for lane in lanes]
    return Group(_title(answers_title(summary)), *lines, *heldout, "")


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _below(content: RenderableType) -> RenderableType:
    return Padding(content, (1, 0, 0, 2))


def _notes(notes: Sequence[Note]) -> list[RenderableType]:
    if not notes:
        return []
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for note in notes:
        grid.add_row(_cell(note.word), Text.assemble((note.subject, "bold"), f": {note.text}"))
    return [_below(grid)]


def _table(rows: Rows) -> Table:
    table = _empty_table(rows.columns)
    for cells in rows.cells:
        table.add_row(*(_cell(cell) for cell in cells))
    return table


def _grouped(rows: Rows) -> Table:
    """Return a table whose first column becomes titles of groups, which leaves the others more width."""
    table = _empty_table(rows.columns[1:])
    group = ""
    for first, *cells in rows.cells:
        if first != group:
            table.add_row(Text(first, style="bold"))
            group = first
        table.add_row(*(_cell(cell) for cell in cells))
    return table


def _cell(text: str) -> Text:
    """Return the text of a cell. It is not parsed as markup, because questions and reasons may contain brackets."""
    word = text.split(",")[0]
    return Text(text, style=_STYLES.get(word, ""), overflow="fold")


def _empty_table(columns: Sequence[Column]) -> Table:
    # No title: rich would wrap it to the width of the table.
    table = Table(box=SIMPLE_HEAD, header_style="dim", show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column.name, justify="right" if column.numeric else "left", overflow="fold")
    return table
