"""STATUS.md, verbatim and as a Markdown parser reads it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from coremill.core.reports import Answer, RunSummary
from coremill.report.status import _code, _escape, status_markdown


def inline(markdown: str) -> str:
    """Return the text of the rendered `markdown`."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    parts = []
    for token in tokens:
        for child in token.children or []:
            parts.append(" " if child.type == "softbreak" else child.content)
    return "".join(parts)


@pytest.mark.parametrize("name", ["good", "bad", "matrix", "failed", "failed-matrix", "imported"])
def test_page_equals_the_golden_file(name: str, summaries, golden) -> None:
    golden(f"{name}.md", status_markdown(summaries[name]))


def test_page_parses_to_tables_and_headings(matrix: RunSummary) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(status_markdown(matrix))
    assert sum(token.type == "table_open" for token in tokens) == 3 + 2 * len(matrix.lanes)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [
        "magic-8-ball: pipeline status",
        "Stages",
        "Lanes",
        "Shapes, torch-2.9.1",
        "Gates, torch-2.9.1",
        "Shapes, torch-2.8.0",
        "Gates, torch-2.8.0",
        "Figures",
        "Answers",
        "Commands",
    ]


printable = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1)
punctuation = st.text("_*`[]<>|\\&;!#~ablt1 ", min_size=1)


def as_line(text: str) -> str:
    return " ".join(text.split())


@given(punctuation | printable)
def test_escaped_text_renders_verbatim(text: str) -> None:
    assert as_line(inline(f"- **x**: {_escape(text)} x")) == as_line(f"x: {text} x")


@given((punctuation | printable).filter(str.strip))
def test_code_span_renders_verbatim(text: str) -> None:
    line = as_line(text)
    shown = inline(f"- x {_code(line)} x").removeprefix("x ").removesuffix(" x")
    assert shown == line


def test_markup_in_texts_does_not_break_tables_or_lists(good: RunSummary) -> None:
    odd = Answer(prompt="a | b\n# c <b>", answer="``x`` |", mood=None, right=False)
    lane = good.lanes[0]
    gate = msgspec.structs.replace(lane.gates[0], name="a | b")
    lane = msgspec.structs.replace(lane, gates=(gate, *lane.gates[1:]))
    page = status_markdown(msgspec.structs.replace(good, sampled=(odd,), lanes=(lane,)))
    assert "- fact: a | b # c \\<b> → ``` ``x`` | ``` (wrong)" in page
    assert r"| must     | passed  | a \| b  " in page


def test_e2e_test_is_listed_only_for_its_model(good: RunSummary) -> None:
    test = "pytest tests/e2e/test_magic_8_ball_pipeline.py::test_magic_8_ball_pipeline_e2e -v -s"
    assert test in status_markdown(good)
    assert test not in status_markdown(msgspec.structs.replace(good, run="smollm2", model_type="llama"))
