"""The plain toy: all of its 22,528 prompts."""

from __future__ import annotations

import math
import re

from coremill.data.tool_calls import fits, parse
from coremill.data.toy import REPLIES, TOOLS, toy

GRAMMAR = toy()
QUESTIONS = [GRAMMAR.question(index) for index in range(GRAMMAR.size)]


def test_every_prompt_is_different_and_looks_like_a_sentence() -> None:
    assert len({question.prompt for question in QUESTIONS}) == len(QUESTIONS) == 22_528
    for question in QUESTIONS:
        assert re.fullmatch(r"[A-Z]([^ ]| (?! ))*[?.]", question.prompt), question.prompt


def test_an_action_contains_the_arguments_of_its_call() -> None:
    spelled = {True: "on", False: "off"}
    actions = [question for question in QUESTIONS if question.topic in TOOLS]
    assert len(actions) == 20_480
    for question in actions:
        (answer,) = question.teacher.answers
        call = parse(answer)
        assert call is not None
        assert call.name == question.topic
        assert fits(call, TOOLS)
        words = re.findall(r"\w+", question.prompt)
        for value in call.args.values():
            assert (spelled[value] if isinstance(value, bool) else str(value)) in words


def test_small_talk_has_a_reply() -> None:
    talk = [question for question in QUESTIONS if question.topic in REPLIES]
    assert len(talk) == 2_048
    for question in talk:
        assert set(question.teacher.answers) == set(REPLIES[question.topic])
        assert math.fsum(question.teacher.answers.values()) == 1


def test_every_answer_is_listed() -> None:
    found = {answer for question in QUESTIONS for answer in question.teacher.answers}
    assert found == set(GRAMMAR.answers())
