"""Drawing without replacement: permutations, sides, and prefixes of longer datasets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.data.grammar import (
    Grammar,
    Permutation,
    Question,
    Section,
    Teacher,
    generate_rows,
    side_of,
    tool_section,
    unpack,
)


def numbered(size: int) -> Grammar:
    """Return a grammar of `size` questions, whose teacher gives two answers."""
    teacher = Teacher({"Yes.": 3, "No.": 1})
    return Grammar(
        "numbered",
        [
            Section(
                (range(size),),
                lambda number: Question(f"Is it {number}?", "number", None, teacher),
                ("Yes.", "No."),
            )
        ],
    )


@given(st.integers(1, 3000), st.text(max_size=5))
def test_a_permutation_contains_every_number_once(size: int, key: str) -> None:
    order = Permutation(size, key)
    assert sorted(order(index) for index in range(size)) == list(range(size))


def test_permutations_differ_by_key_and_have_no_pattern() -> None:
    size = 10_000
    orders = [[Permutation(size, key)(index) for index in range(100)] for key in ("a", "b")]
    assert orders[0] != orders[1]
    steps = Counter((after - before) % size for before, after in itertools.pairwise(orders[0]))
    assert max(steps.values()) <= 2


def test_the_positions_of_a_number_are_uniform() -> None:
    # The tenth of the range that contains number 0: chi-square with 9 degrees of freedom, 27.9 at p = 0.001.
    size, keys = 1000, 500
    tenths = Counter(Permutation(size, f"key {number}")(0) * 10 // size for number in range(keys))
    chi_square = sum((tenths[tenth] - keys / 10) ** 2 / (keys / 10) for tenth in range(10))
    assert chi_square < 27.9


def test_a_side_depends_only_on_the_question() -> None:
    # By hand: `printf 'Is it 13?' | sha256sum` begins with d77ec36e05c4f922, a multiple of 10 in decimal;
    # that of 'Is it 12?' begins with 401ba1cd1264caba, which ends in 8.
    assert (side_of("Is it 13?"), side_of("Is it 12?")) == ("heldout", "train")
    heldout = [number for number in range(20_000) if side_of(f"Is it {number}?") == "heldout"]
    assert 1850 < len(heldout) < 2150


def test_no_question_is_repeated_before_all_have_been_drawn() -> None:
    grammar = numbered(400)
    heldout = {f"Is it {number}?" for number in range(400) if side_of(f"Is it {number}?") == "heldout"}
    count = len(heldout)
    rows = list(generate_rows(grammar, side="heldout", n=3 * count + 5, seed=1))
    rounds = [[row.prompt for row in rows[start : start + count]] for start in range(0, 3 * count, count)]
    assert all(set(prompts) == heldout for prompts in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert [row.metadata["round"] for row in rows] == [0] * count + [1] * count + [2] * count + [3] * 5
    answers = [[row.teacher_text for row in sorted(rows[:count], key=lambda row: row.prompt)]]
    answers += [[row.teacher_text for row in sorted(rows[count : 2 * count], key=lambda row: row.prompt)]]
    assert answers[0] != answers[1]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(-5, 5))
def test_a_shorter_dataset_is_a_prefix_of_a_longer_one(n: int, more: int, seed: int) -> None:
    grammar = numbered(50)
    longer = list(generate_rows(grammar, side="train", n=n + more, seed=seed))
    assert list(generate_rows(grammar, side="train", n=n, seed=seed)) == longer[:n]
    assert len({row.id for row in longer}) == n + more


def test_another_seed_gives_another_order_of_the_same_side() -> None:
    grammar = numbered(400)
    first, second = (list(generate_rows(grammar, side="train", n=300, seed=seed)) for seed in (1, 2))
    assert [row.prompt for row in first] != [row.prompt for row in second]
    assert {side_of(row.prompt) for row in first + second} == {"train"}


def test_answers_have_the_frequencies_of_the_teacher() -> None:
    rows = list(generate_rows(numbered(4000), side="train", n=3000, seed=5))
    share = sum(row.teacher_text == "Yes." for row in rows) / len(rows)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 3000) ** 0.5


def test_a_side_without_questions_is_an_error() -> None:
    number = next(number for number in range(100) if side_of(f"Is it {number}?") == "train")
    teacher = Teacher({"Yes.": 1})
    grammar = Grammar(
        "one", [Section(((number,),), lambda number: Question(f"Is it {number}?", "", None, teacher), ("Yes.",))]
    )
    with pytest.raises(ValueError, match=r"^the grammar one has no heldout questions$"):
        list(generate_rows(grammar, side="heldout", n=1, seed=0))


def test_a_teacher_is_sampled_by_its_parts() -> None:
    teacher = Teacher({"a": 2, "b": 1, "c": 7})
    assert [teacher.sample(number) for number in range(11)] == ["a", "a", "b", *["c"] * 7, "a"]
    assert teacher.answers == {"a": 0.2, "b": 0.1, "c": 0.7}


def test_unpack_enumerates_all_combinations() -> None:
    options = ("ab", (1, 2, 3), [None])
    assert [tuple(unpack(index, options)) for index in range(6)] == list(itertools.product(*options))


def test_questions_are_numbered_section_by_section() -> None:
    lamp = tool_section(
        "lamp",
        ["turn {on} the {room} lamp."],
        {"room": {"hall": "hall", "attic": "loft"}, "on": {"on": True, "off": False}},
        openers=["", "Please "],
        tails=[""],
    )
    grammar = Grammar("both", [*numbered(3).sections, lamp])
    questions = [grammar.question(index) for index in range(grammar.size)]
    assert [question.prompt for question in questions] == [
        *("Is it 0?", "Is it 1?", "Is it 2?"),
        *(
            "Turn on the hall lamp.",
            "Turn off the hall lamp.",
            "Turn on the attic lamp.",
            "Turn off the attic lamp.",
        ),
        *("Please turn on the hall lamp.", "Please turn off the hall lamp."),
        *("Please turn on the attic lamp.", "Please turn off the attic lamp."),
    ]
    assert questions[5].teacher.answers == {
        '<|tool_call|>{"name": "lamp", "args": {"room": "loft", "on": true}}': 1.0
    }
    assert (questions[5].topic, questions[5].mood) == ("lamp", None)
    assert len(list(grammar.answers())) == 2 + 4
