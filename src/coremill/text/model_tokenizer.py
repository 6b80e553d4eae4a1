"""The tokenizer of an imported model: the files that coremill writes, or GGUF metadata.

The files are those of Hugging Face (https://huggingface.co/docs/transformers/main_classes/tokenizer):
tokenizer.json, tokenizer_config.json, generation_config.json (for the tokens that end an answer) and
chat_template.jinja. A model's own directory states the same facts in many more ways;
`coremill.formats.huggingface.tokenizer` reads those as transformers does.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import msgspec
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from coremill.core.digest import bytes_digest
from coremill.core.errors import TokenizerError
from coremill.core.plain import Plain
from coremill.core.publish import write_atomic
from coremill.text.chat import ChatTemplate
from coremill.text.student_tokenizer import SPECIAL_TOKENS, Tokenizer, decode_ids, encode_text, parse_backend

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
LEGACY = ("special_tokens_map.json", "added_tokens.json")
"""Files of older directories, which coremill does not write."""

_SETTINGS = {"tokenizer_class", "add_bos_token", "clean_up_tokenization_spaces"}
"""The keys of tokenizer_config.json that coremill writes, beside the special tokens."""
_ROLE = "_token"
"""The end of the keys of special tokens, such as `bos_token`."""
_TEXT = 1 << 31
"""An id that stands for a text in the output of a post-processor."""

T = TypeVar("T")

_STUDENT_ROLES = {"bos_token": Tokenizer.bos_id, "eos_token": Tokenizer.end_id, "pad_token": Tokenizer.pad_id}

STUDENT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' + message['content'] + eos_token -}}
{%- elif message['role'] in ['user', 'system', 'tool_result'] -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{%- else -%}
{{- raise_exception('a message of the role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
"""The chat template of a student. It renders one question and its answer as :meth:`Tokenizer.encode_prompt` and
:meth:`Tokenizer.encode_answer` encode them."""

_SHOWN = 3
"""The most tokens that an error shows."""

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The special tokens, and the ids that end an answer."""

    tokens: Mapping[str, str]
    """The text of each by role, such as `bos_token`."""
    eos_ids: tuple[int, ...]


