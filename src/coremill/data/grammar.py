"""Rows from a grammar: questions drawn without replacement, in a random order that needs no memory.

A grammar numbers its questions from 0. Rows follow a pseudo-random permutation of those numbers, so no question
comes twice before all have come once; then it goes round again in another order, with newly sampled answers.
The first rows of a longer dataset are those of a shorter one.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from coremill.data.rows import Row
from coremill.data.tool_calls import ToolCall, render

Side = Literal["train", "heldout"]

ArgumentValues = Mapping[str, Mapping[str, str | int | bool]]
"""For each argument of a tool, in the order of its call: what a question says, and what the call then gets."""

HELDOUT_ONE_IN = 10
"""One question in this many is held out."""

_ROUNDS = 6


def side_of(question: str) -> Side:
    """Which side `question` is on, by its SHA-256 alone: no seed, size or run can move it to the other."""
    number = int.from_bytes(hashlib.sha256(question.encode("utf-8")).digest()[:8], "big")
    return "heldout" if number % HELDOUT_ONE_IN == 0 else "train"


class Permutation:
    """A keyed pseudo-random permutation of `range(size)`, in memory that grows with the root of `size`.

    A generalised Feistel network over numbers written as `left + left_size * right`, with the numbers beyond
    `size` walked through until one within comes: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite
    Domains", CT-RSA 2002, sections 4 (cycle walking) and 5 (generalised Feistel). The round functions are
    BLAKE2b of round and half, tabulated, since a half is small.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._left_size = math.isqrt(size - 1) + 1
        self._right_size = -(-size // self._left_size)
        self._rounds = [
            [
                _number(f"{key}/{turn}/{half}")
                for half in range(self._right_size if turn % 2 == 0 else self._left_size)
            ]
            for turn in range(_ROUNDS)
        ]

    def __call__(self, place: int) -> int:
        """The number at `place`, both in `range(size)`."""
        value = self._encipher(place)
        while value >= self.size:
            value = self._encipher(value)
        return value

    def _encipher(self, value: int) -> int:
        right, left = divmod(value, self._left_size)
        for turn, table in enumerate(self._rounds):
            if turn % 2 == 0:
                left = (left + table[right]) % self._left_size
            else:
                right = (right + table[left]) % self._right_size
        return left + self._left_size * right


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


class Teacher:
    """A distribution over answers, in whole parts of a total, so that it is exact and short to write."""

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._texts = list(parts)
        self._ends = list(itertools.accumulate(parts.values()))
        self.answers = {text: part / self._ends[-1] for text, part in parts.items()}
        """The probability of each answer."""

    def sample(self, number: int) -> str:
        """The answer that the uniform 64-bit `number` falls on; the total is far too small for a bias."""
        return self._texts[bisect.bisect_right(self._ends, number % self._ends[-1])]


class Question(msgspec.Struct, frozen=True):
    """One question of a grammar, with its teacher."""

    prompt: str
    topic: str
    mood: str | None
    teacher: Teacher


class Section(msgspec.Struct, frozen=True):
    """A family of questions: one for each combination of its options."""

    options: tuple[Sequence[Any], ...]
    ask: Callable[..., Question]
    """The question of one combination; takes one of each of `options`."""
    answers: tuple[str, ...]
    """Every answer that one of these questions can have."""

    @property
    def size(self) -> int:
        return math.prod(map(len, self.options))


class Grammar:
    """A numbered, finite set of questions, section after section; no two have the same text."""

    def __init__(self, kind: str, sections: Sequence[Section]) -> None:
        self.kind = kind
        self.sections = tuple(sections)
        self._ends = list(itertools.accumulate(section.size for section in sections))
        self.size = self._ends[-1]

    def question(self, index: int) -> Question:
        """The question of that number, from 0 to `size` - 1."""
        place = bisect.bisect_right(self._ends, index)
        section = self.sections[place]
        return section.ask(*unpack(index - self._ends[place] + section.size, section.options))

    def answers(self) -> Iterator[str]:
        """Every answer that a question can have, each once."""
        yield from dict.fromkeys(answer for section in self.sections for answer in section.answers)


def unpack(index: int, options: Sequence[Sequence[Any]]) -> list[Any]:
    """One of each of `options`: `index` read in the mixed radix of their lengths, the last digit the fastest."""
    picked = []
    for choices in reversed(options):
        index, place = divmod(index, len(choices))
        picked.append(choices[place])
    return picked[::-1]


def tool_section(
    tool: str,
    phrases: Sequence[str],
    values: ArgumentValues,
    *,
    openers: Sequence[str],
    tails: Sequence[str],
) -> Section:
    """Questions whose one right answer is a call of `tool` with the arguments that they name.

    Args:
        tool: the tool's name.
        phrases: ways to ask, with a `{place}` for each argument.
        values: its arguments.
        openers: what may come before a phrase.
        tails: what may come after it.
    """

    def call(*said: str) -> str:
        args = {name: meaning[word] for (name, meaning), word in zip(values.items(), said, strict=True)}
        return render(ToolCall(name=tool, args=args))

    def ask(opener: str, phrase: str, tail: str, *said: str) -> Question:
        text = opener + phrase.format(**dict(zip(values, said, strict=True))) + tail
        return Question(text[0].upper() + text[1:], topic=tool, mood=None, teacher=Teacher({call(*said): 1}))

    words = [tuple(meaning) for meaning in values.values()]
    return Section((openers, phrases, tails, *words), ask, tuple(call(*said) for said in itertools.product(*words)))


def generate_rows(grammar: Grammar, *, side: Side, n: int, seed: int) -> Iterator[Row]:
    """`n` rows of the grammar's `side`; a row depends on `seed` and on its place, never on `n`.

    Raises:
        ValueError: the grammar has no question on that side.
    """
    drawn = ((turn, index) for turn in itertools.count() for index in _order(grammar, seed, turn))
    number = 0
    for visited, (turn, index) in enumerate(drawn):
        if number == n:
            return
        if visited == grammar.size and number == 0:
            raise ValueError(f"the grammar {grammar.kind} has no question on the {side} side")
        question = grammar.question(index)
        if side_of(question.prompt) != side:
            continue
        yield Row(
            id=f"{side}-{number:07d}",
            prompt=question.prompt,
            teacher_text=question.teacher.sample(_number(f"answer/{seed}/{turn}/{index}")),
            mood=question.mood,
            answers=question.teacher.answers,
            metadata={"kind": grammar.kind, "topic": question.topic, "seed": seed, "index": index, "round": turn},
        )
        number += 1


def _order(grammar: Grammar, seed: int, turn: int) -> Iterator[int]:
    return map(Permutation(grammar.size, key=f"order/{seed}/{turn}"), range(grammar.size))
