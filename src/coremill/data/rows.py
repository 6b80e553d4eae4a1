"""The dataset format: one JSON object a line, each a question, the teacher's distribution and one sample of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from coremill.core.documents import Record
from coremill.core.errors import DatasetError
from coremill.core.publish import replacing

MOODS = ("hopeful", "doubtful", "unclear")

SUM_TOLERANCE = 1e-6
"""How far the probabilities of a row may sum from 1: what rounding to eight digits leaves of some answers."""

_MAKE_ONE = "python -m coremill.data.make_toy_kd --help"


class Row(Record):
    """One question with its teacher.

    Raises:
        ValueError: the probabilities are not a distribution, the sample is none of the answers, or the mood
            is unknown.
    """

    id: str
    prompt: str
    teacher_text: str
    """One answer, drawn from `answers`."""
    mood: str | None
    """One of `MOODS`; none where the right answer does not depend on a mood, as for a question of fact."""
    answers: dict[str, float]
    """The teacher: the probability of each answer to this prompt; those not listed have none."""
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
    """The rows of the dataset at `path`, one at a time and in order.

    Raises:
        DatasetError: unreadable or empty, or a line that is not a row; names the file and the line.
    """
    decoder = msgspec.json.Decoder(Row)
    number = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decode(decoder, line, where=f"{path}:{number}")
    except OSError as failure:
        raise DatasetError(
            f"cannot read {path}: {failure.strerror}", expected="a dataset, one JSON object a line", run=_MAKE_ONE
        ) from failure
    if number == 0:
        raise DatasetError(f"{path} has no rows", expected="one JSON object a line", run=_MAKE_ONE)


def _decode(decoder: msgspec.json.Decoder[Row], line: bytes, *, where: str) -> Row:
    try:
        return decoder.decode(line)
    except msgspec.ValidationError as failure:
        raise DatasetError(
            f"{where}: {failure}", expected=f"a row with {', '.join(Row.__struct_fields__)}", run=_MAKE_ONE
        ) from failure
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise DatasetError(
            f"{where}: not JSON: {failure}", expected="one JSON object a line", run=_MAKE_ONE
        ) from failure


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Write `rows` to `path` as they come, whole or not at all; memory does not grow with their number.

    Returns:
        The digest of the file, as `sha256:<hex>`; equal rows give equal bytes.

    Raises:
        OutputError: `path` cannot be written, or the disk is full; what was there is left.
    """
    path = Path(path)
    hasher = hashlib.sha256()
    encoder = msgspec.json.Encoder()
    with replacing(path) as file:
        buffer = bytearray()
        for row in rows:
            encoder.encode_into(row, buffer)
            buffer += b"\n"
            hasher.update(buffer)
            file.write(buffer)
    return "sha256:" + hasher.hexdigest()
