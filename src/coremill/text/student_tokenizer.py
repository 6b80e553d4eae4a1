"""The byte-level BPE tokenizer: 10 special tokens, the 256 bytes, and merges; no unknown token exists.

Ids 0 to 9 are the special tokens, ids 10 to 265 the single bytes, and the rest are merges in the order in
which training found them. The file is the `tokenizer.json` of Hugging Face's `tokenizers`
(https://huggingface.co/docs/tokenizers), with GPT-2's byte alphabet and pre-tokenizer, so that other readers
of that format load it as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from coremill.core.digest import bytes_digest
from coremill.core.errors import OutputError, TokenizerError
from coremill.core.publish import write_atomic

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool_call|>",
    "<|tool_result|>",
    "<bot>",
    "<eot>",
)
"""Reserved in every tokenizer that coremill trains; a token's id is its place here. The last two open and
close a latent span."""

TOOL_CALL = "<|tool_call|>"

SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256

_MAKE_ONE = "python -m coremill.data.make_toy_kd --help"
_CACHED_ANSWERS = 4096
_PROBE = f" Ünïcode  \t\r\n 42's {TOOL_CALL} 漢字 🎱 e\u0301 \x00"
"""Text that a normalizer, a truncation or a missing byte would not give back as it was."""


class Tokenizer:
    """Text to token ids and back. Made by :meth:`train` or :meth:`load`.

    Encoding never yields a special token for anything that the text says: `<|end|>` in a question is seven
    ordinary characters. Special ids come from :meth:`encode_prompt` and :meth:`encode_answer` alone.
    """

    pad_id = SPECIAL_TOKENS.index("<|pad|>")
    bos_id = SPECIAL_TOKENS.index("<|bos|>")
    end_id = SPECIAL_TOKENS.index("<|end|>")
    user_id = SPECIAL_TOKENS.index("<|user|>")
    assistant_id = SPECIAL_TOKENS.index("<|assistant|>")
    tool_call_id = SPECIAL_TOKENS.index(TOOL_CALL)

    def __init__(self, data: bytes, *, where: str) -> None:
        """Read the tokenizer that the bytes of a `tokenizer.json` describe; `where` names them in errors.

        Raises:
            TokenizerError: not JSON, not a tokenizer, a special token missing or out of place, or a byte
                that the vocabulary cannot spell.
        """
        self._data = data
        self._backend = _parse(data, where)
        _check_vocabulary(self._backend, where)
        self._backend.encode_special_tokens = True  # special tokens spelled in a text are text
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise TokenizerError(
                f"{where} does not give a text back as it was: {self.decode(self.encode(_PROBE))!r}",
                expected=f"{_PROBE!r}, as a byte-level tokenizer without normalizer and truncation gives it",
                run=_MAKE_ONE,
            )
        self._answer_ids = functools.lru_cache(maxsize=_CACHED_ANSWERS)(self._encode_answer)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` until the vocabulary holds `vocab_size` tokens.

        The same texts in the same order give the same bytes, on any number of threads.

        Raises:
            TokenizerError: `vocab_size` does not hold the special tokens and the bytes, or the texts yield
                fewer tokens than that.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise TokenizerError(
                f"a vocabulary of {vocab_size} tokens does not hold the special tokens and the 256 bytes",
                expected=f"at least {SMALLEST_VOCAB}",
                run=_MAKE_ONE,
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        if backend.get_vocab_size() != vocab_size:
            raise TokenizerError(
                f"the texts yield {backend.get_vocab_size()} tokens, not {vocab_size}",
                expected="more text, or a smaller vocabulary",
                run=_MAKE_ONE,
            )
        return cls(backend.to_str(pretty=True).encode("utf-8") + b"\n", where="the trained tokenizer")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read the `tokenizer.json` at `path`.

        Raises:
            TokenizerError: unreadable, or not a tokenizer that coremill can use; says why.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as failure:
            raise TokenizerError(
                f"cannot read {path}: {failure.strerror}", expected="a tokenizer.json", run=_MAKE_ONE
            ) from failure
        return cls(data, where=str(path))

    def save(self, path: Path) -> None:
        """Write the tokenizer to `path`, whole or not at all; equal tokenizers give equal bytes.

        Raises:
            OutputError: `path` cannot be written.
        """
        try:
            write_atomic(path, self._data)
        except OSError as failure:
            raise OutputError(f"cannot write {path}: {failure.strerror}", expected="a writable file") from failure

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids run from 0 to one less."""
        return int(self._backend.get_vocab_size())

    @property
    def data(self) -> bytes:
        """The saved file."""
        return self._data

    @property
    def digest(self) -> str:
        """SHA-256 of the saved file, as `sha256:<hex>`."""
        return bytes_digest(self._data)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special.

        Raises:
            TokenizerError: `text` holds a lone surrogate, so it is not Unicode text and has no UTF-8 bytes.
        """
        return encode_text(self._backend, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id that the vocabulary lacks.
        """
        return decode_ids(self._backend, ids, self.vocab_size)

    def encode_prompt(self, question: str) -> list[int]:
        """`[bos, user, *question, assistant]`: what the student is given."""
        return [self.bos_id, self.user_id, *self.encode(question), self.assistant_id]

    def encode_answer(self, text: str) -> list[int]:
        """What the student should say: `text` and the end token; a leading `<|tool_call|>` becomes its id."""
        return list(self._answer_ids(text))

    def _encode_answer(self, text: str) -> tuple[int, ...]:
        if text.startswith(TOOL_CALL):
            return (self.tool_call_id, *self.encode(text.removeprefix(TOOL_CALL)), self.end_id)
        return (*self.encode(text), self.end_id)

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of an answer: the inverse of :meth:`encode_answer`; a final end token is dropped."""
        ids = list(ids)
        if ids and ids[-1] == self.end_id:
            ids.pop()
        return self.decode(ids)


def encode_text(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of `text`; nothing is put before or behind it.

    Raises:
        TokenizerError: `text` holds a lone surrogate.
    """
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    except TypeError as failure:
        # What the library raises for a str without UTF-8 bytes; for any other value it is a caller's defect.
        if isinstance(text, str):
            raise TokenizerError(
                f"not Unicode text: {text!r}", expected="text without lone surrogates"
            ) from failure
        raise


