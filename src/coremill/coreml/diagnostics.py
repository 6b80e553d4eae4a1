"""Recording what coremltools says, and sorting it into known-harmless, compatibility, warning and error.

coremltools speaks in four voices: loggers, Python warnings, progress bars on stderr, and plain prints. All
are kept in the order in which they came, for `conversion.log`; none reaches the terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

import msgspec

from coremill.core.diagnostics import Notice, NoticeKind


class Message(msgspec.Struct, frozen=True):
    """One message as it came."""

    source: str
    """`logging:<logger>`, `warnings:<category>`, `stdout` or `stderr`."""
    level: str
    """Of logging; `WARNING` for a Python warning, empty for a stream."""
    text: str

    def __str__(self) -> str:
        return f"{self.source}{' ' + self.level if self.level else ''}: {self.text}"


class Rule(msgspec.Struct, frozen=True):
    """How a known message is sorted: the first whose pattern is found in it counts."""

    pattern: str
    kind: NoticeKind
    why: str | None = None


RULES = (
    Rule(r"has not been tested with coremltools", NoticeKind.COMPATIBILITY),
    Rule(
        r"^Failed to load _?'?_?ML\w+",
        NoticeKind.HARMLESS,
        "a binding of Core ML itself, which only macOS has; conversion does not use it",
    ),
    Rule(
        r"^Support for converting Torch Script Models is experimental\.",
        NoticeKind.HARMLESS,
        "the program was traced; one that is loaded from a file no longer says so",
    ),
    Rule(
        r"^Torch var (key|value)_cache is added again\.",
        NoticeKind.HARMLESS,
        "a cache is an input and a buffer of one name; what is written to it is checked against the checkpoint",
    ),
    Rule(
        r"^Tuple detected at graph output\. This will be flattened",
        NoticeKind.HARMLESS,
        "the graph returns its outputs as a tuple; the saved outputs are checked against the contract by name",
    ),
    Rule(
        r"^Recklessly broadcast \{",
        NoticeKind.HARMLESS,
        "the converter cannot prove that two lengths are the one T; verification runs the package at every length",
    ),
    Rule(r"^.+: \d+/\d+ (passes|ops)$", NoticeKind.HARMLESS, "a progress bar"),
)

_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning, SyntaxWarning)
"""Warnings that Python shows nobody but developers, and SyntaxWarning, which a module gives only when it is
compiled for the first time: they say nothing of a conversion, and would make the first one differ from the next."""

_ERROR_LEVELS = ("ERROR", "CRITICAL")
_PROGRESS = re.compile(r"^(?P<what>.+?):\s+\d+%\|.*\|\s*(?P<done>\d+)/(?P<total>\d+) \[.*?(?P<unit>[a-z]+)(/s)?\]")


class Recorder:
    """Messages in the order in which they came."""

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
    """Record everything that is logged, warned and printed in the block, and keep it from the terminal."""
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
    """Messages as notices, equal ones counted; in the order in which each was first seen."""
    counts: dict[Message, int] = {}
    for message in messages:
        counts[message] = counts.get(message, 0) + 1
    return tuple(_notice(message, count) for message, count in counts.items())


def kind_of(message: Message) -> NoticeKind:
    """What is not known is a warning: nothing is harmless because nobody looked at it."""
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
        super().__init__(logging.WARNING)  # below that it narrates its passes, a thousand lines a conversion
        self._recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        self._recorder.add(f"logging:{record.name}", record.levelname, record.getMessage())


class _Stream(io.TextIOBase):
    """Collects lines. A progress bar rewrites its line: only its last state is kept, without the rates."""

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
    """What replaces `warnings.showwarning`, whose signature it has."""

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
