"""Ollama's Modelfile: its parts as types, written and read as Ollama itself reads them.

The grammar is that of Ollama's own parser, and the parameters are those of its API
(https://docs.ollama.com/modelfile). Some of what Ollama lets pass is refused here too, because it does nothing, or
not what it says: a parameter given twice, one that Ollama ignores, a character that it drops, a FROM that names no
file and so would be taken for a model to download.
"""

from __future__ import annotations

import codecs
import fnmatch
import math
import mmap
import re
import stat
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from coremill.core.documents import Record
from coremill.core.errors import ModelfileError
from coremill.formats.ollama.go_template import GoTemplateError, Lines, parse_go_template

ParameterValue = bool | int | float | str

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class _Kind:
    """What a parameter may be."""

    of: type
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    """Whether `least` itself is too little."""

    def __str__(self) -> str:
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[self.of]
        if self.most < math.inf:
            return f"{name} from {self.least:g} to {self.most:g}"
        if self.least > -math.inf:
            return f"{name} above {self.least:g}" if self.above else f"{name} of at least {self.least:g}"
        return name


PARAMETERS: Mapping[str, _Kind] = {
    "num_ctx": _Kind(int, 1),
    "num_predict": _Kind(int, -2),  # -1: without end, -2: until the context is full
    "num_keep": _Kind(int, -1),
    "num_batch": _Kind(int, 1),
    "num_gpu": _Kind(int, -1),
    "main_gpu": _Kind(int, 0),
    "num_thread": _Kind(int, 0),
    "use_mmap": _Kind(bool),
    "seed": _Kind(int),
    "temperature": _Kind(float, 0),
    "top_k": _Kind(int, 0),
    "top_p": _Kind(float, 0, 1),
    "min_p": _Kind(float, 0, 1),
    "typical_p": _Kind(float, 0, 1),
    "repeat_last_n": _Kind(int, -1),  # -1: the whole context
    "repeat_penalty": _Kind(float, 0, above=True),
    "presence_penalty": _Kind(float, -2, 2),
    "frequency_penalty": _Kind(float, -2, 2),
    "stop": _Kind(str),
}
"""The parameters that Ollama takes, each with its type and range."""

_IGNORED = frozenset(
    [
        "penalize_newline",
        "low_vram",
        "f16_kv",
        "logits_all",
        "vocab_only",
        "use_mlock",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
    ]
)


class Parameter(Record):
    """A PARAMETER line.

    Raises:
        ValueError: a name that Ollama does not know, or a value that it cannot have.
    """

    name: str
    value: ParameterValue

    def __post_init__(self) -> None:
        kind = PARAMETERS.get(self.name)
        if kind is None:
            raise ValueError(_unknown(self.name))
        if not _fits(self.value, kind):
            raise ValueError(f"{self.name} is {_short(self.value)}, not {kind}")
        if bits := _too_few_bits(self.value):
            raise ValueError(f"{self.name} is {_short(self.value)}, which does not fit into {bits} bits")
        if isinstance(self.value, str) and (reason := _stop_fault(self.value)):
            raise ValueError(reason)


def _unknown(name: str) -> str:
    if name in _IGNORED:
        return f"the parameter {name!r} is deprecated: Ollama ignores it"
    return f"the parameter {name!r} is not one of {', '.join(PARAMETERS)}"


def _fits(value: ParameterValue, kind: _Kind) -> bool:
    if type(value) is not kind.of:
        return False
    if isinstance(value, str):
        return True
    return (
        (isinstance(value, int) or math.isfinite(value))
        and kind.least <= value <= kind.most
        and not (kind.above and value == kind.least)
    )


def _too_few_bits(value: ParameterValue) -> int | None:
    """The bits that Ollama has for a value, where they do not hold it: 64 for an integer, 32 for another number."""
    try:
        if isinstance(value, int):
            struct.pack("<q", value)
        elif isinstance(value, float):
            struct.pack("<f", value)
    except (struct.error, OverflowError):
        return 64 if isinstance(value, int) else 32
    return None


