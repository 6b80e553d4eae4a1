"""Record the messages of coremltools, and sort them into harmless, compatibility, warning and error.

coremltools reports through loggers, Python warnings, progress bars on stderr, and prints. All messages are kept in
their order for `conversion.log`; none reaches the terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

import msgspec

from coremill.core.diagnostics import Notice, NoticeKind


class Message(msgspec.Struct, frozen=True):
    """One message of coremltools."""

    source: str
    """`logging:<logger>`, `warnings:<category>`, `stdout` or `stderr`."""
    level: str
    """The logging level; `WARNING` for a Python warning, empty for a stream."""
    text: str

    def __str__(self) -> str:
        return f"{self.source}{' ' + self.level if self.level else ''}: {self.text}"


class Rule(msgspec.Struct, frozen=True):
    """The kind of a known message; the first rule whose pattern matches applies."""

    pattern: str
    kind: NoticeKind
    why: str | None = None


RULES = (
    Rule(r"has not been tested with coremltools", NoticeKind.COMPATIBILITY),
    Rule(
        r"^Failed to load _?'?_?ML\w+",
        NoticeKind.HARMLESS,
        "a binding of Core ML, which only macOS has; conversion does not use it",
    ),
    Rule(
        r"^Support for converting Torch Script Models is experimental\.",
        NoticeKind.HARMLESS,
        "the program was traced, which a program loaded from a file does not show",
    ),
    Rule(
        r"^Torch var (key|value)_cache is added again\.",
        NoticeKind.HARMLESS,
        "a cache is both an input and a buffer; its contents are checked against the checkpoint",
    ),
    Rule(
        r"^Tuple detected at graph output\. This will be flattened",
        NoticeKind.HARMLESS,
        "the graph returns its outputs as a tuple; the saved outputs are checked against the contract by name",
    ),
    Rule(
        r"^Recklessly broadcast \{",
        NoticeKind.HARMLESS,
        "the converter cannot prove that two lengths are equal; verification runs the package at every length",
    ),
    Rule(r"^.+: \d+/\d+ (passes|ops)$", NoticeKind.HARMLESS, "a progress bar"),
)

_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning, SyntaxWarning)
"""Warnings for developers, which Python hides by default, and SyntaxWarning, which is only given when a module is
first compiled. They do not concern a conversion, and would make the first one differ from the next."""

_ERROR_LEVELS = ("ERROR", "CRITICAL")
_PROGRESS = re.compile(r"^(?P<what>.+?):\s+\d+%\|.*\|\s*(?P<done>\d+)/(?P<total>\d+) \[.*?(?P<unit>[a-z]+)(/s)?\]")


class Recorder:
    """Collects messages in order."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def add(self, source: str, level: str, text: str) -> None:
        if text.strip():
            self._messages.append(Message(source, level, text.strip()))

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(self._messages)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Record all log messages, warnings and output of the block, and hide them from the terminal."""
    streams = _Stream(recorder, "stdout"), _Stream(recorder, "stderr")
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [_Handler(recorder)]
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
        ):
            warnings.simplefilter("always")
            for category in _FOR_DEVELOPERS:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = _show_warning(recorder)
            yield
    finally:
        root.handlers = handlers
        for stream in streams:
            stream.finish()


def sort_messages(messages: Iterable[Message]) -> tuple[Notice, ...]:
    """Notices with the count of equal messages, in the order of each one's first message."""
    return tuple(_notice(message, count) for message, count in Counter(messages).items())


def kind_of(message: Message) -> NoticeKind:
    """The kind of a message; an unknown message is a warning."""
    return _kind_and_why(message)[0]


def as_log(messages: Iterable[Message]) -> str:
    """The text of `conversion.log`."""
    return "".join(f"{message}\n" for message in messages)


def _notice(message: Message, count: int) -> Notice:
    kind, why = _kind_and_why(message)
    return Notice(kind=kind, source=message.source, text=message.text, count=count, why=why)


def _kind_and_why(message: Message) -> tuple[NoticeKind, str | None]:
    if message.level in _ERROR_LEVELS:
        return NoticeKind.ERROR, None
    for rule in RULES:
        if re.search(rule.pattern, message.text):
            return rule.kind, rule.why
    return NoticeKind.WARNING, None


class _Handler(logging.Handler):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__(logging.WARNING)  # INFO would be a thousand lines per conversion
        self._recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        self._recorder.add(f"logging:{record.name}", record.levelname, record.getMessage())


class _Stream(io.TextIOBase):
    """Records lines. Of a progress bar, which rewrites its line, only the last state is kept, without rates."""

    def __init__(self, recorder: Recorder, source: str) -> None:
        self._recorder = recorder
        self._source = source
        self._line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._end(line)
        return len(text)

    def finish(self) -> None:
        self._end(self._line)
        self._line = ""

    def _end(self, line: str) -> None:
        last = line.rstrip("\r").rpartition("\r")[2]
        if progress := _PROGRESS.match(last):
            last = "{what}: {done}/{total} {unit}".format(**progress.groupdict())
        self._recorder.add(self._source, "", last)


def _show_warning(recorder: Recorder) -> Callable[..., None]:
    """A replacement for `warnings.showwarning`, with its signature."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        recorder.add(f"warnings:{category.__name__}", "WARNING", str(message))

    return show