class TextTokenizer:
    """Converts text to token ids and back for an imported model. See :meth:`load` and :meth:`from_gguf`."""

    def __init__(self, data: bytes, special: SpecialTokens, template: str | None, *, where: str) -> None:
        self.data = data
        """The contents of tokenizer.json."""
        self.where = where
        self._backend = _parse(data, where)
        self._special = special
        roles = {role: self._id_of(role, token) for role, token in special.tokens.items()}
        self.bos_id = roles.get("bos_token")
        self.eos_ids = special.eos_ids
        pad_id = roles.get("pad_token")
        # If the model declares no padding token, any id will do: the causal mask hides padding on the right.
        self.pad_id: int = pad_id if pad_id is not None else (*special.eos_ids, 0)[0]
        self.add_bos = _adds_bos(self._backend, self.bos_id, where)
        if outside := [token for token in self.eos_ids if not 0 <= token < self.vocab_size]:
            raise TokenizerError(
                f"{where}: the end token {outside[0]} is not in its vocabulary of {self.vocab_size}",
                expected="ids of its tokens",
            )
        self.chat_template = None if template is None else ChatTemplate(template, special.tokens)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read the tokenizer.json at `path` and the files next to it, as :meth:`save` writes them.

        Raises:
            TokenizerError: tokenizer.json is missing, a file is invalid, or is not written by coremill.
        """
        path = Path(path)
        try:
            data = _read(path)
        except OSError as failure:
            raise TokenizerError(
                f"cannot read {path}: {failure.strerror}", expected="a tokenizer.json, as AutoTokenizer saves it"
            ) from failure
        folder = path.parent
        for name in LEGACY:
            if (folder / name).exists():
                raise _foreign(folder / name)
        tokens = _tokens_of(folder / TOKENIZER_CONFIG)
        backend = _parse(data, str(path))
        own = backend.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
        special = SpecialTokens(tokens=tokens, eos_ids=unique_ids(own, *end_ids(folder / GENERATION_CONFIG)))
        return cls(data, special, _template_of(folder), where=str(path))

    @classmethod
    def of_student(cls, tokenizer: Tokenizer) -> TextTokenizer:
        """Return a student's tokenizer with what other programs need: special tokens and a chat template."""
        special = SpecialTokens(
            tokens={role: SPECIAL_TOKENS[token_id] for role, token_id in _STUDENT_ROLES.items()},
            eos_ids=(tokenizer.end_id,),
        )
        return cls(tokenizer.data, special, STUDENT_TEMPLATE, where="the student's tokenizer")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Plain], *, where: str) -> TextTokenizer:
        """Build the tokenizer that the `tokenizer.*` keys of a GGUF file describe.

        Raises:
            TokenizerError: its kind is not supported (the error names it), or keys are missing or invalid.
        """
        backend, special, template = _from_gguf(_GgufKeys(metadata, where))
        return cls(backend.to_str().encode("utf-8"), special, template, where=where)

    def save(self, folder: Path) -> None:
        """Write each of :meth:`files` into `folder` atomically; remove the template of another tokenizer.

        Raises:
            OutputError: a file cannot be written.
        """
        files = self.files()
        for name, data in files.items():
            write_atomic(folder / name, data)
        if CHAT_TEMPLATE not in files:
            (folder / CHAT_TEMPLATE).unlink(missing_ok=True)

    def files(self) -> dict[str, bytes]:
        """Return the contents of Hugging Face's files by name."""
        settings: dict[str, Plain] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **self._special.tokens,
        }
        ends = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template.source.encode("utf-8")}
        return {
            TOKENIZER: self.data,
            TOKENIZER_CONFIG: _json(settings),
            GENERATION_CONFIG: _json(ends),
            **template,
        }

    @functools.cached_property
    def vocab_size(self) -> int:
        """The highest id plus 1; a model's embedding has at least as many rows."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def tokens_from(self, first: int) -> str:
        """Describe the tokens with ids of at least `first`: text and id of some, and the number of the others."""
        ids = sorted((token, text) for text, token in self._backend.get_vocab().items() if token >= first)
        shown = [f"{text!r} ({token})" for token, text in ids[:_SHOWN]]
        others = [f"{len(ids) - _SHOWN} more"] if len(ids) > _SHOWN else []
        *most, last = [*shown, *others]
        return f"{', '.join(most)} and {last}" if most else last

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of the special tokens by role, such as `bos_token`, `eos_token` and `pad_token`."""
        return self._special.tokens

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """The tokens that are split off a text before anything else, by id."""
        return self._backend.get_added_tokens_decoder()

    @property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json, as `sha256:<hex>`."""
        return bytes_digest(self.data)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """A second tokenizer that recognises special tokens in a text; the setting belongs to a tokenizer."""
        backend = _parse(self.data, self.where)
        backend.encode_special_tokens = False
        return backend

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of `text`, without special tokens before or after it.

        Args:
            allow_special: whether the text of a special token is encoded as that token, as in a rendered chat. Do
                not set it for what a user wrote: without it, `<|im_end|>` is ten ordinary characters.

        Raises:
            TokenizerError: `text` contains a lone surrogate, so it is not Unicode text.
        """
        return encode_text(self._with_special if allow_special else self._backend, text)

    def normalize(self, text: str) -> str:
        """Return `text` as it is before it is split: in Unicode's NFC for some tokenizers, unchanged for others."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return decode_ids(self._backend, ids, self.vocab_size)

    def _id_of(self, role: str, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"{self.where}: its {role}, {token!r}, is not in the vocabulary",
                expected="a token of the vocabulary",
            )
        return found


def _parse(data: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise TokenizerError(
            f"{where} is not a tokenizer: {failure}", expected="a tokenizer.json of Hugging Face's tokenizers"
        ) from failure
    backend = parse_backend(text, where)
    backend.no_truncation()  # some files contain the settings of their last use
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _adds_bos(backend: tokenizers.Tokenizer, bos_id: int | None, where: str) -> bool:
    """Return whether the post-processor puts the beginning token before a text.

    Raises:
        TokenizerError: it adds other tokens.
    """
    if backend.post_processor is None:
        return False
    probe = tokenizers.Tokenizer(models.WordLevel({"text": _TEXT}, unk_token="text"))
    probe.post_processor = backend.post_processor
    found = probe.encode("text").ids
    if found == [_TEXT]:
        return False
    if bos_id is not None and found == [bos_id, _TEXT]:
        return True
    shown = " ".join("TEXT" if token == _TEXT else str(backend.id_to_token(token)) for token in found)
    raise TokenizerError(
        f"{where}: its post-processor makes `{shown}` of a text, and the bos_token is "
        f"{None if bos_id is None else backend.id_to_token(bos_id)}",
        expected="at most the bos_token before a text",
    )


def _json(value: Mapping[str, Plain]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"


def pipeline_steps(part: Mapping[str, Any] | None, folded: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, with sequences flattened.

    `trim_offsets` is omitted, since it affects only the offsets of tokens in the text, not their ids.

    Args:
        folded: the key of the steps of a sequence: `normalizers`, `pretokenizers` or `decoders`.
    """
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[folded] for step in pipeline_steps(each, folded)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]


