"""A tokenizer as the `tokenizer.*` metadata of a GGUF file: the inverse of :meth:`TextTokenizer.from_gguf`.

llama.cpp has no general tokenizer. It supports byte-level BPE as model `gpt2`, and selects how a text is split
before merges apply by a name alone, `pre`; :data:`coremill.text.model_tokenizer.PRE_TOKENIZATIONS` defines these
names. For a tokenizer.json with any other rule llama.cpp would only give similar ids, so that such a tokenizer is
rejected.

Two differences are accepted. Qwen's tokenizers normalise a text to NFC first, and llama.cpp does not. Next to a
code point that Unicode leaves unassigned, the two may split a text differently.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec
import tokenizers
from tokenizers import models, pre_tokenizers

from coremill.core.errors import TokenizerError, VocabularyMismatchError
from coremill.formats.gguf_file import Value
from coremill.text.model_tokenizer import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZATIONS,
    UNUSED,
    USER_DEFINED,
    PreTokenization,
    TextTokenizer,
    pipeline_steps,
)

_ROLES = {"bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}
"""The names of special tokens in tokenizer_config.json and in GGUF, except for the end tokens."""
_ENDS = ("eos", "eot", "eom")
"""llama.cpp's end tokens: of a text, of a turn, of a message. Each ends an answer."""
_BY_NAME = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"}
    | {"<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}
    | {"<end_of_utterance>", "<eos>"}
)
"""The tokens that llama.cpp takes for end tokens by their text, without a key."""
_EXPECTED = f"byte-level BPE with one of llama.cpp's pre-tokenizations: {', '.join(PRE_TOKENIZATIONS)}"

_Json = dict[str, Any]
"""An object of a tokenizer.json."""


def gguf_metadata(tokenizer: TextTokenizer, *, vocab_size: int) -> dict[str, Value]:
    """Return the `tokenizer.*` keys of a GGUF file.

    Args:
        vocab_size: rows of the embedding. Ids that the tokenizer does not use get tokens of type unused.

    Raises:
        TokenizerError: llama.cpp cannot represent the tokenizer; names what it does not support.
        VocabularyMismatchError: the tokenizer has more than `vocab_size` tokens.
    """
    if tokenizer.vocab_size > vocab_size:
        raise VocabularyMismatchError(
            f"{tokenizer.where}: {tokenizer.vocab_size} tokens, the embedding has {vocab_size} rows, without one "
            f"for {tokenizer.tokens_from(vocab_size)}",
            expected="the tokenizer that the model was trained with",
        )
    described = _Described(tokenizer)
    pre = described.pre()
    tokens, types = described.tokens(vocab_size)
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": described.merges(),
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in _special_ids(tokenizer, tokens).items()},
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
    }
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template.source
    return metadata


def _special_ids(tokenizer: TextTokenizer, tokens: Sequence[str]) -> dict[str, int]:
    if not tokenizer.eos_ids:
        raise _error(tokenizer, "no token ends an answer", "an end token: llama.cpp would take token 11 for it")
    ids = {name: tokens.index(tokenizer.special_tokens[role]) for role, name in _ROLES.items()
           if role in tokenizer.special_tokens}  # fmt: skip
    return ids | dict(zip(_ENDS, _keyed_ends(tokenizer), strict=False))


