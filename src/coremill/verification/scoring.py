"""Scores of token sequences under a package: padded to the smallest length that fits, and truncated again.

Legend: N tokens of a sequence, T the length that it is padded to, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from coremill.data.prompts import conversation
from coremill.data.rows import Row
from coremill.measures import Float32Array
from coremill.model.decoding import Sampler, generate
from coremill.model.student import HALT_LOGITS, LOGITS
from coremill.text.student_tokenizer import Tokenizer
from coremill.verification.backends import Runner

MAX_NEW_TOKENS = 96
"""No answer of a toy's teacher is longer; an answer that does not end by then is not exact."""


class Scorer:
    """Scores sequences of any length up to the package's longest.

    Args:
        lengths: the lengths at which the package runs.
        pad_id: the padding token, on the right; the causal mask hides it.
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
        """V: the number of scores per position that the package returns, whatever its contract states."""
        return int(self.score([self._pad_id])[LOGITS].shape[-1])

    def fits(self, n: int) -> bool:
        return n <= self.longest

    def score(self, ids: Sequence[int]) -> dict[str, Float32Array]:
        """Return the outputs by name at each of the N tokens of `ids`: `logits` (N, V), `halt_logits` (N, 2).

        Raises:
            ValueError: `ids` is longer than the package's longest length.
        """
        if not self.fits(len(ids)):
            raise ValueError(f"{len(ids)} tokens, the package's longest length is {self.longest}")
        seq_len = next(length for length in self._lengths if length >= len(ids))
        return {name: array[: len(ids)] for name, array in self.score_at(ids, seq_len).items()}

    def score_at(self, ids: Sequence[int], seq_len: int) -> dict[str, Float32Array]:
        """Return the outputs at all T positions of `ids`, padded to the length `seq_len`."""
        return self._runner.run([*ids, *[self._pad_id] * (seq_len - len(ids))])

    def next_logits(self, ids: list[int]) -> Float32Array:
        """Return the scores (V,) of the token after `ids`."""
        last: Float32Array = self.score(ids)[LOGITS][-1]
        return last


class ScoredAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of a row's conversation; A tokens of answer, including the end token."""

    answer: tuple[int, ...]
    logits: Float32Array
    """(A, V): row i scores answer token i."""
    halt_logits: Float32Array | None
    """(A + 1, 2): from the last token of the prompt to the end token."""


def score_answer(scorer: Scorer, row: Row, tokenizer: Tokenizer) -> ScoredAnswer | None:
    """Score the teacher's answer to the row's question; None if the conversation is too long for the package."""
    ids = conversation(row, tokenizer)
    if not scorer.fits(len(ids)):
        return None
    answer = tokenizer.encode_answer(row.teacher_text)
    start = len(ids) - len(answer) - 1  # the last token of the prompt: it scores the first token of the answer
    scores = scorer.score(ids)
    halt = scores.get(HALT_LOGITS)
    return ScoredAnswer(
        answer=tuple(answer),
        logits=scores[LOGITS][start:-1],
        halt_logits=None if halt is None else halt[start:],
    )


def answer_question(scorer: Scorer, question: str, tokenizer: Tokenizer, sampler: Sampler) -> list[int]:
    """Return the ids of the package's answer, including the end token or an id outside the vocabulary.

    The answer is empty if the prompt leaves no position for it.
    """
    prompt = tokenizer.encode_prompt(question)
    count = min(MAX_NEW_TOKENS, scorer.longest - len(prompt))
    if count < 1:
        return []
    # Decoding cannot continue after an id outside the vocabulary.
    stop_ids = {tokenizer.end_id, *range(tokenizer.vocab_size, scorer.vocab_size)}
    return generate(scorer.next_logits, prompt, stop_ids=stop_ids, max_new_tokens=count, sampler=sampler)
