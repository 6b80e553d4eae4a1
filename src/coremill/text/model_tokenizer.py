"""The tokenizer that comes with a model: Hugging Face's tokenizer.json and the files beside it, or GGUF metadata.

Files, in Hugging Face's own names and forms (https://huggingface.co/docs/transformers/main_classes/tokenizer):
tokenizer.json, tokenizer_config.json, generation_config.json (for the tokens that end an answer),
chat_template.jinja.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from coremill.core.digest import bytes_digest
from coremill.core.errors import TokenizerError
from coremill.core.publish import write_atomic
from coremill.text.chat import ChatTemplate
from coremill.text.student_tokenizer import SPECIAL_TOKENS, Tokenizer, decode_ids, encode_text, parse_backend

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

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
"""How a student was taught a conversation: one question and its answer are :meth:`Tokenizer.encode_prompt` and
:meth:`Tokenizer.encode_answer`."""

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, kw_only=True)
class _Special:
    """Which tokens play a part, by their text, and the ids that end an answer."""

    tokens: Mapping[str, str]
    """By role, such as `bos_token`."""
    eos_ids: tuple[int, ...]
    add_bos: bool


class TextTokenizer:
    """Text to token ids and back, as an imported model was trained. Made by :meth:`load` or :meth:`from_gguf`."""

    def __init__(self, data: bytes, special: _Special, template: str | None, *, where: str) -> None:
        self._data = data
        self.where = where
        self._backend = _parse(data, where)
        self._special = special
        roles = {role: self._id_of(role, token) for role, token in special.tokens.items()}
        self.bos_id = roles.get("bos_token")
        self.eos_ids = special.eos_ids
        pad_id = roles.get("pad_token")
        # Any id will do where the model names none: the causal mask hides what stands on the right.
        self.pad_id: int = pad_id if pad_id is not None else (*special.eos_ids, 0)[0]
        self.add_bos = special.add_bos and self.bos_id is not None
        if outside := [token for token in self.eos_ids if not 0 <= token < self.vocab_size]:
            raise TokenizerError(
                f"{where}: the end token {outside[0]} is not in its vocabulary of {self.vocab_size}",
                expected="ids of its tokens",
            )
        self.chat_template = None if template is None else ChatTemplate(template, special.tokens)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read the tokenizer.json at `path` and what stands beside it.

        Raises:
            TokenizerError: a file is missing or is not what its name says.
        """
        path = Path(path)
        try:
            data = _read(path)
        except OSError as failure:
            raise TokenizerError(
                f"cannot read {path}: {failure.strerror}", expected="a tokenizer.json, as AutoTokenizer saves it"
            ) from failure
        folder = path.parent
        settings = _settings(folder / TOKENIZER_CONFIG)
        backend = _parse(data, str(path))
        special = _special_of(folder, settings, backend)
        return cls(data, special, _template_of(folder, settings), where=str(path))

    @classmethod
    def of_student(cls, tokenizer: Tokenizer) -> TextTokenizer:
        """A student's tokenizer with what other programs need to know of it: special tokens and a chat template."""
        special = _Special(
            tokens={role: SPECIAL_TOKENS[place] for role, place in _STUDENT_ROLES.items()},
            eos_ids=(tokenizer.end_id,),
            add_bos=False,  # the template writes it
        )
        return cls(tokenizer.data, special, STUDENT_TEMPLATE, where="the student's tokenizer")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, where: str) -> TextTokenizer:
        """Rebuild the tokenizer that the `tokenizer.*` keys of a GGUF file describe.

        Raises:
            TokenizerError: of a kind that is not rebuilt here (it is named), or keys are missing.
        """
        backend, special, template = _from_gguf(_GgufKeys(metadata, where))
        return cls(backend.to_str().encode("utf-8"), special, template, where=where)

    def save(self, folder: Path) -> None:
        """Write :meth:`files` into `folder`, each whole or not at all; a template of another is removed.

        Raises:
            OutputError: one cannot be written.
        """
        files = self.files()
        for name, data in files.items():
            write_atomic(folder / name, data)
        if CHAT_TEMPLATE not in files:
            (folder / CHAT_TEMPLATE).unlink(missing_ok=True)

    def files(self) -> dict[str, bytes]:
        """Hugging Face's files, by name."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **self._special.tokens,
        }
        ends = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template.source.encode("utf-8")}
        return {
            TOKENIZER: self._data,
            TOKENIZER_CONFIG: _json(settings),
            GENERATION_CONFIG: _json(ends),
            **template,
        }

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id; a model's embedding has at least as many rows."""
        return int(max(self._backend.get_vocab(with_added_tokens=True).values())) + 1

    @property
    def data(self) -> bytes:
        """tokenizer.json."""
        return self._data

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of the tokens that play a part, by it: `bos_token`, `eos_token`, `unk_token`, `pad_token`."""
        return self._special.tokens

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """The tokens that a text is cut at before anything else, and how, by id."""
        return dict(self._backend.get_added_tokens_decoder())

    @property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json, as `sha256:<hex>`."""
        return bytes_digest(self._data)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """A second tokenizer: whether special tokens in a text count is a state of the first."""
        backend = _parse(self._data, self.where)
        backend.encode_special_tokens = False
        return backend

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`; nothing is put before or behind it.

        Args:
            allow_special: whether a special token that the text spells is that token, as in a rendered chat. What a
                user wrote is not to be trusted with that: without it, `<|im_end|>` is ten ordinary characters.

        Raises:
            TokenizerError: `text` holds a lone surrogate, so it is not Unicode text.
        """
        return encode_text(self._with_special if allow_special else self._backend, text)

    def normalize(self, text: str) -> str:
        """What `text` becomes before it is cut: Unicode's form NFC for some tokenizers, itself for others."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id that the vocabulary lacks.
        """
        return decode_ids(self._backend, ids, self.vocab_size)

    def _id_of(self, role: str, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"{self.where}: its {role}, {token!r}, is not in the vocabulary", expected="a token that it has"
            )
        return int(found)


def _parse(data: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise TokenizerError(
            f"{where} is not a tokenizer: {failure}", expected="a tokenizer.json of Hugging Face's tokenizers"
        ) from failure
    backend = parse_backend(text, where)
    backend.no_truncation()  # some files carry the settings of their last use
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _json(value: Mapping[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"


# --- from Hugging Face's files ----------------------------------------------------------------------


_MOST_BYTES = 1 << 28
"""Of a file: the largest tokenizers have some 10 million."""


def _read(path: Path) -> bytes:
    """The bytes of the file at `path`; an OSError where it cannot be read."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise TokenizerError(
            f"{path} is beyond {_MOST_BYTES >> 20} MiB", expected="the file of a tokenizer", run=f"ls -lL {path}"
        )
    return data


def _settings(path: Path) -> Mapping[str, Any]:
    """The JSON object at `path`; empty where there is no such file."""
    try:
        value = msgspec.json.decode(_read(path))
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise TokenizerError(f"cannot read {path}: {failure}", expected="a JSON object") from failure
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: found {type(value).__name__} at `$`", expected="a JSON object")
    return value


def _special_of(folder: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> _Special:
    tokens: dict[str, str] = {}
    for path, values in (
        (folder / SPECIAL_TOKENS_MAP, _settings(folder / SPECIAL_TOKENS_MAP)),
        (folder / TOKENIZER_CONFIG, settings),
    ):
        tokens |= {role: text for role in _ROLES if (text := _token_text(values.get(role), f"{path}: `{role}`"))}
    ends: tuple[int, ...] = ()
    for path in (folder / GENERATION_CONFIG, folder / "config.json"):
        if (value := _settings(path).get("eos_token_id")) is not None:
            ends = _ids(value, f"{path}: `eos_token_id`")
            break
    own = backend.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        first = backend.encode("", add_special_tokens=True).ids[:1]
        add_bos = "bos_token" in tokens and first == [backend.token_to_id(tokens["bos_token"])]
    elif not isinstance(add_bos, bool):
        raise _wrong(f"{folder / TOKENIZER_CONFIG}: `add_bos_token`", add_bos, "true or false")
    return _Special(tokens=tokens, eos_ids=_each_once(own, *ends), add_bos=add_bos)


def _wrong(where: str, value: Any, expected: str) -> TokenizerError:
    text = json.dumps(value, ensure_ascii=False)
    return TokenizerError(f"{where} is {text if len(text) <= 80 else text[:80] + '…'}", expected=expected)


def _token_text(value: Any, where: str) -> str | None:
    """A special token is its text, or an object with its `content`; null or empty where there is none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    if not (text is None or isinstance(text, str)):
        raise _wrong(where, value, "the text of a token, or an object with its `content`")
    return text


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """An id, or a list of them."""
    found = value if isinstance(value, list) else [value]
    if not all(_is_id(each) for each in found):
        raise _wrong(where, value, "the id of a token, or a list of ids")
    return tuple(found)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # which Python takes for a number


def _each_once(*ids: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(each for each in ids if _is_id(each)))


def _template_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (path := folder / CHAT_TEMPLATE).is_file():
        try:
            # As transformers reads it: whatever ends its lines.
            return io.TextIOWrapper(io.BytesIO(_read(path)), encoding="utf-8").read()
        except (OSError, UnicodeDecodeError) as failure:
            raise TokenizerError(f"cannot read {path}: {failure}", expected="a Jinja template") from failure
    given = template = settings.get("chat_template")
    if isinstance(given, list) and all(isinstance(each, Mapping) for each in given):  # several, by name
        template = next((each.get("template") for each in given if each.get("name") == "default"), None)
    if not (template is None or isinstance(template, str)):
        raise _wrong(
            f"{folder / TOKENIZER_CONFIG}: `chat_template`", given, "a template, or a list of them by `name`"
        )
    return template


# --- from GGUF metadata -----------------------------------------------------------------------------


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""`tokenizer.ggml.token_type`, as llama.cpp numbers them."""


class _GgufKeys:
    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata = metadata
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def listed(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list):
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.{key} is missing or no list", expected="the metadata of a tokenizer"
            )
        return value


@dataclass(frozen=True, kw_only=True)
class PreTokenization:
    """What `tokenizer.ggml.pre` stands for: how a text is cut before merges apply."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...] = ()
    own_words: str | None = None
    """A pattern instead of GPT-2's."""
    nfc: bool = False
    whole_words_first: bool = False
    """Whether a word that is a token is taken as it is, without merges."""
    add_bos: bool = False
    """Where the file does not say."""

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


def _from_gguf(keys: _GgufKeys) -> tuple[tokenizers.Tokenizer, _Special, str | None]:
    kind, pre = keys.get("model"), keys.get("pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZATIONS:
        raise TokenizerError(
            f"{keys.where}: a tokenizer of model {kind!r}, pre {pre!r}",
            expected=(
                f"model 'gpt2' and one of {', '.join(PRE_TOKENIZATIONS)}; or the model's Hugging Face directory"
            ),
        )
    tokens, types, merges = keys.listed("tokens"), keys.listed("token_type"), keys.listed("merges")
    if len(types) != len(tokens):
        raise TokenizerError(
            f"{keys.where}: {len(tokens)} tokens and {len(types)} types", expected="a type for each token"
        )
    rules = PRE_TOKENIZATIONS[pre]
    backend = _byte_level_bpe(tokens, types, merges, rules, add_prefix_space=bool(keys.get("add_space_prefix")))
    backend.add_tokens([_added(token, kind) for token, kind in zip(tokens, types, strict=True) if _is_added(kind)])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {role: keys.get(f"{name}_token_id") for role, name in roles.items()}
    special = _Special(
        tokens={role: tokens[index] for role, index in named.items() if _is_index(index, tokens)},
        eos_ids=_each_once(named["eos_token"], keys.get("eot_token_id"), keys.get("eom_token_id")),
        add_bos=bool(keys.get("add_bos_token", rules.add_bos)),
    )
    if special.add_bos and "bos_token" in special.tokens:
        bos = special.tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, named["bos_token"])]
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
    """Places that are unused, which pad the embedding, get no token."""
    vocabulary = {token: place for place, token in enumerate(tokens) if types[place] != UNUSED}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False, ignore_merges=rules.whole_words_first)
    )
    if rules.normalizer is not None:
        backend.normalizer = rules.normalizer
    backend.pre_tokenizer = rules.pre_tokenizer(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _is_added(kind: int) -> bool:
    return kind in (UNKNOWN, CONTROL, USER_DEFINED)


def _added(token: str, kind: int) -> AddedToken:
    return AddedToken(token, special=kind != USER_DEFINED, normalized=False)


def _is_index(value: Any, tokens: Sequence[str]) -> bool:
    return _is_id(value) and 0 <= value < len(tokens)
