"""Scores of token sequences through a package: padded to the smallest length that fits, cut to what was asked.

Legend: N tokens of a sequence, T the length that it is padded to, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from coremill.coreml.graph import HALT_LOGITS, LOGITS
from coremill.data.prompts import conversation
from coremill.data.rows import Row
from coremill.model.decoding import Sampler, generate
from coremill.text.student_tokenizer import Tokenizer
from coremill.verification.backends import Array, Runner

MAX_NEW_TOKENS = 96
"""No answer of a toy's teacher is longer; one that does not end by then is not exact."""


class Scorer:
    """A package that scores sequences of any length up to its longest.

    Args:
        lengths: those at which the package was found to run.
        pad_id: what sequences are padded with, on the right; the causal mask hides it.
    """

    def __init__(self, runner: Runner, lengths: Sequence[int], pad_id: int) -> None:
        self._runner = runner
        self._lengths = sorted(lengths)
        self._pad_id = pad_id

    @property
    def longest(self) -> int:
        return self._lengths[-1]

    @functools.cached_property
    def vocab_size(self) -> int:
        """V: how many scores the package itself gives a position, whatever its contract says."""
        return int(self.score([self._pad_id])[LOGITS].shape[-1])

    def fits(self, n: int) -> bool:
        return n <= self.longest

    def score(self, ids: Sequence[int]) -> dict[str, Array]:
        """The outputs by name at each of the N tokens of `ids`: `logits` (N, V), `halt_logits` (N, 2).

        Raises:
            ValueError: `ids` is longer than the package's longest length.
        """
        if not self.fits(len(ids)):
            raise ValueError(f"{len(ids)} tokens, the package's longest length is {self.longest}")
        seq_len = next(length for length in self._lengths if length >= len(ids))
        return {name: array[: len(ids)] for name, array in self.score_at(ids, seq_len).items()}

    def score_at(self, ids: Sequence[int], seq_len: int) -> dict[str, Array]:
        """The outputs at all T positions of `ids` padded to the length `seq_len`."""
        return self._runner.run([*ids, *[self._pad_id] * (seq_len - len(ids))])

    def next_logits(self, ids: list[int]) -> Array:
        """Scores (V,) of the token after `ids`."""
        return self.score(ids)[LOGITS][-1]


class ScoredAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A row's conversation, scored; A tokens of answer, the end token included."""

    answer: tuple[int, ...]
    logits: Array
    """(A, V): row i scores answer token i."""
    halt_logits: Array | None
    """(A + 1, 2): from the last token of the prompt to the end token."""


def score_answer(scorer: Scorer, row: Row, tokenizer: Tokenizer) -> ScoredAnswer | None:
    """Score the teacher's answer to the row's question; None where the conversation is too long for the package."""
    ids = conversation(row, tokenizer)
    if not scorer.fits(len(ids)):
        return None
    answer = tokenizer.encode_answer(row.teacher_text)
    start = len(ids) - len(answer) - 1  # the last token of the prompt, which scores the first of the answer
    scores = scorer.score(ids)
    halt = scores.get(HALT_LOGITS)
    return ScoredAnswer(
        answer=tuple(answer),
        logits=scores[LOGITS][start:-1],
        halt_logits=None if halt is None else halt[start:],
    )


def answer_question(scorer: Scorer, question: str, tokenizer: Tokenizer, sampler: Sampler) -> list[int]:
    """The ids of the package's answer, with the end token or the id that is no token if it came to one.

    [] where nothing more fits.
    """
    prompt = tokenizer.encode_prompt(question)
    room = min(MAX_NEW_TOKENS, scorer.longest - len(prompt))
    if room < 1:
        return []
    # After an id that is no token there is nothing to go on from.
    stop_ids = {tokenizer.end_id, *range(tokenizer.vocab_size, scorer.vocab_size)}
    return generate(scorer.next_logits, prompt, stop_ids=stop_ids, max_new_tokens=room, sampler=sampler)
