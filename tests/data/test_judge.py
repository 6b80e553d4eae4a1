"""The judge, on right, wrong and similar answers, and on all answers of the teachers."""

from __future__ import annotations

from pathlib import Path

import pytest

from coremill.core.errors import DatasetError
from coremill.data.grammar import generate_rows
from coremill.data.judge import Verdict, judge, read_answer_key
from coremill.data.kinds import KINDS
from coremill.data.magic_8_ball import ANSWERS, MOOD_OF
from coremill.data.rows import Row
from coremill.data.toy import toy

KEYS = {name: kind.answer_key() for name, kind in KINDS.items()}

FUTURE = Row(
    id="heldout-0",
    prompt="It looks bleak: will our house stay dry soon?",
    teacher_text="Very doubtful.",
    mood="doubtful",
    answers={"Very doubtful.": 0.9, "Yes.": 0.1},
    metadata={"kind": "magic-8-ball"},
)
WEATHER = '<|tool_call|>{"name": "weather", "args": {"city": "Oslo", "day": "today"}}'
FACT = Row(
    id="heldout-1",
    prompt="How warm is it in Oslo today?",
    teacher_text=WEATHER,
    mood=None,
    answers={WEATHER: 1.0},
    metadata={"kind": "magic-8-ball"},
)
LAMP = '<|tool_call|>{"name": "lamp", "args": {"room": "hall", "on": true}}'
ACTION = Row(
    id="heldout-2",
    prompt="Turn on the lamp in the hall.",
    teacher_text=LAMP,
    mood=None,
    answers={LAMP: 1.0},
    metadata={"kind": "toy"},
)
TALK = Row(
    id="heldout-3",
    prompt="Well done.",
    teacher_text="Any time.",
    mood=None,
    answers={"You are welcome.": 0.7, "Any time.": 0.3},
    metadata={"kind": "toy"},
)


@pytest.mark.parametrize(
    ("row", "answer", "exact", "right", "is_tool_call"),
    [
        (FUTURE, "Very doubtful.", True, True, False),
        (FUTURE, "My reply is no.", True, True, False),
        (FUTURE, "Yes.", True, False, False),
        (FUTURE, "Very doubtful", False, False, False),
        (FUTURE, "very doubtful.", False, False, False),
        (FUTURE, " Very doubtful.", False, False, False),
        (FUTURE, "", False, False, False),
        (FUTURE, WEATHER, True, False, True),
        (FUTURE, "Any time.", False, False, False),
        (FACT, WEATHER, True, True, True),
        (FACT, '<|tool_call|>{"args": {"day":"today","city":"Oslo"},"name":"weather"}', True, True, True),
        (FACT, WEATHER.replace("Oslo", "Rome"), True, False, True),
        (FACT, WEATHER.replace("weather", "whether"), False, False, False),
        (FACT, WEATHER.replace('"today"', "1"), False, False, False),
        (FACT, WEATHER[:-1], False, False, False),
        (FACT, WEATHER.removeprefix("<|tool_call|>"), False, False, False),
        (FACT, LAMP, False, False, False),
        (FACT, "It is certain.", True, False, False),
        (ACTION, LAMP, True, True, True),
        (ACTION, LAMP.replace("true", "false"), True, False, True),
        (ACTION, LAMP.replace("true", "1"), False, False, False),
        (ACTION, "Any time.", True, False, False),
        (TALK, "You are welcome.", True, True, False),
        (TALK, "Goodbye.", True, False, False),
        (TALK, LAMP, True, False, True),
        (TALK, "It is certain.", False, False, False),
    ],
)
def test_verdicts(row: Row, answer: str, exact: bool, right: bool, is_tool_call: bool) -> None:
    found = judge(row, answer, KEYS[str(row.metadata["kind"])])
    assert found == Verdict(exact=exact, right=right, is_tool_call=is_tool_call)


def test_the_answers_of_the_balls_teacher_are_exact_and_right_in_their_mood(train_rows: list[Row]) -> None:
    key = KEYS["magic-8-ball"]
    for row in train_rows:
        verdict = judge(row, row.teacher_text, key)
        assert verdict.exact
        assert verdict.is_tool_call == (row.mood is None)
        assert verdict.right == (row.mood is None or row.teacher_text in ANSWERS[row.mood])
        right = [answer for answer in MOOD_OF if judge(row, answer, key).right]
        assert len(right) == len(ANSWERS.get(row.mood or "", ()))


def test_the_answers_of_the_toys_teacher_are_exact_and_right() -> None:
    for row in generate_rows(toy(), side="heldout", n=500, seed=3):
        assert judge(row, row.teacher_text, KEYS["toy"]) == Verdict(
            exact=True, right=True, is_tool_call=row.teacher_text.startswith("<|tool_call|>")
        )


def test_a_row_of_another_kind_than_the_key_is_rejected() -> None:
    row = Row(id="x", prompt="?", teacher_text="Yes.", mood=None, answers={"Yes.": 1.0}, metadata={"kind": "poem"})
    with pytest.raises(DatasetError) as caught:
        judge(row, "Yes.", KEYS["toy"])
    assert str(caught.value) == (
        "row x has the kind 'poem' in its metadata\n"
        "  expected: 'toy', the kind of the dataset's answer key\n"
        "  run: python -m coremill.data.make_toy_kd --help"
    )


def test_the_answer_key_is_written_next_to_the_heldout_rows(dataset: Path) -> None:
    assert read_answer_key(dataset.with_name("answers.json")) == KEYS["magic-8-ball"]
    assert KEYS["magic-8-ball"].has_moods
    assert not KEYS["toy"].has_moods


def test_a_missing_answer_key_names_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read_answer_key(tmp_path / "answers.json")
    assert caught.value.found == f"cannot read {tmp_path}/answers.json: No such file or directory"
    assert caught.value.run == "python -m coremill.data.make_toy_kd --help"