# --- from Hugging Face's files ----------------------------------------------------------------------


_MOST_BYTES = 1 << 28
"""The largest file that is read; large tokenizers have some 10 million bytes."""


def _read(path: Path) -> bytes:
    """Return the bytes of the file at `path`; an OSError if it cannot be read."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise TokenizerError(
            f"{path} has more than {_MOST_BYTES >> 20} MiB",
            expected="a file of a tokenizer",
            run=f"ls -lL {path}",
        )
    return data


def json_object(path: Path) -> Mapping[str, Plain]:
    """Return the JSON object at `path`; an empty one if there is no such file.

    Raises:
        TokenizerError: it cannot be read, or is not a JSON object.
    """
    try:
        value = msgspec.json.decode(_read(path))
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise TokenizerError(f"cannot read {path}: {failure}", expected="a JSON object") from failure
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: found {type(value).__name__} at `$`", expected="a JSON object")
    return value


def _tokens_of(path: Path) -> dict[str, str]:
    """Return the special tokens in the tokenizer_config.json at `path`, by role."""
    settings = {key: value for key, value in json_object(path).items() if key not in _SETTINGS}
    if others := [key for key in settings if not key.endswith(_ROLE)]:
        raise _foreign(path, key=others[0])
    for role, text in settings.items():
        if not isinstance(text, str):
            raise _wrong(f"{path}: `{role}`", text, "the text of a token")
    return {role: text for role, text in settings.items() if isinstance(text, str)}


def _foreign(path: Path, *, key: str | None = None) -> TokenizerError:
    return TokenizerError(
        f"{path} is not written by coremill" + (f": it has `{key}`" if key is not None else ""),
        expected="the tokenizer that an import wrote; the import reads a model's own directory",
        run=f"coremill import {path.parent} --out model.ckpt",
    )


def end_ids(path: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer in the generation_config.json or config.json at `path`.

    Raises:
        TokenizerError: the file is invalid.
    """
    value = json_object(path).get("eos_token_id")
    if value is None:
        return ()
    found = value if isinstance(value, list) else [value]
    ids = tuple(each for each in found if _is_id(each))
    if len(ids) != len(found):
        raise _wrong(f"{path}: `eos_token_id`", value, "the id of a token, or a list of ids")
    return ids


def _wrong(where: str, value: Plain, expected: str) -> TokenizerError:
    text = json.dumps(value, ensure_ascii=False)
    return TokenizerError(f"{where} is {text if len(text) <= 80 else text[:80] + '…'}", expected=expected)


def _is_id(value: Plain) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)  # bool is a subclass of int


def unique_ids(*ids: Plain) -> tuple[int, ...]:
    """Return the ids among the arguments, each once."""
    return tuple(dict.fromkeys(each for each in ids if _is_id(each)))