_HALF_TOKEN = re.compile(r"^[^\s<|]*\|>|<\|[^\s|>]*\|?$")
"""`<|end|` at the end of a stop, or `end|>` at its beginning; a whole `<|end|>` may stand there, and text by it."""


def _stop_fault(stop: str) -> str | None:
    if not stop:
        return "an empty stop would end every answer before it begins"
    if "{{" in stop or "}}" in stop:
        return f"the stop {stop!r} is a part of a template, which no answer holds"
    if _HALF_TOKEN.search(stop.strip()):
        return f"the stop {stop!r} is half of a special token"
    return None


class Message(Record):
    """A MESSAGE line: a part of the conversation that every chat begins with.

    Raises:
        ValueError: a role that Ollama does not know.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"the role {self.role!r} is not one of {', '.join(ROLES)}")


class Modelfile(Record):
    """What a Modelfile says.

    Raises:
        ValueError: no FROM, a parameter other than stop given twice, or a TEMPLATE that is none of Ollama's.
    """

    model: str
    """FROM: the GGUF file, relative to the Modelfile."""
    template: str | None = None
    """How a conversation is written, as a Go template."""
    parameters: tuple[Parameter, ...] = ()
    system: str | None = None
    """The system prompt of a conversation that has none of its own."""
    messages: tuple[Message, ...] = ()
    licenses: tuple[str, ...] = ()
    adapter: str | None = None
    """A LoRA adapter's file, relative to the Modelfile."""
    draft: str | None = None
    """The file of a small model that guesses ahead, relative to the Modelfile."""
    renderer: str | None = None
    """The name of code in Ollama that takes the template's place."""
    parser: str | None = None
    """The name of code in Ollama that reads the answers."""
    requires: str | None = None
    """The oldest version of Ollama that runs the model."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("a FROM that names nothing")
        times = Counter(parameter.name for parameter in self.parameters if parameter.name != "stop")
        if twice := [name for name, count in times.items() if count > 1]:
            raise ValueError(f"the parameter {twice[0]!r} is given twice")
        if self.template is not None:
            parse_go_template(self.template)

    def __str__(self) -> str:
        return write(self)


# --- writing ----------------------------------------------------------------------------------------


def write(modelfile: Modelfile) -> str:
    """The text of `modelfile`; :func:`parse_modelfile` gives an equal one back.

    Raises:
        ModelfileError: a text that the grammar has no way to write: Ollama drops what is not printable, such as
            U+200D, and a quoted text ends where a line ends with quotes.
    """
    lines = [f"FROM {_quoted(modelfile.model, plain=True)}"]
    for name in ("adapter", "draft", "requires", "renderer", "parser", "template", "system"):
        value = getattr(modelfile, name)
        if value is not None:
            lines.append(f"{name.upper()} {_quoted(value)}")
    lines += [f"PARAMETER {each.name} {_value_text(each.value)}" for each in modelfile.parameters]
    lines += [f"MESSAGE {each.role} {_quoted(each.content)}" for each in modelfile.messages]
    lines += [f"LICENSE {_quoted(text)}" for text in modelfile.licenses]
    return "\n".join(lines) + "\n"


def _value_text(value: ParameterValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str, *, plain: bool = False) -> str:
    """`text` in the first of the ways to write it that the grammar reads back as it was."""
    if (dropped := _dropped(text)) is not None:
        raise ModelfileError(
            f"{_point(text[dropped])} in {_short(text)}, which Ollama drops",
            expected="a text of letters, marks, digits, punctuation, symbols, spaces, tabs and line ends",
        )
    ways = [f'"{text}"', f'"""{text}"""']
    if "\n" in text or '"' in text:
        ways.reverse()
    if plain:
        ways.insert(0, text)
    for way in ways:
        scanner = _Scanner(way + "\n", "")
        if scanner.value_text() == (text, True) and scanner.place == len(way):
            return way
    raise ModelfileError(
        f"{_short(text)} has no place in a Modelfile: a quoted text ends where a line ends with its quotes",
        expected="no line that ends with quotes",
    )


def _short(value: ParameterValue) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return repr(value) if not isinstance(value, int) or abs(value) < 10**60 else "a number of more than 60 digits"


def _dropped(text: str) -> int | None:
    """Where the first character is that Ollama drops: neither white space nor what Go's strconv.IsPrint names."""
    for place, letter in enumerate(text):
        if letter not in " \t\r\n" and unicodedata.category(letter)[0] not in "LMNPS":
            return place
    return None


