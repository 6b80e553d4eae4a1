"""Real text to run an imported model on, the user's or that in this package.

`sources.toml` lists the origin and the licence of each text in this package.
"""

from __future__ import annotations

from pathlib import Path

from coremill.core.config import TextsConfig
from coremill.core.documents import Document, Record, read_toml
from coremill.core.errors import DatasetError
from coremill.data.texts import ChatPrompt, Text

FOLDER = Path(__file__).parent


class BundledText(Record):
    """A text in this package, in `<id>.txt`."""

    id: str
    title: str
    source: str
    licence: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.id}.txt"


class Sources(Document):
    """`sources.toml`."""

    texts: tuple[BundledText, ...]


class ChatPrompts(Document):
    """`chat_prompts.toml`."""

    prompts: tuple[str, ...]


def bundled_texts(config: TextsConfig) -> list[Text]:
    """Return the texts in this package; raises as :func:`read_text` does."""
    texts = read_toml(FOLDER / "sources.toml", Sources).texts
    return [
        Text(
            id=text.id,
            source=f"{text.title} ({text.source})",
            licence=text.licence,
            text=read_text(text.path, config),
        )
        for text in texts
    ]


def own_texts(config: TextsConfig) -> list[Text]:
    """Return the texts in the user's files; raises as :func:`read_text` does."""
    return [
        Text(id=str(path), source=str(path), licence=None, text=read_text(path, config)) for path in config.paths
    ]


def read_text(path: Path, config: TextsConfig) -> str:
    """Return at most the first `max_characters` of the text in `path`.

    Raises:
        DatasetError: the file is unreadable, not UTF-8, empty, or shorter than `min_characters`.
    """
    try:
        # Without a byte order mark, and with universal newlines.
        with Path(path).open(encoding="utf-8-sig") as file:
            text = file.read(config.max_characters)
    except OSError as failure:
        raise DatasetError(f"cannot read {path}: {failure.strerror}", expected="a text in UTF-8") from failure
    except UnicodeDecodeError as failure:
        raise DatasetError(f"{path} is not UTF-8: {failure}", expected="a text in UTF-8") from failure
    if not text.strip():
        raise DatasetError(f"{path} is empty", expected="a text in UTF-8")
    if len(text) < config.min_characters:
        raise DatasetError(
            f"{path} has {len(text)} characters",
            expected=f"at least {config.min_characters} (texts.min_characters)",
        )
    return text


def chat_prompts() -> list[ChatPrompt]:
    """Return the questions in `chat_prompts.toml`."""
    prompts = read_toml(FOLDER / "chat_prompts.toml", ChatPrompts).prompts
    return [ChatPrompt(id=f"chat-{number:02}", text=text) for number, text in enumerate(prompts, start=1)]
