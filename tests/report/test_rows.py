"""The contents that the terminal and STATUS.md share."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coremill.core.gates import Gate, Outcome, PlatformReason, Severity, gates_ok
from coremill.core.reports import RunSummary
from coremill.report.rows import (
    Note,
    count_outcomes,
    fallback_text,
    figure,
    final_line,
    gate_notes,
    gate_rows,
    heldout_text,
    is_blamed,
    lane_gate_rows,
    megabytes,
    notices,
    percent,
)
from coremill.report.summary import summarise


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    outcome = draw(st.sampled_from(Outcome))
    platform = draw(st.none() | st.sampled_from(PlatformReason)) if outcome is Outcome.NOT_RUN else None
    return Gate(
        name=draw(st.text("abc", min_size=1)),
        severity=draw(st.sampled_from(Severity)),
        outcome=outcome,
        reason=None if outcome is Outcome.PASSED else "because",
        platform_reason=platform,
    )


@given(st.lists(gates()))
def test_a_gate_is_blamed_exactly_if_gates_ok_is_false(drawn: list[Gate]) -> None:
    assume(any(gate.severity is not Severity.NICE for gate in drawn))
    assert any(is_blamed(gate) for gate in drawn) == (not gates_ok(drawn))


def test_final_line_names_the_gates(good: RunSummary, bad: RunSummary, matrix: RunSummary) -> None:
    assert final_line(good) == "gates_ok: true"
    assert final_line(bad) == (
        "gates_ok: false; must: SQNR at the primary shape (failed), "
        "Held-out answers have the right mood (not_run), Every held-out answer is exact (not_run); "
        "should: Secondary shapes validate (failed)"
    )
    assert final_line(matrix).startswith("gates_ok: false; must: torch-2.8.0 SQNR at the primary shape (failed), ")
    assert final_line(matrix).endswith("; should: torch-2.8.0 Secondary shapes validate (failed)")


def test_no_gates_is_not_ok(good: RunSummary) -> None:
    lane = msgspec.structs.replace(good.lanes[0], gates=(), gates_ok=False)
    summary = msgspec.structs.replace(good, lanes=(lane,), gates_ok=False)
    assert final_line(summary) == "gates_ok: false; no gate was checked"
    assert count_outcomes(lane) == "no gates"


def test_shared_reasons_are_merged_and_those_of_passed_gates_are_last(bad: RunSummary) -> None:
    notes = gate_notes(bad.lanes[0])
    assert [note.word for note in notes] == ["failed", "not_run", "failed", "not_run", "failed", "passed"]
    assert notes[1] == Note(
        "not_run",
        "Held-out answers have the right mood; Every held-out answer is exact",
        "no dataset with held-out questions was given",
    )


def test_long_measured_value_moves_below_the_table(good: RunSummary) -> None:
    lane = good.lanes[0]
    loads = "The Core ML model loads"

    def measured(**options) -> str:
        return next(row[3] for row in gate_rows(lane, **options).cells if row[2] == loads)

    text = "312 operations lowered by coremill.mil"
    assert measured() == text
    assert measured(longest=len(text)) == text
    assert measured(longest=12) == "see below"
    assert Note("passed", loads, text) in gate_notes(lane, longest=12)
    assert loads not in {note.subject for note in gate_notes(lane)}


def test_lanes_show_which_stage_did_not_complete(finished) -> None:
    finished.fail("convert", "2.9.1", "no")
    finished.fail("export", "2.8.0", "no")
    rows = lane_gate_rows(summarise(finished.layout, finished.config, ["2.9.1", "2.8.0"]))
    assert rows.cells == [
        ("must", "Stage convert completes", "failed", "not_run"),
        ("must", "Stage export completes", "passed", "failed"),
        ("", "gates_ok", "false", "false"),
    ]


@given(st.floats(0, 1))
def test_only_1_is_100_percent(share: float) -> None:
    text = percent(share)
    assert (text == "100 %") == (share == 1)
    assert "100.00" not in text
    assert float(text.removesuffix(" %")) <= share * 100 + 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.98148148, "0.981481"),
        (2.3e-7, "2.3e-07"),
        (40.0, "40"),
        (17, "17"),
        ("a", "a"),
        ("sha256:9f2c1d7e00", "9f2c1d7e…"),
    ],
)
def test_figure_formats_values(value: float | int | str | None, text: str) -> None:
    assert figure(value) == text


def test_short_texts(good: RunSummary) -> None:
    assert megabytes(1_392_511) == "1.39 MB"
    assert notices({"harmless": 8, "compatibility": 1, "warning": 0}) == "8 harmless, 1 compatibility"
    assert notices({"harmless": 0}) == "none"
    assert heldout_text(None) == "no held-out questions: the model was not trained on a dataset"
    assert fallback_text(good) is None
    fell_back = msgspec.structs.replace(good, fell_back_from="2.8.0")
    assert fallback_text(fell_back) == "fell back to torch-2.9.1, because the conversion in torch-2.8.0 failed"