def _template_of(folder: Path) -> str | None:
    path = folder / CHAT_TEMPLATE
    try:
        # Universal newlines, as transformers reads it.
        return io.TextIOWrapper(io.BytesIO(_read(path)), encoding="utf-8").read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as failure:
        raise TokenizerError(f"cannot read {path}: {failure}", expected="a Jinja template") from failure


# --- from GGUF metadata -----------------------------------------------------------------------------


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""`tokenizer.ggml.token_type`, as llama.cpp numbers them."""


class _GgufKeys:
    def __init__(self, metadata: Mapping[str, Plain], where: str) -> None:
        self.metadata = metadata
        self.where = where

    def get(self, key: str, default: Plain = None) -> Plain:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def listed(self, key: str, kind: type[T]) -> list[T]:
        value = self.get(key)
        found = [each for each in value if isinstance(each, kind)] if isinstance(value, list) else []
        if found != value:
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.{key} is missing or is not a list of {kind.__name__}",
                expected="the metadata of a tokenizer",
            )
        return found


@dataclass(frozen=True, kw_only=True)
class PreTokenization:
    """The meaning of a value of `tokenizer.ggml.pre`: how a text is split before merges apply."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...] = ()
    own_words: str | None = None
    """A pattern that replaces GPT-2's."""
    nfc: bool = False
    whole_words_first: bool = False
    """Whether a word that is a token becomes that token, without merges."""
    add_bos: bool = False
    """The default, if the file does not contain the setting."""

    @property
    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self, *, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
        words = () if self.own_words is None else (pre_tokenizers.Split(Regex(self.own_words), "isolated"),)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=not words)
        return pre_tokenizers.Sequence([*self.steps, *words, bytes_])


PRE_TOKENIZATIONS = {
    "gpt-2": PreTokenization(),
    "smollm": PreTokenization(steps=(pre_tokenizers.Digits(individual_digits=True),)),
    "qwen2": PreTokenization(own_words=_QWEN2_WORDS, nfc=True),
    "llama-bpe": PreTokenization(own_words=_LLAMA3_WORDS, whole_words_first=True, add_bos=True),
}


def _from_gguf(keys: _GgufKeys) -> tuple[tokenizers.Tokenizer, SpecialTokens, str | None]:
    kind, pre = keys.get("model"), keys.get("pre")
    rules = PRE_TOKENIZATIONS.get(pre) if isinstance(pre, str) else None
    if kind != "gpt2" or rules is None:
        raise TokenizerError(
            f"{keys.where}: a tokenizer of model {kind!r}, pre {pre!r}",
            expected=(
                f"model 'gpt2' and one of {', '.join(PRE_TOKENIZATIONS)}; or the model's Hugging Face directory"
            ),
        )
    tokens, types, merges = keys.listed("tokens", str), keys.listed("token_type", int), keys.listed("merges", str)
    if len(types) != len(tokens):
        raise TokenizerError(
            f"{keys.where}: {len(tokens)} tokens and {len(types)} types", expected="a type for each token"
        )
    backend = _byte_level_bpe(tokens, types, merges, rules, add_prefix_space=bool(keys.get("add_space_prefix")))
    backend.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {role: keys.get(f"{name}_token_id") for role, name in roles.items()}
    ids = {role: index for role, index in named.items() if _is_id(index) and 0 <= index < len(tokens)}
    special = SpecialTokens(
        tokens={role: tokens[index] for role, index in ids.items()},
        eos_ids=unique_ids(named["eos_token"], keys.get("eot_token_id"), keys.get("eom_token_id")),
    )
    if keys.get("add_bos_token", rules.add_bos) and "bos_token" in ids:
        bos = special.tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
        )
    template = keys.metadata.get("tokenizer.chat_template")
    return backend, special, template if isinstance(template, str) else None


def _byte_level_bpe(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Iterable[str],
    rules: PreTokenization,
    *,
    add_prefix_space: bool,
) -> tokenizers.Tokenizer:
    """Return the backend; unused ids, which pad the embedding, get no token."""
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False, ignore_merges=rules.whole_words_first)
    )
    if rules.normalizer is not None:
        backend.normalizer = rules.normalizer
    backend.pre_tokenizer = rules.pre_tokenizer(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend
