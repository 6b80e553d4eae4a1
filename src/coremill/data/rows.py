"""The dataset format: JSON lines, each with a question, the teacher's distribution and a sample of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from coremill.core.documents import Record
from coremill.data.lines import read_lines

MOODS = ("hopeful", "doubtful", "unclear")

SUM_TOLERANCE = 1e-6
"""How much the sum of a row's probabilities may differ from 1: enough for answers rounded to eight digits."""

_MAKE_ONE = "python -m coremill.data.make_toy_kd --help"


class Row(Record):
    """One question with its teacher.

    Raises:
        ValueError: the probabilities are not a distribution, the sample is not one of the answers, or the mood
            is unknown.
    """

    id: str
    prompt: str
    teacher_text: str
    """One answer, drawn from `answers`."""
    mood: str | None
    """One of `MOODS`; None if the right answer does not depend on a mood, as for a question of fact."""
    answers: dict[str, float]
    """The teacher: the probability of each answer to this prompt, which is 0 for any other answer."""
    metadata: dict[str, str | int | float]

    def __post_init__(self) -> None:
        total = math.fsum(self.answers.values())
        if not abs(total - 1) <= SUM_TOLERANCE:
            raise ValueError(f"the probabilities of `answers` sum to {total:.6g}, not to 1")
        for answer, probability in self.answers.items():
            if not 0 < probability <= 1:
                raise ValueError(f"the probability of {answer!r} in `answers` is {probability:g}")
        if self.teacher_text not in self.answers:
            raise ValueError(f"`teacher_text` {self.teacher_text!r} is not one of `answers`")
        if self.mood is not None and self.mood not in MOODS:
            raise ValueError(f"`mood` is {self.mood!r}, not one of {', '.join(MOODS)} or null")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of the dataset at `path` in order; raises as :func:`coremill.data.lines.read_lines` does."""
    return read_lines(path, Row, whole="a dataset", each="row", run=_MAKE_ONE)
