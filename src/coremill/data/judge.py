"""Whether a dataset accepts an answer, and whether the answer is right for its question.

The answer key of the dataset contains all that differs between kinds of dataset, so no kind is imported here.
"""

from __future__ import annotations

from pathlib import Path

from coremill.core.answer_key import AnswerKey
from coremill.core.documents import Record, read_json
from coremill.core.errors import DatasetError
from coremill.data.rows import Row
from coremill.data.tool_calls import fits, parse

_MAKE_ONE = "python -m coremill.data.make_toy_kd --help"


class Verdict(Record):
    """The result of judging one answer."""

    exact: bool
    """The answer equals one in the answer key, or is a valid call of one of its tools."""
    right: bool
    """The answer has the mood of the question, or is the expected tool call, or is one of the teacher's answers."""
    is_tool_call: bool
    """The answer is a valid call of one of the dataset's tools."""


def read_answer_key(path: Path) -> AnswerKey:
    """Read the answer key of a dataset.

    Raises:
        DatasetError: the file is missing or is not an answer key.
    """
    return read_json(path, AnswerKey, error=DatasetError, run=_MAKE_ONE)


def judge(row: Row, answer: str, key: AnswerKey) -> Verdict:
    """Judge `answer`, the text of a decoded answer without its end token, to the question of `row`.

    Args:
        key: the answer key of the row's dataset.

    Raises:
        DatasetError: the row is of another kind than the key.
    """
    if row.metadata.get("kind") != key.kind:
        raise DatasetError(
            f"row {row.id} has the kind {row.metadata.get('kind')!r} in its metadata",
            expected=f"{key.kind!r}, the kind of the dataset's answer key",
            run=_MAKE_ONE,
        )
    call = parse(answer)
    if call is not None and not fits(call, key.tools):
        call = None
    wanted = parse(row.teacher_text)
    if row.mood is not None:
        right = key.answers.get(answer) == row.mood
    elif wanted is not None:
        right = call == wanted
    else:
        right = answer in row.answers
    return Verdict(exact=answer in key.answers or call is not None, right=right, is_tool_call=call is not None)
