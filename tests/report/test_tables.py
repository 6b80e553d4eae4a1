"""The summary in a terminal and in a pipe, complete at every width."""

from __future__ import annotations

import io
import re
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from coremill.core.documents import read_json
from coremill.core.reports import Answer, Backend, RunSummary, StatefulError, VerificationReport
from coremill.report.status import status_markdown
from coremill.report.tables import render


def printed(summary: RunSummary, width: int, **options) -> str:
    out = io.StringIO()
    render(summary, Console(file=out, width=width, highlight=False, **options))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


@pytest.mark.parametrize("name", ["good", "bad", "matrix", "failed", "failed-matrix", "imported"])
def test_output_at_80_columns_equals_the_golden_file(name: str, summaries, golden) -> None:
    golden(f"{name}.txt", printed(summaries[name], 80))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("name", ["good", "bad", "matrix", "failed", "failed-matrix", "imported"])
def test_texts_are_complete_at_every_width(name: str, width: int, summaries) -> None:
    summary = summaries[name]
    text = printed(summary, width)
    words = {part for word in text.split() for part in (word, word.rstrip(":"))}
    assert max(map(len, text.splitlines())) <= width
    for lane in summary.lanes:
        for gate in lane.gates:
            assert set(f"{gate.name} {gate.reason or ''}".split()) <= {word.rstrip(":") for word in words} | set(
                words
            )
    for answer in summary.sampled:
        assert set(answer.prompt.split()) <= words
        # Each line of the answer is on a line of its own, so that it can be copied.
        assert all(f"\n  {line}" in text for line in answer.answer.splitlines() if line)
    assert "…" not in text.replace("9f2c1d7e…", "")  # only digests are shortened


def test_order_of_tables_and_last_line(good: RunSummary) -> None:
    text = printed(good, 120)
    titles = [
        "stages, 56.6 s",
        "shapes, run by mil-reference",
        "gates, 13 passed, 1 failed, 1 not_run",
        "7 questions answered",
    ]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert text.splitlines()[-1] == "gates_ok: true"


def test_only_a_terminal_has_colour(good: RunSummary) -> None:
    assert "\x1b" not in printed(good, 80)
    assert "\x1b[32mpassed" in printed(good, 80, force_terminal=True, color_system="standard")


def test_words_in_brackets_are_not_markup(good: RunSummary) -> None:
    odd = Answer(prompt="[red]Will[/red] [it]?", answer="[/]", mood="hopeful", right=False)
    text = printed(msgspec.structs.replace(good, sampled=(odd,)), 80)
    assert "[red]Will[/red] [it]?" in text
    assert "[/]" in text


def test_empty_answer_is_shown(good: RunSummary) -> None:
    empty = Answer(prompt="Will it?", answer=" ", mood="hopeful", right=False)
    text = printed(msgspec.structs.replace(good, sampled=(empty,)), 80)
    assert "Will it?\n  (empty)  hopeful, wrong\n" in text


def test_answers_are_omitted_without_questions(imported: RunSummary, failed_lane: RunSummary) -> None:
    stages = (imported.stages[0], imported.stages[1], *failed_lane.stages[2:])
    failed = msgspec.structs.replace(failed_lane, stages=stages)
    for summary in (msgspec.structs.replace(imported, sampled=()), failed):
        for text in (printed(summary, 120), status_markdown(summary)):
            assert not re.search("(?i)answers|question|held-out", text)
    assert "no question was answered" in printed(failed_lane, 120)


def test_greedy_answers_are_compared_with_the_checkpoint(imported: RunSummary) -> None:
    text = printed(imported, 120)
    title = "2 questions answered by the package, greedily with its cache: 1 of 2 answers equal the checkpoint's\n"
    assert title in text
    assert "What is the capital of Australia?\n  Canberra.  same as the checkpoint\n" in text
    assert "  Mostly.  differs from the checkpoint\n" in text
    assert not re.search("held-out|fact", text)


def test_error_of_cached_functions_is_shown(imported: RunSummary) -> None:
    broken = StatefulError(backend=Backend.MIL_REFERENCE, error="no function `decode`")
    (lane,) = imported.lanes
    lane = msgspec.structs.replace(lane, stateful=broken)
    assert "prefill and decode: error: no function `decode`\n" in printed(
        msgspec.structs.replace(imported, lanes=(lane,)), 120
    )
    both = printed(msgspec.structs.replace(imported, lanes=(*imported.lanes, lane)), 200)
    rows = {words[0]: words[1:] for line in both.splitlines() if (words := line.split())}
    assert rows["decode"] == ["ok,", "43.6", "dB", "error"]
    assert rows["perplexity"] == ["15.169", "(15.169)", "15.169", "(15.169)"]


def test_fallback_precedes_the_last_line(good: RunSummary) -> None:
    text = printed(msgspec.structs.replace(good, fell_back_from="2.8.0"), 80)
    assert text.splitlines()[-2:] == [
        "fell back to torch-2.9.1, because the conversion in torch-2.8.0 failed",
        "gates_ok: true",
    ]


def test_report_with_earlier_gate_names_renders(summaries) -> None:
    """Gate names are free text, so reports with earlier names stay readable."""
    older = read_json(Path(__file__).with_name("older_verification_report.json"), VerificationReport)
    names = [gate.name for gate in older.gates]
    assert names[10] == "Nothing but rounding sets it apart"
    (lane,) = summaries["good"].lanes
    summary = msgspec.structs.replace(
        summaries["good"], lanes=(msgspec.structs.replace(lane, gates=older.gates, gates_ok=older.gates_ok),)
    )
    assert older.gates_ok
    text = printed(summary, 200)
    assert all(name in text for name in names)
    assert all(name in status_markdown(summary) for name in names)
