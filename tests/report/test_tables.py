"""What a terminal and a pipe get, whole at every width."""

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
def test_what_a_pipe_of_80_columns_gets(name: str, summaries, golden) -> None:
    golden(f"{name}.txt", printed(summaries[name], 80))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("name", ["good", "bad", "matrix", "failed", "failed-matrix", "imported"])
def test_no_reason_is_cut_at_any_width(name: str, width: int, summaries) -> None:
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
        # Each line of it on a line of its own, to be copied or searched for.
        assert all(f"\n  {line}" in text for line in answer.answer.splitlines() if line)
    assert "…" not in text.replace("9f2c1d7e…", "")  # what tells a digest apart is all that is shown of it


def test_the_order_and_the_last_line(good: RunSummary) -> None:
    text = printed(good, 120)
    titles = [
        "stages, 56.6 s",
        "shapes, run by mil-reference",
        "gates, 13 passed, 1 failed, 1 not_run",
        "7 questions answered",
    ]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert text.splitlines()[-1] == "gates_ok: true"


def test_a_pipe_has_no_colour_and_a_terminal_has(good: RunSummary) -> None:
    assert "\x1b" not in printed(good, 80)
    assert "\x1b[32mpassed" in printed(good, 80, force_terminal=True, color_system="standard")


def test_words_in_brackets_are_not_markup(good: RunSummary) -> None:
    odd = Answer(prompt="[red]Will[/red] [it]?", answer="[/]", mood="hopeful", right=False)
    text = printed(msgspec.structs.replace(good, sampled=(odd,)), 80)
    assert "[red]Will[/red] [it]?" in text
    assert "[/]" in text


def test_an_empty_answer_is_seen(good: RunSummary) -> None:
    empty = Answer(prompt="Will it?", answer=" ", mood="hopeful", right=False)
    text = printed(msgspec.structs.replace(good, sampled=(empty,)), 80)
    assert "Will it?\n  (empty)  hopeful, wrong\n" in text


def test_nothing_is_said_of_answers_where_nobody_asks(imported: RunSummary, failed_lane: RunSummary) -> None:
    stages = (imported.stages[0], imported.stages[1], *failed_lane.stages[2:])
    failed = msgspec.structs.replace(failed_lane, stages=stages)
    for summary in (msgspec.structs.replace(imported, sampled=()), failed):
        for text in (printed(summary, 120), status_markdown(summary)):
            assert not re.search("(?i)answers|question|held-out", text)
    assert "no question was answered" in printed(failed_lane, 120)


def test_greedy_answers_are_the_checkpoints_or_not_and_of_no_mood(imported: RunSummary) -> None:
    text = printed(imported, 120)
    assert "2 questions answered by the package, greedily and through its cache: 1 as by the checkpoint\n" in text
    assert "What is the capital of Australia?\n  Canberra.  as the checkpoint\n" in text
    assert "  Mostly.  not as the checkpoint\n" in text
    assert not re.search("held-out|fact", text)


def test_a_cache_that_did_not_run_says_why(imported: RunSummary) -> None:
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


def test_a_fallback_is_said_just_before_the_verdict(good: RunSummary) -> None:
    text = printed(msgspec.structs.replace(good, fell_back_from="2.8.0"), 80)
    assert text.splitlines()[-2:] == [
        "fell back: the conversion in torch-2.8.0 failed; this is torch-2.9.1",
        "gates_ok: true",
    ]


def test_a_report_with_earlier_gate_names_reads_and_renders(summaries) -> None:
    """Gate names are text for people: a report that names its gates otherwise is as readable as a new one."""
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
