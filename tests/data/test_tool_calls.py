"""Tool calls: round trips, and what does not parse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.data.tool_calls import ToolCall, fits, parse, render

TOOLS = {"lamp": {"room": "string", "on": "boolean"}, "timer": {"minutes": "integer"}, "stop": {}}

calls = st.builds(
    ToolCall,
    name=st.text(),
    args=st.dictionaries(st.text(), st.one_of(st.text(), st.booleans(), st.integers(-(2**53), 2**53)), max_size=3),
)


@given(calls)
def test_a_call_round_trips(call: ToolCall) -> None:
    answer = render(call)
    assert parse(answer) == call
    assert json.loads(answer.removeprefix("<|tool_call|>")) == {"name": call.name, "args": call.args}


def test_the_text_of_a_call() -> None:
    assert render(ToolCall(name="lamp", args={"room": "Flur", "on": True})) == (
        '<|tool_call|>{"name": "lamp", "args": {"room": "Flur", "on": true}}'
    )


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "It is certain.",
        "<|tool_call|>",
        '{"name": "stop", "args": {}}',
        ' <|tool_call|>{"name": "stop", "args": {}}',
        '<|tool_call|>{"name": "stop", "args": {}',
        '<|tool_call|>{"name": "stop"}',
        '<|tool_call|>{"name": "stop", "args": []}',
        '<|tool_call|>{"name": "stop", "args": {}, "more": 1}',
        '<|tool_call|>{"name": "stop", "args": {}} and then',
        '<|tool_call|>{"name": "timer", "args": {"minutes": [5]}}',
        '<|tool_call|>{"name": "timer", "args": {"minutes": null}}',
    ],
)
def test_other_answers_are_not_calls(answer: str) -> None:
    assert parse(answer) is None


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (ToolCall(name="lamp", args={"room": "hall", "on": True}), True),
        (ToolCall(name="lamp", args={"on": False, "room": "hall"}), True),
        (ToolCall(name="stop", args={}), True),
        (ToolCall(name="lamp", args={"room": "hall"}), False),
        (ToolCall(name="lamp", args={"room": "hall", "on": True, "colour": "red"}), False),
        (ToolCall(name="lamp", args={"room": "hall", "on": 1}), False),
        (ToolCall(name="timer", args={"minutes": True}), False),
        (ToolCall(name="timer", args={"minutes": 5.0}), False),
        (ToolCall(name="radio", args={}), False),
    ],
)
def test_fits_compares_the_name_the_arguments_and_their_types(call: ToolCall, expected: bool) -> None:
    assert fits(call, TOOLS) is expected
