"""The inputs of an imported model: real texts, and questions for its chat format."""

from __future__ import annotations

from pathlib import Path

from coremill.core.documents import Record
from coremill.data.lines import read_lines

_MAKE_ONE = "nox -s texts -- --config configs/smollm2-135m.toml"


class Text(Record):
    """One continuous text.

    Raises:
        ValueError: the text is empty or only white space.
    """

    id: str
    """Its name in reports; the path of a user's text."""
    source: str
    """Its origin."""
    licence: str | None
    """None for a user's text."""
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"text {self.id!r} is empty")


class ChatPrompt(Record):
    """One short question."""

    id: str
    text: str


def read_texts(path: Path) -> list[Text]:
    """Return the texts in `path`; raises as :func:`coremill.data.lines.read_lines` does."""
    return list(read_lines(path, Text, whole="a file of texts", each="text", run=_MAKE_ONE))


def read_chat_prompts(path: Path) -> list[ChatPrompt]:
    """Return the questions in `path`; raises as :func:`read_texts` does."""
    return list(read_lines(path, ChatPrompt, whole="a file of chat prompts", each="chat prompt", run=_MAKE_ONE))