def _point(letter: str) -> str:
    return f"U+{ord(letter):04X}"


# --- reading ----------------------------------------------------------------------------------------

_SINGLE = {
    "from": "model",
    "template": "template",
    "system": "system",
    "adapter": "adapter",
    "draft": "draft",
    "renderer": "renderer",
    "parser": "parser",
    "requires": "requires",
}
COMMANDS = (*_SINGLE, "parameter", "message", "license")
"""Any case will do."""

_NEWLINES = "\r\n"
_BLANKS = " \t"


@dataclass(frozen=True)
class _Command:
    name: str
    argument: str
    """A parameter's name or a message's role; empty for the others."""
    value: str
    line: int
    """Where it begins, and its value too."""


class _Scanner:
    """Cuts the text of a Modelfile into commands."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where
        self.place = 0
        self.lines = Lines(text)

    def commands(self) -> Iterator[_Command]:
        while self.skip():
            line, start = self.lines.at(self.place), self.place
            name = self.letters("[A-Za-z]*").lower()
            if name not in COMMANDS:
                self.place = start
                word = self.letters(r"[^ \t\r\n]+")
                refuse(self.where, line, f"the command {_short(word)} is not one of {', '.join(COMMANDS).upper()}")
            self.blank(line, f"{name.upper()} without a value")
            argument = ""
            if name == "parameter":
                argument = self.letters(r"\w*", re.ASCII)
                self.blank(line, f"PARAMETER {argument}".rstrip() + " without a value")
            elif name == "message":
                argument = self.letters("[A-Za-z]*")
                self.blank(line, f"MESSAGE {argument}".rstrip() + " without a text")
            start = self.place
            value, closed = self.value_text()
            if (dropped := _dropped(self.text[start : self.place])) is not None:
                found = f"{_point(self.text[start + dropped])} in {name.upper()}, which Ollama drops"
                refuse(self.where, self.lines.at(start + dropped), found)
            if not closed:
                refuse(self.where, line, f"the quotes that {name.upper()} opens are not closed")
            yield _Command(name, argument, value, line)

    def skip(self) -> bool:
        """Go on to the next command, past empty lines and comments; whether there is one."""
        self.letters(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
        return self.place < len(self.text)

    def letters(self, pattern: str, flags: int = 0) -> str:
        found = re.compile(pattern, flags).match(self.text, self.place)
        self.place = found.end() if found else self.place
        return found.group() if found else ""

    def blank(self, line: int, missing: str) -> None:
        """One space or tab; what follows may begin with more of them."""
        letter = self.text[self.place : self.place + 1]
        if letter not in tuple(_BLANKS):
            at_end = letter == "" or letter in _NEWLINES
            refuse(
                self.where,
                line,
                missing if at_end else f"an unexpected {letter!r} behind {missing.split(' with')[0]}",
            )
        self.place += 1

    def value_text(self) -> tuple[str, bool]:
        """What stands up to the end of the line, or of the line that ends with the quotes that open the value.

        The second is whether those quotes are closed.
        """
        self.letters(f"[{_BLANKS}]*")
        start = self.place
        quotes = self.letters('"""|"|')
        self.place = start
        end = start
        while True:
            line = self.letters(r"[^\r\n]*")
            if line.strip(_BLANKS):
                end = self.place - (len(line) - len(line.rstrip(_BLANKS)))
            closed = end - start >= 2 * len(quotes) and self.text.endswith(quotes, start, end)
            if closed or self.place == len(self.text):
                return self.text[start + len(quotes) : end - len(quotes)], closed
            self.place += 1


