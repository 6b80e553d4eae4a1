"""The kinds of dataset that `make_toy_kd` writes, and what each is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from coremill.data import magic_8_ball, toy
from coremill.data.grammar import Grammar
from coremill.data.tool_calls import Tools


class DatasetKind(msgspec.Struct, frozen=True):
    """One kind of dataset."""

    grammar: Callable[[], Grammar]
    plain_answers: frozenset[str]
    """Every answer that is not a tool call."""
    tools: Tools


KINDS: Mapping[str, DatasetKind] = {
    magic_8_ball.KIND: DatasetKind(magic_8_ball.magic_8_ball, frozenset(magic_8_ball.MOOD_OF), magic_8_ball.TOOLS),
    toy.KIND: DatasetKind(
        toy.toy, frozenset(reply for replies in toy.REPLIES.values() for reply in replies), toy.TOOLS
    ),
}
"""By the name that a configuration's `dataset.kind` and a row's `metadata["kind"]` say."""
