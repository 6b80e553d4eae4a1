"""The chat formats that are known: what stands around each message of a conversation.

A model's own format is a Jinja template, a program. Ollama wants Go's text/template, and the one cannot be
translated into the other in general. Here the model's template is run on a few conversations, and the known format
that writes the same texts is taken; :func:`go_fault` then holds the Go template that is made of it against the
model's own. Of the two forms that Ollama documents (https://docs.ollama.com/template),
`{{ range .Messages }}` with .Role and .Content is written: it holds conversations of any length and order of roles.
The older one, .System, .Prompt and .Response, is run once for each question with its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from coremill.core.errors import TokenizerError
from coremill.formats.ollama.go_template import parse_go_template

if TYPE_CHECKING:  # heavy, and only asked to render
    from coremill.text.chat import ChatTemplate, Message
    from coremill.text.model_tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What stands before and behind a message."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a conversation is written."""

    name: str
    begin: str
    """Before everything: the token that begins a text."""
    turns: Mapping[str, Turn]
    """By role."""
    answer: str
    """What the model's answer is asked for with."""
    stops: tuple[str, ...]
    """Texts that an answer does not go beyond."""
    default_system: str | None = None
    """The system prompt of a conversation that does not begin with one."""
    trims: bool = False
    """Whether white space around a message is taken off. Ollama's templates have no way to do so; it stays."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as the model reads it; with the start of its answer where that is asked for.

        Raises:
            TokenizerError: a role that the format does not have.
        """
        texts = [self.begin]
        for message in self.with_default_system(messages):
            turn = self.turns.get(message["role"])
            if turn is None:
                raise TokenizerError(
                    f"a message of the role {message['role']!r}; {self.name} has no such turn",
                    expected=f"one of {', '.join(self.turns)}",
                )
            content = message["content"].strip() if self.trims else message["content"]
            texts += [turn.before, content, turn.after]
        return "".join(texts) + (self.answer if add_generation_prompt else "")

    def with_default_system(self, messages: Sequence[Message]) -> list[Message]:
        """`messages`, begun by the default system prompt where they bring none: Ollama does so with SYSTEM."""
        first = messages[0]["role"] if messages else None
        if self.default_system is None or first == "system":
            return list(messages)
        return [{"role": "system", "content": self.default_system}, *messages]

    def go_template(self, *, begin: bool) -> str:
        """Ollama's template of the format, which asks for an answer; the default system prompt belongs into SYSTEM.

        Args:
            begin: whether it writes what begins a text: not where llama.cpp adds that token to every text.
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
"""As they are without a default system prompt, which a model's template may add.

Those whose tokenizers can be written as GGUF: see :mod:`coremill.formats.gguf.tokenizer`.
"""


def find_chat_format(tokenizer: TextTokenizer) -> ChatFormat | None:
    """The known format that writes conversations as the tokenizer's own template does, character for character.

    The template is run; its source is not looked at. A default system prompt is what it writes into a conversation
    that has none. None where no known format writes the same texts, or there is no template.
    """
    template = tokenizer.chat_template
    if template is None:
        return None
    for known in FORMATS:
        for trims in (False, True):
            found = replace(known, default_system=_default_system(template, known), trims=trims)
            if _writes_alike(found, template):
                return found
    return None


_QUESTION = {"role": "user", "content": "Which way is north?\nI have a compass."}
_PROMPT = {"role": "system", "content": "You answer in one sentence."}
_ANSWER = {"role": "assistant", "content": "Where the needle points: ↑ – roughly."}
_FURTHER = {"role": "user", "content": "And {south}?"}
_SPACED = {"role": "user", "content": " \n Which way?\n\n"}

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
    """What `template` writes as the system prompt of a conversation without one; None if it writes none."""
    system = known.turns["system"]
    text = _rendered(template, [_QUESTION], False)
    rest = known.render([_QUESTION], add_generation_prompt=False).removeprefix(known.begin)
    if text is None:
        return None
    start, end = known.begin + system.before, system.after + rest
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        return None
    return text[len(start) : len(text) - len(end)]


def _writes_alike(found: ChatFormat, template: ChatTemplate) -> bool:
    return all(
        _rendered(template, messages, asks) == _rendered(found, messages, asks)
        for messages, asks in product(_CONVERSATIONS, (False, True))
    )


def _rendered(writer: ChatTemplate | ChatFormat, messages: Sequence[Message], asks: bool) -> str | None:
    """None for messages that are refused."""
    try:
        return writer.render(messages, add_generation_prompt=asks)
    except TokenizerError:
        return None


def go_fault(source: str, known: ChatFormat, tokenizer: TextTokenizer) -> str | None:
    """Where Ollama's template `source` writes a conversation otherwise than the tokenizer's own; None if nowhere.

    Args:
        source: a Go template, which asks for an answer.
        known: what the tokenizer's own template was found to be, with the system prompt that Ollama adds.
    """
    own = tokenizer.chat_template
    if own is None:
        return None
    # llama.cpp puts the token that begins a text before every one; the template then leaves it out.
    before = tokenizer.special_tokens.get("bos_token", "") if known.begin and tokenizer.add_bos else ""
    template = parse_go_template(source)
    for messages in _CONVERSATIONS:
        if known.trims and any(message["content"] != message["content"].strip() for message in messages):
            continue
        written = before + template.render(ollama_values(known.with_default_system(messages)))
        for asks, answer in ((True, ""), (False, known.answer)):
            wanted = own.render(messages, add_generation_prompt=asks) + answer
            if written != wanted:
                return _difference(written, wanted)
    return None


def _difference(written: str, wanted: str) -> str:
    pairs = enumerate(zip(written, wanted, strict=False))
    same = next((place for place, (one, other) in pairs if one != other), min(len(written), len(wanted)))
    found, own = (repr(text[same : same + 20]) for text in (written, wanted))
    return f"behind {wanted[max(0, same - 20) : same]!r} it writes {found}, and the model's own template {own}"


def ollama_values(messages: Sequence[Message]) -> dict[str, Any]:
    """What Ollama's server gives a template for `messages`.

    Neighbours of one role become one message, and System holds the text of every system message
    (https://github.com/ollama/ollama/blob/main/template/template.go).
    """
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    system = [message["content"] for message in messages if message["role"] == "system"]
    return {"System": "\n\n".join(system), "Messages": merged, "Response": ""}
