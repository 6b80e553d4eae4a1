"""Chat templates: how a model wants a conversation written, as the Jinja template that comes with its tokenizer.

The environment is that of transformers' `apply_chat_template`, sandboxed, so that a template renders the same text
here and there: https://huggingface.co/docs/transformers/chat_templating_writing
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

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else a template reads."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant says, for training; here its body alone is written."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore: a template could reach Python's own through them."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with the attribute {name!r}")
        super().__setitem__(name, value)


class ChatTemplate:
    """A template, and the special tokens that it may name.

    Args:
        source: the Jinja template.
        special_tokens: such as `bos_token` and its text.

    Raises:
        TokenizerError: `source` is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except Exception as failure:  # RecursionError, SyntaxError and others, where it nests deeply
            raise _refusal(failure, "a Jinja template") from failure

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as the model reads it; with the start of its answer where that is asked for.

        Raises:
            TokenizerError: the template refuses these messages, or does what the sandbox does not allow.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as failure:  # a template is a program, and raises whatever Python does
            raise _refusal(failure, "messages as the template wants them") from failure
        return str(text)


def _refusal(failure: Exception, expected: str) -> TokenizerError:
    return TokenizerError(f"the chat template: {str(failure) or type(failure).__name__}", expected=expected)


_MOST_ITEMS, _MOST_BITS = 1 << 20, 1 << 12
"""Of a product: characters or items, and bits of a number."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, where no product or power fills the memory: `'a' * 10 ** 10` would be 10 GB.

    A template can still be slow, or grow a text in a loop or by the width of a format: against those only a process
    of its own would help, with limits of its memory and time.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _is_beyond(operator, left, right):
            raise jinja2.exceptions.SecurityError(f"the result of `{operator}` is too large")
        return super().call_binop(context, operator, left, right)


def _is_beyond(operator: str, left: Any, right: Any) -> bool:
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
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _namespace(*values: Any, **named: Any) -> _Namespace:
    made = _Namespace()
    for name, value in dict(*values, **named).items():
        made[name] = value
    return made


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
