"""The Magic 8 Ball: the questions of its grammar, and its teacher."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter

import pytest

from coremill.data.grammar import Permutation
from coremill.data.magic_8_ball import ANSWERS, MOOD_OF, TOOLS, TOPICS, magic_8_ball, teacher_for
from coremill.data.rows import MOODS, Row
from coremill.data.teacher import AnswerTrie
from coremill.data.tool_calls import fits, parse
from coremill.text.student_tokenizer import Tokenizer

GRAMMAR = magic_8_ball()
ORDER = Permutation(GRAMMAR.size, "sample")
SAMPLE = [GRAMMAR.question(ORDER(index)) for index in range(20_000)]


def test_the_classic_answers() -> None:
    # The original has ten affirmative, five non-committal and five negative answers.
    assert {mood: len(answers) for mood, answers in ANSWERS.items()} == {"hopeful": 10, "unclear": 5, "doubtful": 5}
    assert len(MOOD_OF) == 20
    assert set(ANSWERS) == set(MOODS)


def test_every_question_is_different() -> None:
    assert GRAMMAR.size == 1_152_000
    seen = {
        hashlib.blake2b(GRAMMAR.question(index).prompt.encode(), digest_size=8).digest()
        for index in range(GRAMMAR.size)
    }
    assert len(seen) == GRAMMAR.size


def test_one_question_in_six_asks_for_a_fact() -> None:
    share = sum(question.mood is None for question in SAMPLE) / len(SAMPLE)
    assert share == pytest.approx(1 / 6, abs=0.01)
    moods = Counter(question.mood for question in SAMPLE if question.mood)
    assert {mood: round(count / sum(moods.values()), 1) for mood, count in moods.items()} == dict.fromkeys(
        MOODS, 0.3
    )


def test_the_opening_words_determine_the_mood() -> None:
    moods: dict[str, set[str]] = {}
    for question in SAMPLE:
        if question.mood:
            moods.setdefault(question.prompt.split(" will ")[0], set()).add(question.mood)
    assert len(moods) == 24
    assert all(len(found) == 1 for found in moods.values())


def test_the_words_determine_the_topic() -> None:
    nouns = Counter(noun for names, _ in TOPICS.values() for noun in names)
    events = Counter(event for _, names in TOPICS.values() for event in names)
    assert set(nouns.values()) == set(events.values()) == {1}
    for question in SAMPLE:
        if question.mood:
            names, events_of = TOPICS[question.topic]
            assert any(f" {noun} {event} " in question.prompt for noun in names for event in events_of)


def test_a_question_of_fact_contains_the_arguments_of_its_call() -> None:
    spelled = {True: "on", False: "off"}
    for question in SAMPLE:
        if question.mood is None:
            (answer,) = question.teacher.answers
            call = parse(answer)
            assert call is not None
            assert fits(call, TOOLS)
            assert call.name == question.topic
            words = re.findall(r"\w+", question.prompt)
            assert all(spelled.get(value, str(value)) in words for value in call.args.values())


def test_every_question_looks_like_a_sentence() -> None:
    for question in SAMPLE:
        assert re.fullmatch(r"[A-Z]([^ ]| (?! ))*[?.]", question.prompt), question.prompt
        assert "{" not in question.prompt
        assert "?" in question.prompt


@pytest.mark.parametrize("mood", MOODS)
@pytest.mark.parametrize("topic", TOPICS)
def test_a_teacher_is_a_distribution_with_94_percent_on_the_mood(mood: str, topic: str) -> None:
    shares = teacher_for(mood, topic).answers
    assert set(shares) == set(MOOD_OF)
    assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert math.fsum(shares[answer] for answer in ANSWERS[mood]) == pytest.approx(0.94, abs=1e-12)
    others = {share for answer, share in shares.items() if MOOD_OF[answer] != mood}
    assert len(others) == 1
    own = sorted((shares[answer] for answer in ANSWERS[mood]), reverse=True)
    assert own[0] >= 2 * own[1]
    assert len(set(own)) == len(own)
    assert min(own) > max(others)


def test_topics_favour_different_answers() -> None:
    garden, travel = teacher_for("hopeful", "garden").answers, teacher_for("hopeful", "travel").answers
    assert [garden[answer] for answer in ANSWERS["hopeful"][:3]] == [0.44, 0.17, 0.1]
    assert [travel[answer] for answer in ANSWERS["hopeful"][:3]] == [0.008, 0.44, 0.17]
    assert teacher_for("doubtful", "garden").answers["Don't count on it."] == 0.5
    assert teacher_for("unclear", "travel").answers["Ask again later."] == 0.5


def greedy_answer(mood: str, topic: str, tokenizer: Tokenizer) -> str:
    """Return the greedy answer of a perfect student: the most probable token at each position."""
    trie = AnswerTrie(
        (tokenizer.encode_answer(text), share) for text, share in teacher_for(mood, topic).answers.items()
    )
    path: list[int] = []
    while following := trie.next_tokens(path):
        path.append(max(following, key=lambda token: following[token]))
    return tokenizer.decode_answer(path)


def test_greedy_answers_have_the_mood_and_differ_by_topic(tokenizer: Tokenizer) -> None:
    greedy = {(mood, topic): greedy_answer(mood, topic, tokenizer) for mood in MOODS for topic in TOPICS}
    for (mood, topic), answer in greedy.items():
        shares = teacher_for(mood, topic).answers
        assert MOOD_OF[answer] == mood
        assert answer == max(shares, key=lambda text: shares[text])
    assert set(greedy.values()) == set(MOOD_OF)


def test_rows_fit_the_smallest_shape(tokenizer: Tokenizer, train_rows: list[Row], heldout_rows: list[Row]) -> None:
    lengths = [
        len(tokenizer.encode_prompt(row.prompt)) + len(tokenizer.encode_answer(row.teacher_text))
        for row in train_rows + heldout_rows
    ]
    assert max(lengths) < 80
    assert sum(length > 64 for length in lengths) / len(lengths) < 0.02
    assert sum(lengths) / len(lengths) < 40
