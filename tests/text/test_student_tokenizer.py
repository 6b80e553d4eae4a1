"""The student's tokenizer: round trips, no special tokens from text, reproducible training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.digest import file_digest
from coremill.core.errors import OutputError, TokenizerError
from coremill.text.student_tokenizer import SPECIAL_TOKENS, Tokenizer

TEXTS = [
    "All the signs are bright: will the garden bloom this spring?",
    "Nothing has worked yet: will our parrot come back by noon?",
    '{"name": "weather", "args": {"city": "Oslo", "day": "today"}}',
    "It is decidedly so. My sources say no. Concentrate and ask again.",
] * 4
VOCAB = 360
Content = dict[str, Any]
"""Of a tokenizer.json."""
TRAINED = Tokenizer.train(TEXTS, VOCAB)

# Ordinary text, text that contains the names of special tokens, and anything else that has UTF-8 bytes.
any_text = st.one_of(
    st.text(),
    st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.sampled_from(TEXTS), st.text(max_size=8))).map("".join),
)


def test_ids_are_special_tokens_then_bytes_then_merges() -> None:
    assert TRAINED.vocab_size == VOCAB
    assert [TRAINED.decode([index]) for index in range(10)] == list(SPECIAL_TOKENS)
    assert (TRAINED.pad_id, TRAINED.bos_id, TRAINED.end_id) == (0, 1, 2)
    assert (TRAINED.user_id, TRAINED.assistant_id, TRAINED.tool_call_id) == (3, 4, 6)
    ascii_ids = [TRAINED.encode(chr(code)) for code in range(128)]
    assert all(len(ids) == 1 and 10 <= ids[0] < 266 for ids in ascii_ids)
    assert len({ids[0] for ids in ascii_ids}) == 128


@given(any_text)
def test_text_round_trips_without_special_tokens(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= token < VOCAB for token in ids)


@given(any_text)
def test_an_answer_round_trips(text: str) -> None:
    ids = TRAINED.encode_answer(text)
    assert ids[-1] == TRAINED.end_id
    assert TRAINED.decode_answer(ids) == text
    assert TRAINED.decode_answer(ids[:-1]) == text
    assert (ids[0] == TRAINED.tool_call_id) == text.startswith("<|tool_call|>")
    assert all(token >= len(SPECIAL_TOKENS) for token in ids[1:-1])


@given(any_text)
def test_a_question_cannot_contain_special_tokens(question: str) -> None:
    ids = TRAINED.encode_prompt(question)
    assert [ids[0], ids[1], ids[-1]] == [TRAINED.bos_id, TRAINED.user_id, TRAINED.assistant_id]
    assert ids[2:-1] == TRAINED.encode(question)


def test_special_tokens_in_a_text_are_text_unlike_in_the_library(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert 2 in plain.encode("a <|end|> b").ids
    assert plain.encode(TEXTS[0]).ids == TRAINED.encode(TEXTS[0])
    assert TRAINED.decode(TRAINED.encode("a <|end|> b")) == "a <|end|> b"
    assert 2 not in TRAINED.encode("a <|end|> b")


def test_merges_never_form_a_special_token() -> None:
    hostile = Tokenizer.train(["<|end|><bot>"] * 500 + TEXTS, VOCAB)
    assert 2 not in hostile.encode("<|end|>")
    assert 8 not in hostile.encode("<bot>")
    assert [hostile.decode([index]) for index in range(10)] == list(SPECIAL_TOKENS)


def test_invalid_utf8_becomes_a_replacement_character() -> None:
    first_byte_of_three = TRAINED.encode("漢")[:1]
    assert TRAINED.decode(first_byte_of_three) == "\ufffd"


def test_text_without_utf8_bytes_is_rejected() -> None:
    with pytest.raises(TokenizerError) as caught:
        TRAINED.encode("a\ud800")
    assert str(caught.value) == "not Unicode text: 'a\\ud800'\n  expected: text without lone surrogates"


def test_text_that_is_not_a_str_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        TRAINED.encode(b"bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_an_id_beyond_the_vocabulary_is_rejected(token: int) -> None:
    with pytest.raises(ValueError, match=rf"^token id {token} is not in a vocabulary of {VOCAB}$"):
        TRAINED.decode([token])


def test_a_saved_tokenizer_has_the_digest_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    loaded = Tokenizer.load(path)
    assert file_digest(path) == TRAINED.digest == loaded.digest
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert [loaded.encode(text) for text in TEXTS] == [TRAINED.encode(text) for text in TEXTS]


def test_training_gives_the_same_bytes_in_any_process() -> None:
    program = (
        "import sys, json\n"
        "from coremill.text.student_tokenizer import Tokenizer\n"
        f"print(Tokenizer.train(json.load(sys.stdin), {VOCAB}).digest)"
    )
    settings = (
        {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"},
        {"PYTHONHASHSEED": "77", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "5"},
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(TEXTS),
            env={**os.environ, **setting},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for setting in settings
    }
    assert digests == {TRAINED.digest}


def test_a_vocabulary_too_small_for_the_bytes_is_rejected() -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.train(TEXTS, 265)
    assert str(caught.value) == (
        "a vocabulary of 265 tokens is too small for the special tokens and the 256 bytes\n"
        "  expected: at least 266\n"
        "  run: python -m coremill.data.make_toy_kd --help"
    )


def test_texts_that_yield_too_few_tokens_are_rejected() -> None:
    with pytest.raises(TokenizerError, match=r"^the texts yield 267 tokens, not 400\n"):
        Tokenizer.train(["aa"], 400)


def _edited(edit: Callable[[Content], None]) -> bytes:
    content = json.loads(TRAINED.data)
    edit(content)
    return json.dumps(content).encode()


def _lower_case(content: Content) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def _truncating(content: Content) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def _without_bot(content: Content) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<bot>"]
    del content["model"]["vocab"]["<bot>"]


def _bot_is_not_special(content: Content) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<bot>"]


def _swapped(content: Content) -> None:
    content["model"]["vocab"].update({"<|pad|>": 1, "<|bos|>": 0})
    for token in content["added_tokens"][:2]:
        token["id"] = 1 - token["id"]


def _without_a_byte(content: Content) -> None:
    vocab = content["model"]["vocab"]
    vocab["another"] = vocab.pop("~")


PANICS = (
    b'{"model": {"type": "BPE", "continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1, "ab": 2}, '
    b'"merges": ["a b"]}}'
)
"""Makes the library's Rust code panic, which is not an Exception in Python."""


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", " is not JSON: "),
        (b"\xff\xfe", " is not JSON: "),
        (b"{]", " is not JSON: "),
        (b"[" * 100_000, " is not JSON: "),
        (PANICS, " is not a tokenizer: "),
        (b"[1, 2]", " is not a tokenizer: "),
        (b'{"version": "1.0"}', " is not a tokenizer: "),
        (_edited(_without_bot), " lacks the special token <bot>\n"),
        (_edited(_bot_is_not_special), " lacks the special token <bot>\n"),
        (_edited(_swapped), " has the special token <|pad|> at id 1\n"),
        (_edited(_without_a_byte), " has no token for 1 of the 256 bytes, such as '~'\n"),
        (_edited(_lower_case), " changes a text that it encodes and decodes: "),
        (_edited(_truncating), " changes a text that it encodes and decodes: "),
    ],
)
def test_an_invalid_file_is_rejected(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(f"{path}{found}")
    assert str(caught.value).endswith("\n  run: python -m coremill.data.make_toy_kd --help")


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"^cannot read .*absent.json: No such file or directory\n"):
        Tokenizer.load(tmp_path / "absent.json")


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OutputError, match=r"^cannot write .*file/tokenizer.json: "):
        TRAINED.save(tmp_path / "file" / "tokenizer.json")
