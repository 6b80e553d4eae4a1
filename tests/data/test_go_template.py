"""Go templates: verdicts and texts are those of Go itself, and names are Ollama's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.data.go_template import GoTemplateError, parse_go_template

GOLDEN = json.loads((Path(__file__).parent / "go_template_golden.json").read_text(encoding="utf-8"))
OF_A_MESSAGE = ".Role, .Content, .Thinking, .Images, .ToolCalls, .ToolName, .ToolCallID"


@pytest.mark.parametrize(("source", "text"), GOLDEN["rendered"])
def test_texts_are_those_of_go(source: str, text: str) -> None:
    assert parse_go_template(source).render(GOLDEN["values"]) == text


@pytest.mark.parametrize("source", GOLDEN["accepted"])
def test_what_go_parses_is_parsed(source: str) -> None:
    parse_go_template(source)


@pytest.mark.parametrize(("source", "reason"), GOLDEN["refused"])
def test_what_go_refuses_is_refused_in_the_same_line(source: str, reason: str) -> None:
    with pytest.raises(GoTemplateError) as caught:
        parse_go_template(source)
    assert caught.value.line == int(reason.split(":")[1])


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("a\n{{ if .System }}\nb", 2, "{{ if }} without its {{ end }}"),
        ("{{ if .System }}\n{{ end }}\n{{ end }}", 3, "an {{ end }} without its if, range or with"),
        ("{{ if .System }}\n{{ else }}\n{{ else }}{{ end }}", 3, "a second {{ else }} of the {{ if }} in line 1"),
        ("x\n\n{{ .System", 3, "an action without its `}}`"),
        ("{{ .System | trim }}", 1, "the function 'trim' is not one of Ollama's"),
        ("{{ $content }}", 1, "the variable $content is not declared"),
        ('{{ if eq .System "a }}{{ end }}', 1, 'a string without its closing "'),
        ("{{ /* a */ }}", 1, "an unexpected '/' in an action"),
        ("{{- end\n}}", 1, "an {{ end }} without its if, range or with"),
        ("\n{{ range .Messages }}{{ break 1 }}{{ end }}", 2, "an unexpected '1' in {{ break }}"),
        # These Go lets pass, and writes `<no value>` or fails when it runs them.
        ("{{ $x = 1 }}", 1, "the variable $x is not declared"),
        (
            "{{ .system }}",
            1,
            "the variable .system is not one of Ollama's: .System, .Prompt, .Response, .Suffix, .Messages, .Tools, "
            ".Think, .ThinkLevel, .IsThinkSet, .Query, .Document, .Instruction",
        ),
        (
            "{{ range .Messages }}\n{{ .System }}{{ end }}",
            2,
            f"the variable .System is not one of Ollama's: {OF_A_MESSAGE}",
        ),
        (
            "{{ range $i, $m := .Messages }}{{ $m.Text }}{{ end }}",
            1,
            f"the variable .Text is not one of Ollama's: {OF_A_MESSAGE}",
        ),
        (
            "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Args }}{{ end }}{{ end }}",
            1,
            "the variable .Args is not one of Ollama's: .Name, .Arguments, .Index",
        ),
    ],
)
def test_a_fault_is_named_with_its_line(source: str, line: int, reason: str) -> None:
    with pytest.raises(GoTemplateError) as caught:
        parse_go_template(source)
    assert (caught.value.line, caught.value.reason) == (line, reason)
    assert str(caught.value) == f"line {line} of the template: {reason}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ range .Messages }}{{ $.System }}{{ end }}",
        "{{ with .System }}{{ . }}{{ end }}",
        "{{ range $i, $m := .Messages }}{{ $m.Content }}{{ $.Tools }}{{ end }}",
        "{{ range .Tools }}{{ .Function.Parameters.Properties }}{{ end }}",
    ],
)
def test_what_is_looked_into_is_followed(source: str) -> None:
    parse_go_template(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ json .Messages }}", "the function json is not executed here"),
        ("{{ .Suffix }}", "there is no .Suffix in what is rendered"),
        ('{{ define "a" }}{{ end }}{{ template "a" }}', "the template 'a' is not executed here"),
    ],
)
def test_what_is_not_executed_says_so(source: str, reason: str) -> None:
    template = parse_go_template(source)
    with pytest.raises(GoTemplateError) as caught:
        template.render({"Messages": []})
    assert caught.value.reason == reason


PIECES = [
    *("{{", "}}", "{{-", "-}}", " if ", " range ", " end ", " else ", ".System", ".Messages", "$x", ":=", "|"),
    *("(", ")", '"', "`", "/*", "*/", "eq", "len", "\n", "text", " "),
]


def fault_of(source: str) -> GoTemplateError | None:
    try:
        parse_go_template(source)
    except GoTemplateError as fault:
        return fault
    return None


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text_is_a_template_or_a_fault_in_one_of_its_lines(source: str) -> None:
    fault = fault_of(source)
    assert fault is None or fault.line in range(1, source.count("\n") + 2)
    if "{{" not in source:
        assert fault is None
        assert parse_go_template(source).render({}) == source
