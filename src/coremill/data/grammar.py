"""Rows from a grammar: questions drawn without replacement, in a random order that is not kept in memory.

A grammar numbers its questions from 0. Rows follow a pseudo-random permutation of the numbers, so no question is
repeated before all have been drawn. The next round has another order and newly sampled answers. The first rows of a
longer dataset are those of a shorter one.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

from coremill.data.rows import Row
from coremill.data.tool_calls import ToolCall, render

Side = Literal["train", "heldout"]

T = TypeVar("T")

Option = str | tuple[str, ...]
"""One variable part of a question."""

ArgumentValues = Mapping[str, Mapping[str, str | int | bool]]
"""For each argument of a tool, in the order of its call: the values in the call by the words in the question."""

HELDOUT_ONE_IN = 10
"""One question in this many is held out."""

_ROUNDS = 6


def side_of(question: str) -> Side:
    """Return the side of `question`, which depends only on its SHA-256, not on a seed, a size or a run."""
    number = int.from_bytes(hashlib.sha256(question.encode("utf-8")).digest()[:8], "big")
    return "heldout" if number % HELDOUT_ONE_IN == 0 else "train"


class Permutation:
    """A keyed pseudo-random permutation of `range(size)`, in memory that grows with the root of `size`.

    A generalised Feistel network over the numbers `left + left_size * right`. A result that is not below `size` is
    enciphered again until one is: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002,
    sections 4 (cycle walking) and 5 (generalised Feistel). The round functions are tables of BLAKE2b of the round
    and the half.
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

    def __call__(self, index: int) -> int:
        """Return the number at `index`, both in `range(size)`."""
        value = self._encipher(index)
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
    """A distribution over answers, in integer parts of their total, which makes it exact."""

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._texts = list(parts)
        self._ends = list(itertools.accumulate(parts.values()))
        self.answers = {text: part / self._ends[-1] for text, part in parts.items()}
        """The probability of each answer."""

    def sample(self, number: int) -> str:
        """Return the answer that a uniform 64-bit `number` selects; the bias is negligible for so small a total."""
        return self._texts[bisect.bisect_right(self._ends, number % self._ends[-1])]


class Question(msgspec.Struct, frozen=True):
    """One question of a grammar, with its teacher."""

    prompt: str
    topic: str
    mood: str | None
    teacher: Teacher


class Section(msgspec.Struct, frozen=True):
    """A family of questions: one for each combination of its options."""

    options: tuple[Sequence[Option], ...]
    ask: Callable[..., Question]
    """Returns the question of a combination, given one of each of `options`."""
    answers: tuple[str, ...]
    """Every answer to one of these questions."""

    @property
    def size(self) -> int:
        return math.prod(map(len, self.options))


class Grammar:
    """A finite set of questions, numbered section by section; no two have the same text."""

    def __init__(self, kind: str, sections: Sequence[Section]) -> None:
        self.kind = kind
        self.sections = tuple(sections)
        self._ends = list(itertools.accumulate(section.size for section in sections))
        self.size = self._ends[-1]

    def question(self, index: int) -> Question:
        """Return the question with the number `index`, from 0 to `size` - 1."""
        number = bisect.bisect_right(self._ends, index)
        section = self.sections[number]
        return section.ask(*unpack(index - self._ends[number] + section.size, section.options))

    def answers(self) -> Iterator[str]:
        """Yield every answer to a question once."""
        yield from dict.fromkeys(answer for section in self.sections for answer in section.answers)


def unpack(index: int, options: Sequence[Sequence[T]]) -> list[T]:
    """Return one of each of `options`, by the digits of `index` in the mixed radix of their lengths.

    The last digit changes fastest.
    """
    picked = []
    for choices in reversed(options):
        index, digit = divmod(index, len(choices))
        picked.append(choices[digit])
    return picked[::-1]


def tool_section(
    tool: str,
    phrases: Sequence[str],
    values: ArgumentValues,
    *,
    openers: Sequence[str],
    tails: Sequence[str],
) -> Section:
    """Return questions whose only right answer is a call of `tool` with the arguments in the question.

    Args:
        tool: the tool's name.
        phrases: format strings with a replacement field for each argument.
        values: the arguments.
        openers: texts before a phrase.
        tails: texts after a phrase.
    """

    def call(*words: str) -> str:
        args = {name: meaning[word] for (name, meaning), word in zip(values.items(), words, strict=True)}
        return render(ToolCall(name=tool, args=args))

    def ask(opener: str, phrase: str, tail: str, *words: str) -> Question:
        text = opener + phrase.format(**dict(zip(values, words, strict=True))) + tail
        return Question(text[0].upper() + text[1:], topic=tool, mood=None, teacher=Teacher({call(*words): 1}))

    choices = [tuple(meaning) for meaning in values.values()]
    answers = tuple(call(*words) for words in itertools.product(*choices))
    return Section((openers, phrases, tails, *choices), ask, answers)


def generate_rows(grammar: Grammar, *, side: Side, n: int, seed: int) -> Iterator[Row]:
    """Yield `n` rows of the grammar's `side`; a row depends on `seed` and its index, not on `n`.

    Raises:
        ValueError: the grammar has no questions on that side.
    """
    drawn = ((turn, index) for turn in itertools.count() for index in _order(grammar, seed, turn))
    number = 0
    for visited, (turn, index) in enumerate(drawn):
        if number == n:
            return
        if visited == grammar.size and number == 0:
            raise ValueError(f"the grammar {grammar.kind} has no {side} questions")
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
