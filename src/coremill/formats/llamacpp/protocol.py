"""The messages between :mod:`coremill.formats.llamacpp.process` and its worker: a JSON object on each line."""

from __future__ import annotations

import msgspec


class _Message(msgspec.Struct, kw_only=True, tag=True):
    """A message; its class is in the JSON."""


# --- to the worker ----------------------------------------------------------------------------------


class Settings(_Message):
    """The first message: the file to load, and how."""

    path: bytes
    context: int
    """Positions of the cache."""
    batch: int
    """Tokens read at once, at most."""
    threads: int


class Decode(_Message):
    """Reads tokens; the answer is :class:`Logits`."""

    ids: list[int]
    first: bool
    """Whether the cache is cleared first; otherwise the tokens follow those read before."""
    every: bool
    """Whether the logits after every token are wanted, or only those after the last one."""


class Tokenize(_Message):
    """The answer is :class:`Tokens`."""

    text: str
    begin: bool
    allow_special: bool


class DescribeVocabulary(_Message):
    """The answer is :class:`Vocabulary`."""


Request = Decode | Tokenize | DescribeVocabulary


# --- from the worker --------------------------------------------------------------------------------


class Loaded(_Message):
    """The file is loaded."""

    vocab_size: int


class Unavailable(_Message):
    """There is no usable llama.cpp; the worker ends."""

    reason: str


class Logits(_Message):
    """The bytes of the logits follow: (1 or N, V) float32."""


class Tokens(_Message):
    ids: list[int]


class Vocabulary(_Message):
    """llama.cpp's view of a file's tokens. It recognises some tokens by their names, whatever the file declares."""

    bos_id: int | None
    add_bos: bool
    """Whether a text begins with `bos_id`."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    control_ids: frozenset[int]
    """Tokens that are recognised in a text only if special tokens are allowed."""
    chat_template: str | None


class Refused(_Message):
    """llama.cpp returned an error."""

    reason: str


Answer = Loaded | Unavailable | Logits | Tokens | Vocabulary | Refused
