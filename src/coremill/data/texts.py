"""What an imported model is run on: real texts, and questions to put into its chat format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from coremill.core.documents import Record
from coremill.data.lines import read_lines, write_lines

_MAKE_ONE = "nox -s texts -- --config configs/smollm2-135m.toml"


class Text(Record):
    """One continuous text.

    Raises:
        ValueError: it holds nothing but white space.
    """

    id: str
    """What reports call it; the path of a text of the user's own."""
    source: str
    """Where it was had from."""
    licence: str | None
    """None for a text of the user's own."""
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"text {self.id!r} is empty")


class ChatPrompt(Record):
    """One short question."""

    id: str
    text: str


def read_texts(path: Path) -> list[Text]:
    """The texts in `path`; a DatasetError that names file and line if it holds none, or something else."""
    return list(read_lines(path, Text, whole="a file of texts", each="text", run=_MAKE_ONE))


def read_chat_prompts(path: Path) -> list[ChatPrompt]:
    """The questions in `path`; raises as :func:`read_texts` does."""
    return list(read_lines(path, ChatPrompt, whole="a file of chat prompts", each="chat prompt", run=_MAKE_ONE))


def write_texts(path: Path, texts: Iterable[Text]) -> None:
    """Write `texts`, whole or not at all."""
    write_lines(path, texts)


def write_chat_prompts(path: Path, prompts: Iterable[ChatPrompt]) -> None:
    """Write `prompts`, whole or not at all."""
    write_lines(path, prompts)
