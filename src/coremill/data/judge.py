"""Whether an answer is one that the toy can give, and whether it is right for the question."""

from __future__ import annotations

from coremill.core.documents import Record
from coremill.core.errors import DatasetError
from coremill.data.kinds import KINDS
from coremill.data.magic_8_ball import MOOD_OF
from coremill.data.rows import Row
from coremill.data.tool_calls import fits, parse


class Verdict(Record):
    """What an answer is worth."""

    exact: bool
    """One of the dataset's plain answers to the letter, or a valid call of one of its tools."""
    right: bool
    """In the mood of the question; or the very tool call asked for; or one of the replies the teacher gives."""
    is_tool_call: bool
    """A valid call of one of the dataset's tools."""


def judge(row: Row, answer: str) -> Verdict:
    """Judge `answer`, the text of a decoded answer without its end token, to the question of `row`.

    Raises:
        DatasetError: the row does not say of which kind of dataset it is, so no answer can be judged.
    """
    kind = KINDS.get(str(row.metadata.get("kind")))
    if kind is None:
        raise DatasetError(
            f"row {row.id} has the kind {row.metadata.get('kind')!r} in its metadata",
            expected="one of " + ", ".join(KINDS),
            run="python -m coremill.data.make_toy_kd --help",
        )
    call = parse(answer)
    if call is not None and not fits(call, kind.tools):
        call = None
    wanted = parse(row.teacher_text)
    if row.mood is not None:
        right = MOOD_OF.get(answer) == row.mood
    elif wanted is not None:
        right = call == wanted
    else:
        right = answer in row.answers
    return Verdict(
        exact=answer in kind.plain_answers or call is not None, right=right, is_tool_call=call is not None
    )
