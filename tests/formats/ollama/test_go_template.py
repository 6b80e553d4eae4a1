"""Go templates: verdicts and texts are those of Go itself, and names are Ollama's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.formats.ollama.go_template import MAX_DEPTH, GoTemplateError, parse_go_template

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


@pytest.mark.parametrize(("source", "reason"), GOLDEN["failed"])
def test_what_go_fails_to_execute_is_refused_in_the_same_line(source: str, reason: str) -> None:
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
        ("{{ 9223372036854775808 }}", 1, "the number 9223372036854775808 does not fit into 64 bits"),
        ("\n{{ -9223372036854775809 }}", 2, "the number -9223372036854775809 does not fit into 64 bits"),
        ("{{ " + "9" * 5000 + " }}", 1, f"the number {'9' * 37}... does not fit into 64 bits"),
        ("{{ 1e999 }}", 1, "the number 1e999 does not fit into 64 bits"),
        ("{{ define `a` }}x{{ end }}\n{{ define `a` }}y{{ end }}", 2, "a second template 'a'"),
        # These Go lets pass, and writes `<no value>` or fails when it runs them.
        ("a\n{{ template `nope` }}", 2, "the template 'nope' is not defined"),
        ("{{ define `a` }}{{ if .X }}{{ template `b` }}{{ end }}{{ end }}", 1, "the template 'b' is not defined"),
        ("{{ define `a` }}\n{{ template `a` }}{{ end }}", 2, "the template 'a' includes itself without end"),
        (
            "{{ define `a` }}\n{{ template `b` }}{{ end }}{{ define `b` }}\n{{ template `a` .X }}{{ end }}",
            3,
            "the template 'a' includes itself without end",
        ),
        (
            "{{ define `a` }}{{ if .X }}\n{{ template `a` . }}{{ end }}{{ end }}",
            2,
            "the template 'a' includes itself without end",
        ),
        ("x\n{{ if .System }}{{ template `` $ }}{{ end }}", 2, "the template '' includes itself without end"),
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


def nested(before: str, inside: str, after: str, times: int) -> str:
    return before * times + inside + after * times


NESTED = {
    "if": ("{{ if .System }}\n", "a", "{{ end }}"),
    "else if": ("{{ if .Prompt }}{{ else }}\n", "a", "{{ end }}"),
    "block": ("{{ block `b` . }}{{ end }}{{ with .X }}\n", "a", "{{ end }}"),
    "parentheses": ("(\n", ".System", ")"),
    "both": ("{{ if (not .System) }}\n", "a", "{{ end }}"),
}


def deep(kind: str, times: int) -> str:
    before, inside, after = NESTED[kind]
    text = nested(before, inside, after, times)
    if kind == "block":
        return "{{ define `a` }}" + nested(before, inside, after, times) + "{{ end }}"
    return "{{ " + text + " }}" if kind == "parentheses" else text


@pytest.mark.parametrize(
    ("kind", "outer"), [("if", 0), ("else if", 0), ("block", 1), ("parentheses", 0), ("both", 1)]
)
def test_how_deep_a_template_goes(kind: str, outer: int) -> None:
    parse_go_template(deep(kind, MAX_DEPTH - outer))
    for times in (MAX_DEPTH - outer + 1, 5000):
        with pytest.raises(GoTemplateError) as caught:
            parse_go_template(deep(kind, times))
        assert caught.value.reason == "more than 100 blocks and parentheses inside of one another"
        assert caught.value.line == MAX_DEPTH - outer + 1


def test_blocks_inside_of_blocks_are_counted() -> None:
    with pytest.raises(GoTemplateError) as caught:
        parse_go_template(nested("{{ block `b` . }}", "", "{{ end }}", 3000))
    assert caught.value.reason == "more than 100 blocks and parentheses inside of one another"


def test_a_chain_of_else_if_is_counted() -> None:
    chain = "{{ if .System }}" + "{{ else if .Prompt }}" * 99 + "{{ end }}"
    parse_go_template(chain)
    with pytest.raises(GoTemplateError):
        parse_go_template(chain.replace("{{ end }}", "{{ else if .Prompt }}{{ end }}"))


@pytest.mark.parametrize(
    "unit",
    [
        "a\n",
        "{{ .System }}\n",
        "{{ if .System }}\n{{ end }}",
        "{{/* a */}}\n",
        "{{ (.System) }}",
        "{{ $x%d := .System }}{{ $x%d }}",
        "{{ define `a%d` }}x{{ end }}{{ template `a%d` }}",
    ],
)
def test_the_time_grows_with_the_length(unit: str) -> None:
    text = "".join(unit.replace("%d", str(place)) for place in range(400_000 // len(unit)))
    start = time.process_time()
    parse_go_template(text)
    assert time.process_time() - start < 10  # half a second; in square time, minutes


def test_the_time_of_a_long_action() -> None:
    start = time.process_time()
    parse_go_template("{{ print" + " .System\n" * 40_000 + "}}")
    assert time.process_time() - start < 10


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
