"""The inputs of a comparison: prompts, unusual and random texts; and ties of greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.formats.toy_gguf import CONFIG, Toy, untrained_toy

from coremill.core.errors import DatasetError
from coremill.core.parity import MAX_RELATIVE_ERR, TokenDifference
from coremill.data.prompts import RowPrompts, TextPrompts, conversation
from coremill.data.texts import ChatPrompt, Text
from coremill.formats.parity import (
    ODD_TEXTS,
    TEXTS,
    greedy_differences,
    questions,
    random_texts,
    sequences,
    texts,
)
from coremill.model.float32 import Float32Bounds
from coremill.model.reference import Reference
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import SPECIAL_TOKENS

CONTEXT = CONFIG.max_seq_len


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return untrained_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tokenizer(toy: Toy) -> TextTokenizer:
    return TextTokenizer.of_student(toy.tokenizer)


def running_text(toy: Toy, tokenizer: TextTokenizer, lengths: list[int]) -> TextPrompts:
    """Texts with about `lengths` tokens each."""
    words = " ".join(f"{row.prompt} {row.teacher_text}" for row in toy.rows)
    found = [
        Text(id=str(number), source="here", licence=None, text=tokenizer.decode(tokenizer.encode(words)[:length]))
        for number, length in enumerate(lengths)
    ]
    return TextPrompts(found, [ChatPrompt(id="1", text="Will it rain?")], tokenizer)


# --- token ids --------------------------------------------------------------------------------------


def test_sequences_of_a_student_are_conversations(toy: Toy) -> None:
    found = sequences(toy.prompts, CONTEXT)
    assert found[0] == toy.prompts.packed(CONTEXT, 1)[0]
    assert found[1:] == [conversation(row, toy.tokenizer) for row in toy.prompts.rows]
    assert len(found) == 1 + 16


def test_conversations_longer_than_the_context_are_truncated(toy: Toy) -> None:
    assert {len(ids) for ids in sequences(toy.prompts, 5)} == {5}


def test_sequences_have_about_two_thousand_tokens(toy: Toy) -> None:
    many = RowPrompts(toy.rows * 3, toy.tokenizer, Path("answers.json"))
    count = sum(map(len, sequences(many, CONTEXT)))
    assert 2048 <= count < 2048 + CONTEXT


def test_sequences_of_texts_are_eight_parts(toy: Toy, tokenizer: TextTokenizer) -> None:
    prompts = running_text(toy, tokenizer, [1100, 1100])
    found = sequences(prompts, 4096)
    assert [len(ids) for ids in found] == [256] * 8
    assert found == prompts.packed(256, 8)
    assert {len(ids) for ids in sequences(prompts, 100)} == {100}
    assert sequences(prompts, 4096, positions=600) == found[:3]


@pytest.mark.parametrize(("lengths", "count"), [([300, 300], 2), ([600, 300], 3), ([300, 600], 2), ([900], 3)])
def test_short_texts_give_fewer_parts(toy: Toy, tokenizer: TextTokenizer, lengths: list[int], count: int) -> None:
    assert len(sequences(running_text(toy, tokenizer, lengths), 4096)) == count


def test_text_shorter_than_one_part_is_rejected(toy: Toy, tokenizer: TextTokenizer) -> None:
    with pytest.raises(DatasetError, match=r"^the text 0 has 200 tokens"):
        sequences(running_text(toy, tokenizer, [200]), 4096)


def test_beginnings_of_texts_follow_the_questions(toy: Toy, tokenizer: TextTokenizer) -> None:
    prompts = running_text(toy, tokenizer, [100, 100])
    found = questions(prompts, 64, 4)
    assert found == [prompts.chats[0].ids, *prompts.packed(32, 3)]
    assert len(questions(prompts, 64, 20)) == 1 + 6  # three of each text
    own = [toy.tokenizer.encode_prompt(row.prompt) for row in toy.prompts.rows[:3]]
    assert questions(toy.prompts, CONTEXT, 3) == own


def test_questions_that_fill_the_context_are_rejected(toy: Toy) -> None:
    with pytest.raises(DatasetError, match=r"^every question fills the context of 3 tokens"):
        questions(toy.prompts, 3, 4)


# --- greedy tokens ----------------------------------------------------------------------------------

BEST, OTHER = 3, 5


def logits_with(gap: float, *, scale: float = 10.0) -> np.ndarray:
    """Logits before each token of an answer of 3; at its second, BEST exceeds OTHER by `gap`."""
    rows = np.zeros((3, 8), np.float32)
    rows[:, BEST] = scale
    rows[1, OTHER] = scale - gap
    return rows


@pytest.fixture
def bounds(toy: Toy) -> Float32Bounds:
    """Of a model that float32 computes as exactly as most."""
    return Float32Bounds(Reference.of(toy.checkpoint), [[1, 2, 3]])


def test_greedy_tokens_of_the_checkpoint_do_not_differ(bounds: Float32Bounds) -> None:
    assert list(greedy_differences(0, [BEST] * 3, logits_with(1.0), bounds)) == []


@pytest.mark.parametrize(("gap", "is_tie"), [(0.0, True), (1e-4, True), (4e-4, False), (1.0, False)])
def test_gap_within_rounding_is_a_tie(bounds: Float32Bounds, gap: float, is_tie: bool) -> None:
    """With logits of 10, each side may have an error of 1e-4."""
    assert pytest.approx(2e-4) == 2 * MAX_RELATIVE_ERR * 10
    (found,) = greedy_differences(7, [BEST, OTHER, BEST], logits_with(gap), bounds)
    assert found == TokenDifference(
        prompt=7, place=1, token=OTHER, expected=BEST, gap=pytest.approx(gap, abs=1e-6), is_tie=is_tie
    )


def test_tokens_after_a_difference_are_compared(bounds: Float32Bounds) -> None:
    found = list(greedy_differences(0, [OTHER, BEST, 6], logits_with(0.5), bounds))
    assert [(each.place, each.token) for each in found] == [(0, OTHER), (2, 6)]


# --- texts ------------------------------------------------------------------------------------------


def test_texts_are_unusual_ones_those_of_the_run_and_random_ones(toy: Toy, tokenizer: TextTokenizer) -> None:
    for prompts in (toy.prompts, running_text(toy, tokenizer, [3000, 3000])):
        found = texts(prompts, tokenizer)
        assert len(found) == TEXTS == 1000
        assert found[: len(ODD_TEXTS)] == list(ODD_TEXTS)
        assert {"<|end|>b", " <|end|> b", "a<|end|>ab"} <= set(found)
        special = [token.content for token in tokenizer.added_tokens.values()]
        drawn = [start for start in range(TEXTS) if found[start:] == list(random_texts(TEXTS - start, special))]
        assert len(drawn) == 1
        assert drawn[0] <= 700
        own = toy.prompts.rows[0].prompt if prompts is toy.prompts else "Will it rain?"
        assert own in found


def test_random_texts_are_reproducible_and_of_many_scripts() -> None:
    found = list(random_texts(500, ["<|end|>"]))
    assert found == list(random_texts(500, ["<|end|>"]))
    assert len(set(found)) == 500
    letters = set("".join(found))
    assert sum(ord(letter) > 0xFFFF for letter in letters) > 300
    assert any(ord(letter) > 0x20000 for letter in letters)
    assert not any(0xD800 <= ord(letter) < 0xE000 for letter in letters)
    assert any("<|end|>" in text for text in found)


def test_texts_contain_every_added_token(toy: Toy, tokenizer: TextTokenizer) -> None:
    assert [token.content for token in tokenizer.added_tokens.values()] == list(SPECIAL_TOKENS)
    found = set(texts(toy.prompts, tokenizer))
    assert {f"{token}b" for token in SPECIAL_TOKENS} <= found
    assert {f"a{token}ab" for token in SPECIAL_TOKENS} <= found


def test_texts_contain_conversations_in_the_chat_format(toy: Toy, tokenizer: TextTokenizer) -> None:
    prompts = running_text(toy, tokenizer, [3000])
    assert "<|bos|><|user|>Will it rain?<|assistant|>" in texts(prompts, tokenizer)