def decode_ids(backend: tokenizers.Tokenizer, ids: Sequence[int], vocab_size: int) -> str:
    """The text of `ids`, special tokens by name; a ValueError for an id beyond `vocab_size`."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is not in a vocabulary of {vocab_size}")
    return str(backend.decode(list(ids), skip_special_tokens=False))


def _parse(data: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        msgspec.json.decode(data)
        text = data.decode("utf-8")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise TokenizerError(
            f"{where} is not JSON: {failure}", expected="a tokenizer.json", run=_MAKE_ONE
        ) from failure
    return parse_backend(text, where, run=_MAKE_ONE)


def parse_backend(text: str, where: str, *, run: str | None = None) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json.

    Raises:
        TokenizerError: the library does not take it.
    """
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as failure:  # the library raises no narrower type, and its panics are not even Exceptions
        if not (isinstance(failure, Exception) or type(failure).__name__ == "PanicException"):
            raise
        raise TokenizerError(
            f"{where} is not a tokenizer: {failure}",
            expected="a tokenizer.json of Hugging Face's tokenizers",
            run=run,
        ) from failure


def _check_vocabulary(backend: tokenizers.Tokenizer, where: str) -> None:
    expected = ", ".join(f"{token} = {place}" for place, token in enumerate(SPECIAL_TOKENS))
    added = backend.get_added_tokens_decoder()
    for place, token in enumerate(SPECIAL_TOKENS):
        found = backend.token_to_id(token)
        if found is None or found not in added or not added[found].special:
            raise TokenizerError(f"{where} lacks the special token {token}", expected=expected, run=_MAKE_ONE)
        if found != place:
            raise TokenizerError(
                f"{where} has the special token {token} at id {found}", expected=expected, run=_MAKE_ONE
            )
    unspelled = [char for char in pre_tokenizers.ByteLevel.alphabet() if backend.token_to_id(char) is None]
    if unspelled:
        raise TokenizerError(
            f"{where} cannot spell {len(unspelled)} of the 256 bytes, such as {min(unspelled)!r}",
            expected="a byte-level vocabulary",
            run=_MAKE_ONE,
        )
