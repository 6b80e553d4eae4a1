"""AnswerKey: the answers that a dataset accepts, for the stages that check answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from coremill.core.documents import Document

ArgumentType = Literal["string", "integer", "boolean"]
"""The JSON type of a tool's argument."""

Tools = Mapping[str, Mapping[str, ArgumentType]]
"""The tools of a dataset: the name of each, and the names and types of its arguments, all of them required."""


class AnswerKey(Document):
    """`answers.json` of a dataset."""

    kind: str
    """The kind of the dataset, as in the metadata of its rows."""
    answers: dict[str, str | None]
    """Every answer that is not a tool call, with its mood; None if the answer has no mood."""
    tools: dict[str, dict[str, ArgumentType]]
    """See :data:`Tools`."""

    @property
    def has_moods(self) -> bool:
        """Whether the questions have moods that an answer must match."""
        return any(mood is not None for mood in self.answers.values())
