"""The student's byte-level BPE tokenizer: 10 special tokens, the 256 bytes, and merges. It needs no unknown token.

Ids 0 to 9 are the special tokens, ids 10 to 265 the single bytes, and the rest are merges in the order in
which training found them. The file is the `tokenizer.json` of Hugging Face's `tokenizers`
(https://huggingface.co/docs/tokenizers), with GPT-2's byte alphabet and pre-tokenizer, so that other readers
of that format can load it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from coremill.core.digest import bytes_digest
from coremill.core.errors import TokenizerError
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
"""Reserved in every tokenizer that coremill trains; the id of a token is its index here. The last two open and
close a latent span."""

TOOL_CALL = "<|tool_call|>"

SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256

_MAKE_ONE = "python -m coremill.data.make_toy_kd --help"
_CACHED_ANSWERS = 4096
_PROBE = f" Ünïcode  \t\r\n 42's {TOOL_CALL} 漢字 🎱 e\u0301 \x00"
"""Text that does not round-trip with a normalizer, a truncation or a missing byte."""


class Tokenizer:
    """Converts text to token ids and back. See :meth:`train` and :meth:`load`.

    Text never encodes to a special token: `<|end|>` in a question is seven ordinary characters. Only
    :meth:`encode_prompt` and :meth:`encode_answer` add special tokens.
    """

    pad_id = SPECIAL_TOKENS.index("<|pad|>")
    bos_id = SPECIAL_TOKENS.index("<|bos|>")
    end_id = SPECIAL_TOKENS.index("<|end|>")
    user_id = SPECIAL_TOKENS.index("<|user|>")
    assistant_id = SPECIAL_TOKENS.index("<|assistant|>")
    tool_call_id = SPECIAL_TOKENS.index(TOOL_CALL)

    def __init__(self, data: bytes, *, where: str) -> None:
        """Parse the bytes of a `tokenizer.json`; `where` names them in errors.

        Raises:
            TokenizerError: they are not JSON or not a tokenizer, a special token is missing or has another id, or
                the vocabulary cannot represent a byte.
        """
        self.data = data
        """The contents of tokenizer.json."""
        self._backend = _parse(data, where)
        _check_vocabulary(self._backend, where)
        self._backend.encode_special_tokens = True  # the text of a special token is encoded as text
        if (found := self.decode(self.encode(_PROBE))) != _PROBE:
            raise TokenizerError(
                f"{where} changes a text that it encodes and decodes: {found!r}",
                expected=f"{_PROBE!r}, as from a byte-level tokenizer without normalizer and truncation",
                run=_MAKE_ONE,
            )
        self._answer_ids = functools.lru_cache(maxsize=_CACHED_ANSWERS)(self._encode_answer)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` until the vocabulary has `vocab_size` tokens.

        The same texts in the same order give the same bytes, with any number of threads.

        Raises:
            TokenizerError: `vocab_size` is too small for the special tokens and the bytes, or the texts yield
                fewer tokens.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise TokenizerError(
                f"a vocabulary of {vocab_size} tokens is too small for the special tokens and the 256 bytes",
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
            TokenizerError: the file is unreadable, or not a tokenizer that coremill can use.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as failure:
            raise TokenizerError(
                f"cannot read {path}: {failure.strerror}", expected="a tokenizer.json", run=_MAKE_ONE
            ) from failure
        return cls(data, where=str(path))

    def save(self, path: Path) -> None:
        """Write the tokenizer to `path` atomically; equal tokenizers give equal bytes.

        Raises:
            OutputError: `path` cannot be written.
        """
        write_atomic(path, self.data)

    @property
    def vocab_size(self) -> int:
        """The number of tokens; ids are below it."""
        return self._backend.get_vocab_size()

    @property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json, as `sha256:<hex>`."""
        return bytes_digest(self.data)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of them special.

        Raises:
            TokenizerError: `text` contains a lone surrogate, so it is not Unicode text and has no UTF-8 bytes.
        """
        return encode_text(self._backend, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return decode_ids(self._backend, ids, self.vocab_size)

    def encode_prompt(self, question: str) -> list[int]:
        """Return the student's input for `question`: `[bos, user, *question, assistant]`."""
        return [self.bos_id, self.user_id, *self.encode(question), self.assistant_id]

    def encode_answer(self, text: str) -> list[int]:
        """Return the student's target: `text` and the end token; a leading `<|tool_call|>` becomes its id."""
        return list(self._answer_ids(text))

    def _encode_answer(self, text: str) -> tuple[int, ...]:
        if text.startswith(TOOL_CALL):
            return (self.tool_call_id, *self.encode(text.removeprefix(TOOL_CALL)), self.end_id)
        return (*self.encode(text), self.end_id)

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without a final end token: the inverse of :meth:`encode_answer`."""
        ids = list(ids)
        if ids and ids[-1] == self.end_id:
            ids.pop()
        return self.decode(ids)


def encode_text(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return the ids of `text`, without special tokens before or after it.

    Raises:
        TokenizerError: `text` contains a lone surrogate.
    """
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except TypeError as failure:
        # The library raises it for a str without UTF-8 bytes; any other value is a caller's defect.
        if isinstance(text, str):
            raise TokenizerError(
                f"not Unicode text: {text!r}", expected="text without lone surrogates"
            ) from failure
        raise


def decode_ids(backend: tokenizers.Tokenizer, ids: Sequence[int], vocab_size: int) -> str:
    """Return the text of `ids`, special tokens included; a ValueError for an id that is not below `vocab_size`."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is not in a vocabulary of {vocab_size}")
    return backend.decode(list(ids), skip_special_tokens=False)


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
    """Return the library's tokenizer for a tokenizer.json.

    Raises:
        TokenizerError: the library rejects it.
    """
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as failure:
        if not is_library_failure(failure):
            raise
        raise TokenizerError(
            f"{where} is not a tokenizer: {failure}",
            expected="a tokenizer.json of Hugging Face's tokenizers",
            run=run,
        ) from failure


def is_library_failure(failure: BaseException) -> bool:
    """Return whether a library raised it: tokenizers has no narrower type, and its panics are not Exceptions."""
    return isinstance(failure, Exception) or type(failure).__name__ == "PanicException"


def _check_vocabulary(backend: tokenizers.Tokenizer, where: str) -> None:
    expected = ", ".join(f"{token} = {index}" for index, token in enumerate(SPECIAL_TOKENS))
    added = backend.get_added_tokens_decoder()
    for index, token in enumerate(SPECIAL_TOKENS):
        found = backend.token_to_id(token)
        if found is None or found not in added or not added[found].special:
            raise TokenizerError(f"{where} lacks the special token {token}", expected=expected, run=_MAKE_ONE)
        if found != index:
            raise TokenizerError(
                f"{where} has the special token {token} at id {found}", expected=expected, run=_MAKE_ONE
            )
    unspelled = [char for char in pre_tokenizers.ByteLevel.alphabet() if backend.token_to_id(char) is None]
    if unspelled:
        raise TokenizerError(
            f"{where} has no token for {len(unspelled)} of the 256 bytes, such as {min(unspelled)!r}",
            expected="a byte-level vocabulary",
            run=_MAKE_ONE,
        )
