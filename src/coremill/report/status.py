"""`STATUS.md`: the summary as a Markdown page."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from coremill.core.gates import must_gates_ok
from coremill.core.reports import Answer, LaneFailed, LaneSummary, RunSummary
from coremill.report.rows import (
    ABSENT,
    LANE_SHAPES,
    Note,
    Rows,
    answer_text,
    answer_verdict,
    answers_questions,
    answers_title,
    backends,
    count_outcomes,
    fallback_text,
    figure,
    final_line,
    gate_notes,
    gate_rows,
    heldout_text,
    lane_gate_rows,
    lane_name,
    lane_rows,
    learned_to_answer,
    megabytes,
    notices,
    perplexity_text,
    shape_notes,
    shape_rows,
    stage_notes,
    stage_rows,
    stateful_text,
    stopped_text,
    total_s,
)

E2E_TEST = "pytest tests/e2e/test_magic_8_ball_pipeline.py::test_magic_8_ball_pipeline_e2e -v -s"


def status_markdown(summary: RunSummary) -> str:
    """Return the page."""
    sections = [
        [f"# {summary.run}: pipeline status", "", *_head(summary)],
        ["## Stages", "", *_stages(summary)],
    ]
    if len(summary.lanes) > 1:
        tables = [*_table(lane_rows(summary)), "", *_table(lane_gate_rows(summary))]
        sections.append(["## Lanes", "", f"{LANE_SHAPES[0].upper()}{LANE_SHAPES[1:]}.", "", *tables])
    for lane in summary.lanes:
        sections.append([f"## Shapes, {lane_name(lane.lane)}", "", *_shapes(lane)])
        sections.append([f"## Gates, {lane_name(lane.lane)}", "", *_gates(lane)])
    sections.append(["## Figures", "", *_figures(summary)])
    if answers_questions(summary):
        sections.append(["## Answers", "", *_answers(summary)])
    sections.append(["## Commands", "", *_commands(summary)])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _head(summary: RunSummary) -> list[str]:
    must = all(must_gates_ok(lane.gates) for lane in summary.lanes)
    lines = [
        f"- **Last updated**: {_time(summary.created_at)}",
        f"- **Model type**: {_escape(summary.model_type)}",
        f"- **Must-gates**: {'all passed' if must else 'not all passed'}",
    ]
    for lane in summary.lanes:
        lines.append(f"- **Gates, {lane_name(lane.lane)}**: {count_outcomes(lane)}")
    if fallback := fallback_text(summary):
        lines.append(f"- **Fallback**: {fallback}")
    flows = [_flow(summary, lane.lane) for lane in summary.lanes]
    return [*lines, "", f"**{_escape(final_line(summary))}**", "", "```text", *flows, "```"]


def _flow(summary: RunSummary, lane: str) -> str:
    """Return the stages that one lane depends on and their outcomes, in a line."""
    stages = [row for row in summary.stages if row.lane in (None, lane)]
    return f"{lane_name(lane)}: " + " → ".join(f"{row.stage} {row.outcome.value}" for row in stages)


def _time(timestamp: str) -> str:
    """Format an ISO 8601 time in UTC to the minute."""
    return f"{datetime.datetime.fromisoformat(timestamp):%Y-%m-%d %H:%M} UTC"


def _stages(summary: RunSummary) -> list[str]:
    started_at = [row.started_at for row in summary.stages if row.started_at is not None]
    return [
        *_table(stage_rows(summary)),
        "",
        f"{total_s(summary):.1f} s in total, counting the last run of each stage; the first one started at "
        f"{_time(started_at[0])}.",
        *_notes(stage_notes(summary)),
    ]


def _shapes(lane: LaneSummary) -> list[str]:
    if isinstance(lane, LaneFailed):
        return [f"No shape was run: {stopped_text(lane)}."]
    return [
        f"The package was run by {backends(lane)} on real prompts and compared with the checkpoint in eager torch.",
        "Top-1 agreement excludes positions whose two largest logits are almost equal.",
        "",
        *_table(shape_rows(lane)),
        *_notes(shape_notes(lane)),
        *_sentences(perplexity_text(lane), stateful_text(lane.stateful)),
        "",
        f"Package: {megabytes(lane.package_size_bytes)}, converted in {lane.convert_duration_s:.1f} s by "
        f"coremltools {lane.toolchain.packages.get('coremltools', ABSENT)}. "
        f"Converter notices: {notices(lane.converter_notices)}.",
    ]


def _sentences(*texts: str | None) -> list[str]:
    """Return a paragraph for each text that is not None."""
    return [line for text in texts if text for line in ("", f"{_escape(text[0].upper() + text[1:])}.")]


def _gates(lane: LaneSummary) -> list[str]:
    return [f"{count_outcomes(lane)}.", "", *_table(gate_rows(lane)), *_notes(gate_notes(lane))]


def _notes(notes: Sequence[Note]) -> list[str]:
    lines = [f"- {note.word} **{_escape(note.subject)}**: {_escape(note.text)}" for note in notes]
    return ["", *lines] if lines else []


def _figures(summary: RunSummary) -> list[str]:
    listed = [
        f"- {_escape(name)}: {_escape(value if isinstance(value, str) else figure(value))}"
        for name, value in summary.figures.items()
    ]
    if not learned_to_answer(summary):
        return listed
    return [*listed, *(f"- {lane_name(lane.lane)}: {_escape(_heldout(lane))}" for lane in summary.lanes)]


def _heldout(lane: LaneSummary) -> str:
    if isinstance(lane, LaneFailed):
        return f"no held-out questions were answered: {stopped_text(lane)}"
    return heldout_text(lane.heldout)


def _answers(summary: RunSummary) -> list[str]:
    title = answers_title(summary)
    answers = [_answer(summary, answer) for answer in summary.sampled]
    return [f"{title[0].upper()}{title[1:]}.", *(["", *answers] if answers else [])]


def _answer(summary: RunSummary, answer: Answer) -> str:
    kind, word = answer_verdict(summary, answer)
    kind = f"{kind.removesuffix(', ')}: " if kind else ""
    return f"- {kind}{_escape(answer.prompt)} → {_code(answer_text(answer))} ({word})"


def _commands(summary: RunSummary) -> list[str]:
    session = "matrix" if len(summary.lanes) > 1 else "pipeline"
    test = [E2E_TEST] if summary.model_type == "magic-8-ball" else []
    return ["```sh", f"nox -s {session} -- --config configs/{summary.run}.toml", *test, "```"]


def _table(rows: Rows) -> list[str]:
    """Return a Markdown table whose source is aligned."""
    header = [column.name for column in rows.columns]
    cells = [[_escape(cell).replace("|", r"\|") for cell in row] for row in rows.cells]
    widths = [max(len(row[index]) for row in [header, *cells]) for index in range(len(header))]
    widths = [max(width, 3) for width in widths]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column.numeric else cell.ljust(width)
            for cell, width, column in zip(row, widths, rows.columns, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + ":" if column.numeric else "-" * width
        for width, column in zip(widths, rows.columns, strict=True)
    ]
    return [line(header), line(rule), *(line(row) for row in cells)]


def _escape(text: str) -> str:
    """Escape `text` to one line of Markdown that renders verbatim; underscores within words need no escape."""
    line = " ".join(text.split())
    return re.sub(r"[\\`*\[<&~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def _code(text: str) -> str:
    """Return `text` as a code span, with a fence longer than any run of backticks in it."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