def _keyed_ends(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the end tokens that get a key; if there are too many, the first and those without a known text."""
    first, *others = tokenizer.eos_ids
    if len(others) >= len(_ENDS):
        others.sort(key=lambda token: _ends_by_name(tokenizer, token))  # stable
    return (first, *others[: len(_ENDS) - 1])


def _ends_by_name(tokenizer: TextTokenizer, token: int) -> bool:
    return tokenizer.decode([token]) in _BY_NAME


def unheld_ends(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the end tokens that a GGUF file cannot hold: neither a key nor its text makes llama.cpp stop there."""
    if not tokenizer.eos_ids:
        return ()
    keyed = _keyed_ends(tokenizer)
    return tuple(token for token in tokenizer.eos_ids if token not in keyed and not _ends_by_name(tokenizer, token))


class _Described:
    """A tokenizer.json as the `tokenizers` library writes it; older files lack some keys.

    Raises:
        TokenizerError: llama.cpp cannot represent it.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        backend = tokenizers.Tokenizer.from_str(tokenizer.data.decode("utf-8"))
        self.parts: _Json = msgspec.json.decode(backend.to_str())
        self.model: _Json = self.parts["model"]
        self._check_model()
        self._check_added()
        decoder = pipeline_steps(self.parts["decoder"], "decoders")
        if [step["type"] for step in decoder] != ["ByteLevel"]:
            raise self.error(f"the decoder {_shown(decoder)}")

    def error(self, found: str) -> TokenizerError:
        return _error(self.tokenizer, found, _EXPECTED)

    def _check_model(self) -> None:
        model = self.model
        if model["type"] != "BPE":
            raise self.error(f"a tokenizer of model {model['type']}")
        for flag in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model[flag]:
                raise self.error(f"BPE with {flag} {model[flag]!r}")
        missing = [char for char in _alphabet_of_utf8() if char not in model["vocab"]]
        if missing and model["unk_token"] is not None:
            raise self.error(f"BPE with unk_token {model['unk_token']!r}, for bytes such as {missing[0]!r}")
        if not model["merges"]:
            raise self.error("BPE without merges")

    def _check_added(self) -> None:
        for added in self.parts["added_tokens"]:
            flags = [flag for flag in ("lstrip", "rstrip", "single_word") if added[flag]]
            # Of a text in NFC, as llama.cpp needs it, a token finds the same parts before and after normalisation.
            if added["normalized"] and self.tokenizer.normalize(added["content"]) != added["content"]:
                flags.append("normalized")
            if flags:
                raise self.error(f"the added token {added['content']!r} with {flags[0]}")

    def pre(self) -> str:
        """llama.cpp's name for the way in which this tokenizer splits a text."""
        for name, rules in PRE_TOKENIZATIONS.items():
            if self._splits_as(rules):
                return name
        normalizer = pipeline_steps(self.parts["normalizer"], "normalizers")
        steps = pipeline_steps(self.parts["pre_tokenizer"], "pretokenizers")
        raise self.error(
            f"llama.cpp has no name for the normalizer {_shown(normalizer)}, the pre-tokenizer "
            f"{_shown(steps)} and ignore_merges {self.model['ignore_merges']}"
        )

    def _splits_as(self, rules: PreTokenization) -> bool:
        """Whether this tokenizer splits a text by `rules`."""
        known = tokenizers.Tokenizer(models.BPE())
        if rules.normalizer is not None:
            known.normalizer = rules.normalizer
        known.pre_tokenizer = rules.pre_tokenizer(add_prefix_space=False)
        expected = msgspec.json.decode(known.to_str())
        return bool(self.model["ignore_merges"]) == rules.whole_words_first and all(
            pipeline_steps(self.parts[part], folded) == pipeline_steps(expected[part], folded)
            for part, folded in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
        )

    def tokens(self, vocab_size: int) -> tuple[list[str], list[int]]:
        """The token of each id, and its type."""
        added = {token["content"]: token for token in self.parts["added_tokens"]}
        by_id = {token_id: token for token, token_id in self.model["vocab"].items()}
        by_id |= {token["id"]: token["content"] for token in added.values()}
        taken = set(by_id.values())
        tokens, types = [], []
        for token_id in range(vocab_size):
            token = by_id.get(token_id)
            if token is None:
                tokens.append(_unused(token_id, taken))
                types.append(UNUSED)
                continue
            tokens.append(token)
            types.append(NORMAL if token not in added else CONTROL if added[token]["special"] else USER_DEFINED)
        return tokens, types

    def merges(self) -> list[str]:
        """Each pair, separated by a space, which byte-level tokens do not contain."""
        pairs = self.model["merges"]
        if spaced := [part for pair in pairs for part in pair if " " in part]:
            raise self.error(f"a merge of {spaced[0]!r}, which contains a space")
        return [" ".join(pair) for pair in pairs]


def _error(tokenizer: TextTokenizer, found: str, expected: str) -> TokenizerError:
    return TokenizerError(f"{tokenizer.where}: {found}", expected=expected)


def _unused(token_id: int, taken: set[str]) -> str:
    """A token for an unused id, named as in llama.cpp's own conversion; tokens must be distinct."""
    token = f"[PAD{token_id}]"
    while token in taken:
        token = f"[{token}]"
    return token


def _shown(steps: Sequence[_Json]) -> str:
    return msgspec.json.encode(steps).decode() if steps else "none"


@functools.cache
def _alphabet_of_utf8() -> tuple[str, ...]:
    """GPT-2's characters for the bytes, in the order of Unicode."""
    return tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
