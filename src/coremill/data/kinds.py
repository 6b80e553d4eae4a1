"""The kinds of dataset that `make_toy_kd` writes: what generates the rows, and which answers are accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from coremill.core.answer_key import AnswerKey, Tools
from coremill.data import magic_8_ball, toy
from coremill.data.grammar import Grammar


class DatasetKind(msgspec.Struct, frozen=True):
    """One kind of dataset."""

    name: str
    grammar: Callable[[], Grammar]
    answers: Mapping[str, str | None]
    """Every answer that is not a tool call, with its mood."""
    tools: Tools

    def answer_key(self) -> AnswerKey:
        """Return the document that other stages read; see :mod:`coremill.data.judge`."""
        return AnswerKey(
            kind=self.name,
            answers=dict(self.answers),
            tools={name: dict(arguments) for name, arguments in self.tools.items()},
        )


KINDS: Mapping[str, DatasetKind] = {
    kind.name: kind
    for kind in (
        DatasetKind(magic_8_ball.KIND, magic_8_ball.magic_8_ball, magic_8_ball.MOOD_OF, magic_8_ball.TOOLS),
        DatasetKind(
            toy.KIND, toy.toy, {reply: None for replies in toy.REPLIES.values() for reply in replies}, toy.TOOLS
        ),
    )
}
"""By the name in a configuration's `dataset.kind` and in a row's `metadata["kind"]`."""
