"""Chat templates: the Jinja template of a tokenizer, which renders a conversation as its model expects it.

The environment is that of transformers' `apply_chat_template`, sandboxed, so that a template renders the same text
in both: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coremill.core.errors import TokenizerError

_Value = Any
"""A value in a template: any Python object."""

Message = Mapping[str, _Value]
"""`role` and `content`, and any other field that a template reads."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's part for training; here, only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, which could reach Python's internals."""

    def __setitem__(self, name: str, value: _Value) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with the attribute {name!r}")
        super().__setitem__(name, value)


class ChatTemplate:
    """A template, with the special tokens that it can refer to.

    Args:
        source: the Jinja template.
        special_tokens: the text of each by role, such as `bos_token`.

    Raises:
        TokenizerError: `source` is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except Exception as failure:  # RecursionError, SyntaxError and others, if it is nested deeply
            raise _refusal(failure, "a Jinja template") from failure

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Render a conversation as the model reads it.

        Args:
            add_generation_prompt: whether to append the start of the assistant's answer.

        Raises:
            TokenizerError: the template rejects these messages, or does what the sandbox does not allow.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as failure:  # a template is a program that can raise any exception
            raise _refusal(failure, "messages that the template accepts") from failure
        return str(text)


def _refusal(failure: Exception, expected: str) -> TokenizerError:
    return TokenizerError(f"the chat template: {str(failure) or type(failure).__name__}", expected=expected)


_MOST_ITEMS, _MOST_BITS = 1 << 20, 1 << 12
"""Limits of the result of `*` and `**`: its characters or items, or the bits of a number."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no product or power exhausts the memory: `'a' * 10 ** 10` would take 10 GB.

    A template can still be slow, or build a large text in a loop or with the width of a format. Only a separate
    process with limits of memory and time would prevent that.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: _Value, right: _Value) -> _Value:
        if _is_too_large(operator, left, right):
            raise jinja2.exceptions.SecurityError(f"the result of `{operator}` is too large")
        return super().call_binop(context, operator, left, right)


def _is_too_large(operator: str, left: _Value, right: _Value) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return bits > _MOST_BITS
    items, times = (right, left) if isinstance(left, int) else (left, right)
    return isinstance(items, Sized) and isinstance(times, int) and len(items) * times > _MOST_ITEMS


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    environment.globals["namespace"] = _namespace
    return environment


def _to_json(
    value: _Value,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialise `value` as JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _namespace(*values: _Value, **named: _Value) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*values, **named).items():
        namespace[name] = value
    return namespace


def _now(date_format: str) -> str:
    return datetime.datetime.now().strftime(date_format)
