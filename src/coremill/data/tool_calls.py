"""Tool calls as answers: `<|tool_call|>{"name": …, "args": {…}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import msgspec

from coremill.core.answer_key import ArgumentType, Tools
from coremill.core.documents import Record
from coremill.text.student_tokenizer import TOOL_CALL

_TYPES: Final[Mapping[ArgumentType, type]] = {"string": str, "integer": int, "boolean": bool}


class ToolCall(Record):
    """A call of a tool by name."""

    name: str
    args: Mapping[str, str | int | float | bool]


def render(call: ToolCall) -> str:
    """Return `call` as an answer; equal calls with their arguments in the same order give equal text."""
    return TOOL_CALL + json.dumps({"name": call.name, "args": call.args}, ensure_ascii=False)


def parse(answer: str) -> ToolCall | None:
    """Return the call in `answer`, or None if it has no marker, is not JSON, or has other keys."""
    if not answer.startswith(TOOL_CALL):
        return None
    try:
        return msgspec.json.decode(answer.removeprefix(TOOL_CALL), type=ToolCall)
    except msgspec.DecodeError:  # a model's answer may be anything
        return None


def fits(call: ToolCall, tools: Tools) -> bool:
    """Whether the call has the name of one of `tools` and exactly its arguments, with their types."""
    arguments = tools.get(call.name)
    return (
        arguments is not None
        and call.args.keys() == arguments.keys()
        and all(type(call.args[name]) is _TYPES[kind] for name, kind in arguments.items())
    )
