"""Ollama's Modelfile, from which `ollama create` makes a model of a GGUF file.

Format: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import logging
import re
import unicodedata
from pathlib import Path

from coremill.core.documents import Record
from coremill.core.errors import ModelfileError
from coremill.core.layout import modelfile
from coremill.core.publish import write_atomic
from coremill.formats.ollama.chat_formats import FORMATS, ChatFormat, find_chat_format
from coremill.text.model_tokenizer import TextTokenizer

log = logging.getLogger(__name__)


class Modelfile(Record):
    """The instructions of a Modelfile; as a string, its text.

    Raises:
        ModelfileError: from `str`, for a text that a Modelfile cannot contain. Ollama drops unprintable characters,
            such as U+200D, and ends a quoted text at the first line that ends with quotes.
    """

    model: str
    """FROM: the GGUF file, relative to the Modelfile."""
    template: str
    """TEMPLATE: the Go template that writes a conversation."""
    system: str | None
    """SYSTEM: the system prompt of a conversation that has none of its own."""
    num_ctx: int
    """Positions of the context."""
    stops: tuple[str, ...]
    """Texts that end an answer."""

    def __str__(self) -> str:
        lines = [f"FROM {self.model}", f"TEMPLATE {_quoted(self.template)}"]
        if self.system is not None:
            lines.append(f"SYSTEM {_quoted(self.system)}")
        lines.append(f"PARAMETER num_ctx {self.num_ctx}")
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in self.stops]
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """`text` in quotes, which Ollama reads back unchanged."""
    for letter in text:
        if letter not in " \t\r\n" and unicodedata.category(letter)[0] not in "LMNPS":
            raise ModelfileError(
                f"Ollama drops U+{ord(letter):04X} from {_shortened(text)}",
                expected="a text of letters, marks, digits, punctuation, symbols, spaces, tabs and line ends",
            )
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    if re.search(r'"""[ \t]*[\r\n]', text):
        raise ModelfileError(
            f"a Modelfile cannot contain {_shortened(text)}: a quoted text ends where a line ends with quotes",
            expected='no line that ends with """',
        )
    return f'"""{text}"""'


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def write_modelfile(directory: Path, gguf: str, tokenizer: TextTokenizer, *, context: int) -> Modelfile | None:
    """Write the Modelfile of the GGUF file `gguf` into `directory`, next to that file.

    The template is the tokenizer's chat format. A model without a chat template gets its prompt unchanged. The
    default system prompt becomes SYSTEM, and the texts that end an answer become stops.

    Args:
        gguf: the file's name in `directory`.
        context: `num_ctx`, in tokens.

    Returns:
        The Modelfile; None if the chat format is unknown. Then nothing is written, and a warning is logged.

    Raises:
        ModelfileError: the system prompt cannot be written.
        OutputError: the file cannot be written.
    """
    chat_format: ChatFormat | None = None
    if tokenizer.chat_template is not None:
        chat_format = find_chat_format(tokenizer.chat_template)
        if chat_format is None:
            known = ", ".join(each.name for each in FORMATS)
            log.warning("no Modelfile: the chat template writes none of the known chat formats (%s)", known)
            return None
    made = Modelfile(
        model=f"./{gguf}",
        template="{{ .Prompt }}" if chat_format is None else chat_format.go_template(begin=not tokenizer.add_bos),
        system=None if chat_format is None else chat_format.default_system,
        num_ctx=context,
        stops=() if chat_format is None else chat_format.stops,
    )
    write_atomic(modelfile(directory), str(made).encode())
    return made