def parse_modelfile(text: str, *, where: str = "Modelfile", folder: Path | None = None) -> Modelfile:
    """Read the text of a Modelfile.

    Args:
        where: its name, for errors.
        folder: where it lies: the files that it names are looked for there. None if that is not to be checked.

    Raises:
        ModelfileError: names the line and the reason.
    """
    single: dict[str, str] = {}
    parameters: list[Parameter] = []
    messages: list[Message] = []
    licenses: list[str] = []
    named: set[str] = set()
    for command in _Scanner(text, where).commands():
        try:
            if command.name == "parameter":
                parameters.append(_parameter(command, named))
                named.add(command.argument)
            elif command.name == "message":
                messages.append(Message(role=command.argument, content=command.value))
            elif command.name == "license":
                licenses.append(command.value)
            else:
                _check_single(command, single, folder)
                single[_SINGLE[command.name]] = command.value
        except GoTemplateError as failure:
            refuse(where, command.line + failure.line - 1, f"TEMPLATE: {failure.reason}", failure)
        except ValueError as failure:
            refuse(where, command.line, str(failure), failure)
    if "model" not in single:
        refuse(where, text.count("\n") + 1, "it ends without a FROM")
    return Modelfile(**single, parameters=tuple(parameters), messages=tuple(messages), licenses=tuple(licenses))


def refuse(where: str, line: int, reason: str, failure: Exception | None = None) -> NoReturn:
    """Raise the error for a line of a Modelfile."""
    raise ModelfileError(
        f"{where}, line {line}: {reason}",
        expected="a Modelfile as https://docs.ollama.com/modelfile describes it",
        run=f"python -m coremill.formats.ollama.server check {where}",
    ) from failure


_WHOLE = re.compile(r"[+-]?[0-9]+")
_DIGITS = 19
"""Of the longest number of 64 bits; Python takes no number of any length."""
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TRUTHS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


def _parameter(command: _Command, seen: AbstractSet[str]) -> Parameter:
    name, text = command.argument, command.value
    if name not in PARAMETERS:
        raise ValueError(
            _unknown(name) if name else "two blanks behind PARAMETER: Ollama takes the name to be empty"
        )
    if name != "stop" and name in seen:
        raise ValueError(f"the parameter {name!r} is given twice")
    kind = PARAMETERS[name]
    value: ParameterValue = text
    if kind.of is int and _WHOLE.fullmatch(text):
        if len(text.lstrip("+-0")) > _DIGITS:
            raise ValueError(f"{name} is {_short(text)}, which does not fit into 64 bits")
        value = int(text)
    elif kind.of is float and _DECIMAL.fullmatch(text):
        value = float(text)
    elif kind.of is bool:
        value = _TRUTHS.get(text, text)
    return Parameter(name=name, value=value)


def _check_single(command: _Command, seen: Mapping[str, Any], folder: Path | None) -> None:
    name, value = command.name, command.value
    if _SINGLE[name] in seen:
        raise ValueError(f"a second {name.upper()}")
    if name == "template":
        parse_go_template(value)
    elif not value and name != "system":
        raise ValueError(f"{name.upper()} without a value")
    elif name == "requires" and not re.fullmatch(r"v?[0-9]+(\.[0-9]+){0,2}([-+][0-9A-Za-z.+-]+)?", value):
        raise ValueError(f"REQUIRES {value!r}, which is no version such as 0.14.0")
    elif name in ("from", "adapter", "draft") and folder is not None:
        try:
            _check_file(name, value, folder / Path(value).expanduser())
        except OSError as failure:
            raise ValueError(f"{name.upper()} names {_short(value)}: {failure.strerror}") from failure
        except RuntimeError as failure:  # of Path.expanduser
            raise ValueError(f"{name.upper()} names {_short(value)}, the folder of an unknown user") from failure


