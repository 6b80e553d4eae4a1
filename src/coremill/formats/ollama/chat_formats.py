"""The known chat formats: the text around each message of a conversation.

A model's own format is a Jinja template, which is a program. Ollama uses Go's text/template, and in general one
cannot be translated into the other. Instead the model's template is run on a few conversations, and the known
format that writes the same texts is chosen. The golden data of the tests has what Go renders from the template of
each format.

Ollama documents two styles of template (https://docs.ollama.com/template). `{{ range .Messages }}` with .Role and
.Content is used here: it supports conversations of any length and order of roles. The older style, with .System,
.Prompt and .Response, is run once for each question and its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from coremill.core.errors import TokenizerError
from coremill.text.chat import ChatTemplate, Message


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The text before and after a message."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a conversation is written."""

    name: str
    begin: str
    """The token that begins a text."""
    turns: Mapping[str, Turn]
    """By role."""
    answer: str
    """The text that begins the model's answer."""
    stops: tuple[str, ...]
    """Texts that end an answer."""
    default_system: str | None = None
    """The system prompt of a conversation that does not begin with one."""
    trims: bool = False
    """Whether white space around a message is removed. Ollama's templates have no function for that; it is kept."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as the model reads it, with the start of its answer if `add_generation_prompt`."""
        texts = [self.begin]
        for message in self.with_default_system(messages):
            turn = self.turns[message["role"]]
            content = message["content"].strip() if self.trims else message["content"]
            texts += [turn.before, content, turn.after]
        return "".join(texts) + (self.answer if add_generation_prompt else "")

    def with_default_system(self, messages: Sequence[Message]) -> list[Message]:
        """`messages`, with the default system prompt first if they have none; Ollama does this with SYSTEM."""
        if self.default_system is None or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.default_system}, *messages]

    def go_template(self, *, begin: bool) -> str:
        """Ollama's template of the format, up to the start of an answer; without the default system prompt.

        Args:
            begin: whether it writes the token that begins a text. False if llama.cpp adds that token to every text.
        """
        roles = [
            f'if eq .Role "{role}" }}}}{turn.before}{{{{ .Content }}}}{turn.after}'
            for role, turn in self.turns.items()
        ]
        chosen = "{{ else ".join(roles)
        start = self.begin if begin else ""
        return f"{start}{{{{ range .Messages }}}}{{{{ {chosen}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def _chatml() -> ChatFormat:
    turns = {
        role: Turn(before=f"<|im_start|>{role}\n", after="<|im_end|>\n") for role in ("system", "user", "assistant")
    }
    return ChatFormat(
        name="ChatML",
        begin="",
        turns=turns,
        answer=turns["assistant"].before,
        stops=("<|im_start|>", "<|im_end|>"),
    )


def _llama3() -> ChatFormat:
    turns = {
        role: Turn(before=f"<|start_header_id|>{role}<|end_header_id|>\n\n", after="<|eot_id|>")
        for role in ("system", "user", "assistant")
    }
    return ChatFormat(
        name="Llama 3",
        begin="<|begin_of_text|>",
        turns=turns,
        answer=turns["assistant"].before,
        stops=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )


STUDENT = ChatFormat(
    name="coremill's student",
    begin="<|bos|>",
    turns={
        "system": Turn(before="<|system|>", after=""),
        "user": Turn(before="<|user|>", after=""),
        "assistant": Turn(before="<|assistant|>", after="<|end|>"),
    },
    answer="<|assistant|>",
    stops=("<|end|>",),
)
CHATML = _chatml()
LLAMA3 = _llama3()
FORMATS = (STUDENT, CHATML, LLAMA3)
"""Without the default system prompt that a model's template may add.

These are formats of models whose tokenizers can be written as GGUF: see :mod:`coremill.formats.gguf.tokenizer`.
"""


def find_chat_format(template: ChatTemplate) -> ChatFormat | None:
    """The known format that writes conversations exactly as `template` does, or None.

    The template is run; its source is not parsed. The default system prompt is what the template writes into a
    conversation that has none.
    """
    for known in FORMATS:
        for trims in (False, True):
            found = replace(known, default_system=_default_system(template, known), trims=trims)
            if _renders_same(found, template):
                return found
    return None


_QUESTION: Message = {"role": "user", "content": "Which way is north?\nI have a compass."}
_PROMPT: Message = {"role": "system", "content": "You answer in one sentence."}
_ANSWER: Message = {"role": "assistant", "content": "Where the needle points: ↑ – roughly."}
_FURTHER: Message = {"role": "user", "content": "And {south}?"}
_SPACED: Message = {"role": "user", "content": " \n Which way?\n\n"}

_CONVERSATIONS: tuple[Sequence[Message], ...] = (
    [_QUESTION],
    [_PROMPT, _QUESTION],
    [_QUESTION, _ANSWER, _FURTHER],
    [_PROMPT, _QUESTION, _ANSWER, _FURTHER],
    [_QUESTION, _ANSWER],
    [_PROMPT, _QUESTION, _ANSWER, _FURTHER, _ANSWER, _QUESTION],
    [_SPACED],
    [_QUESTION, _ANSWER, _SPACED, _ANSWER],
)


def _default_system(template: ChatTemplate, known: ChatFormat) -> str | None:
    """The system prompt that `template` writes into a conversation without one; None if it writes none."""
    system = known.turns["system"]
    text = _rendered(template, [_QUESTION], add_generation_prompt=False)
    rest = known.render([_QUESTION], add_generation_prompt=False).removeprefix(known.begin)
    if text is None:
        return None
    start, end = known.begin + system.before, system.after + rest
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        return None
    return text[len(start) : len(text) - len(end)]


def _renders_same(found: ChatFormat, template: ChatTemplate) -> bool:
    return all(
        _rendered(template, messages, add_generation_prompt=asks)
        == found.render(messages, add_generation_prompt=asks)
        for messages, asks in product(_CONVERSATIONS, (False, True))
    )


def _rendered(template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool) -> str | None:
    """The conversation as `template` writes it; None if it rejects the conversation."""
    try:
        return template.render(messages, add_generation_prompt=add_generation_prompt)
    except TokenizerError:
        return None
