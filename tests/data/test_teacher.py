"""The token-level teacher, compared with brute force over whole answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.data.rows import Row
from coremill.data.teacher import CONTINUE, HALT, AnswerTrie, entropy, halt_labels, teacher_targets
from coremill.text.student_tokenizer import Tokenizer

END = 0

# Few tokens and short answers, so that answers share prefixes; an answer may occur twice.
answer_sets = st.lists(
    st.tuples(
        st.lists(st.integers(1, 3), max_size=4).map(lambda content: (*content, END)),
        st.floats(1e-6, 1.0),
    ),
    min_size=1,
    max_size=12,
)


def mass(answers: Sequence[tuple[Sequence[int], float]], prefix: Sequence[int]) -> float:
    return sum(share for ids, share in answers if tuple(ids[: len(prefix)]) == tuple(prefix))


@given(answer_sets)
def test_next_tokens_are_the_exact_conditionals(answers: list[tuple[tuple[int, ...], float]]) -> None:
    trie = AnswerTrie(answers)
    prefixes = {ids[:index] for ids, _ in answers for index in range(len(ids))}
    for prefix in prefixes:
        expected = {
            token: mass(answers, (*prefix, token)) / mass(answers, prefix)
            for token in range(4)
            if mass(answers, (*prefix, token)) > 0
        }
        assert trie.next_tokens(prefix) == pytest.approx(expected, rel=1e-12)
        assert math.fsum(trie.next_tokens(prefix).values()) == pytest.approx(1.0, abs=1e-12)


@given(answer_sets)
def test_the_conditionals_of_an_answer_multiply_to_its_probability(
    answers: list[tuple[tuple[int, ...], float]],
) -> None:
    trie = AnswerTrie(answers)
    total = math.fsum(share for _, share in answers)
    for ids, _ in answers:
        product = math.prod(trie.next_tokens(ids[:index])[ids[index]] for index in range(len(ids)))
        assert product == pytest.approx(mass(answers, ids) / total, rel=1e-12)
        assert trie.next_tokens(ids) == {}


@given(answer_sets, st.randoms())
def test_the_order_of_the_answers_does_not_matter(
    answers: list[tuple[tuple[int, ...], float]], random: Random
) -> None:
    shuffled = sorted(answers, key=lambda _: random.random())
    for ids, _ in answers:
        for index in range(len(ids)):
            assert AnswerTrie(answers).next_tokens(ids[:index]) == AnswerTrie(shuffled).next_tokens(ids[:index])


def test_an_answer_of_probability_0_is_ignored() -> None:
    assert AnswerTrie([((1, END), 0.0), ((2, END), 0.5)]).next_tokens(()) == {2: 1.0}


def test_a_prefix_of_no_answer_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^no answer begins with \[1, 3\]$"):
        AnswerTrie([((1, 2, END), 1.0)]).next_tokens([1, 3])


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([], "no answer has a positive probability"),
        ([((1, END), 0.0)], "no answer has a positive probability"),
        ([((1, END), -0.5)], r"the answer \[1, 0\] has the probability -0.5"),
        ([((1, END), math.nan)], r"the answer \[1, 0\] has the probability nan"),
        ([((1,), 0.5), ((1, 2), 0.5)], r"the answer \[1\] is a prefix of another one"),
        ([((), 0.5), ((1, 2), 0.5)], r"the answer \[\] is a prefix of another one"),
    ],
)
def test_an_invalid_distribution_is_rejected(answers: list[tuple[tuple[int, ...], float]], found: str) -> None:
    with pytest.raises(ValueError, match=f"^{found}$"):
        AnswerTrie(answers)


def test_targets_follow_the_sampled_answer(tokenizer: Tokenizer, train_rows: list[Row]) -> None:
    for row in train_rows[:200]:
        answer = tokenizer.encode_answer(row.teacher_text)
        targets = teacher_targets(row, tokenizer)
        assert len(targets) == len(answer)
        product = math.prod(target[token] for target, token in zip(targets, answer, strict=True))
        assert product == pytest.approx(row.answers[row.teacher_text], rel=1e-12)


def test_the_entropies_of_the_tokens_sum_to_that_of_the_answers(
    tokenizer: Tokenizer, train_rows: list[Row]
) -> None:
    # The chain rule of entropy, in which each token is weighted by the probability of its prefix.
    for row in train_rows[:50]:
        trie = AnswerTrie((tokenizer.encode_answer(text), share) for text, share in row.answers.items())
        paths = [tuple(tokenizer.encode_answer(text)) for text in row.answers]
        reached = {path[:index] for path in paths for index in range(len(path))}
        by_token = math.fsum(
            math.fsum(
                share
                for path, share in zip(paths, row.answers.values(), strict=True)
                if path[: len(prefix)] == prefix
            )
            * entropy(trie.next_tokens(prefix))
            for prefix in reached
        )
        by_answer = -math.fsum(share * math.log(share) for share in row.answers.values())
        assert by_token == pytest.approx(by_answer, abs=1e-9)


def test_entropy_is_in_nats() -> None:
    assert entropy({1: 0.5, 2: 0.5}) == pytest.approx(math.log(2), abs=1e-15)
    assert str(entropy({1: 1.0})) == "0.0"


def test_halt_starts_at_the_last_content_token() -> None:
    #                       assistant  first     second    third end
    assert halt_labels(4) == [CONTINUE, CONTINUE, CONTINUE, HALT, HALT]
    assert halt_labels(2) == [CONTINUE, HALT, HALT]
    assert halt_labels(1) == [HALT, HALT]