_MODEL_FILES = {
    "from": (
        *("model*.safetensors", "consolidated*.safetensors", "pytorch_model*.bin", "consolidated*.pth"),
        *("*.gguf", "*.bin"),
    ),
    "adapter": ("*.safetensors", "*.gguf", "*.bin"),
    "draft": ("*.safetensors", "*.gguf", "*.bin"),
}
"""What Ollama looks for in a folder."""


def _check_file(name: str, value: str, path: Path) -> None:
    """Look at what FROM, ADAPTER or DRAFT names.

    Raises:
        ValueError: it is not there, or holds no model.
        OSError: it cannot be read.
    """
    command = f"{name.upper()} names {_short(value)}"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        more = ": Ollama would take it for the name of a model to download" if name == "from" else ""
        raise ValueError(f"{command}, and there is no {path}{more}") from None
    if stat.S_ISDIR(mode):
        patterns = _MODEL_FILES[name]
        if not any(fnmatch.fnmatchcase(file.name, pattern) for file in path.iterdir() for pattern in patterns):
            raise ValueError(f"{command}, a folder with none of {', '.join(patterns)}")
    elif not stat.S_ISREG(mode):
        raise ValueError(f"{command}, which is neither a file nor a folder")
    elif fault := _gguf_fault(path):
        raise ValueError(f"{command}, which {fault}")


def _gguf_fault(path: Path) -> str | None:
    """Why the file is no GGUF file with a whole header; the weights behind it are not looked for."""
    if path.stat().st_size == 0:
        return "is empty"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            return f"is no GGUF file: it begins with {data[:4]!r}"
        try:
            return _header_fault(_GgufHeader(data))
        except (struct.error, OverflowError):  # read behind the end
            return f"is truncated: its {len(data)} bytes end within its header"


class _GgufHeader:
    """Goes through the header of a GGUF file without numpy.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    sizes_bytes: ClassVar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    """Of a value of metadata, by its type."""
    string, array = 8, 9

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 4

    def number(self, code: str) -> int:
        value: int = struct.unpack_from(code, self.data, self.place)[0]
        self.place += struct.calcsize(code)
        return value

    def skip_text(self) -> None:
        size_bytes = self.number("<Q")
        self.place += size_bytes

    def skip_value(self) -> int | None:
        """The value's type where the format has no such one."""
        kind, length = self.number("<I"), 1
        if kind == self.array:
            kind, length = self.number("<I"), self.number("<Q")
        if kind == self.string:
            for _ in range(length):
                self.skip_text()
        elif kind in self.sizes_bytes:
            self.place += length * self.sizes_bytes[kind]
        else:
            return kind
        return None


def _header_fault(header: _GgufHeader) -> str | None:
    if (version := header.number("<I")) not in (2, 3):
        return f"is of GGUF version {version}"
    n_tensors, n_values = header.number("<Q"), header.number("<Q")
    for _ in range(n_values):
        header.skip_text()
        if (kind := header.skip_value()) is not None:
            return f"is damaged: it has metadata of type {kind}"
    for _ in range(n_tensors):
        header.skip_text()
        n_dims = header.number("<I")
        header.place += 8 * n_dims
        header.number("<I")  # type
        header.number("<Q")  # offset
    if header.place > len(header.data):
        raise struct.error  # the last thing skipped ends behind the file
    return None


def decode_modelfile(data: bytes, *, where: str) -> str:
    """The text that the bytes of a Modelfile spell: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ModelfileError: they are neither.
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as failure:
        refuse(where, data.count(b"\n", 0, failure.start) + 1, f"no text: {failure.reason}", failure)
