"""The teacher, token by token: exact next-token probabilities of a distribution over whole answers.

A distribution over answers, each a sequence of tokens, is a distribution over the paths of a trie. The
probability of token t after prefix p is then mass(p + t) / mass(p), where mass(p) is the probability of all
answers that begin with p: the chain rule, without approximation. Its entropy is the least cross entropy that a
student can reach; KL(teacher ‖ student) is the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from coremill.data.rows import Row
from coremill.text.student_tokenizer import Tokenizer

CONTINUE, HALT = 0, 1
"""Columns of the halt head."""


class AnswerTrie:
    """The answers to one question, by token.

    Args:
        tokenized: each answer's token ids, its end token included, and its probability. The probabilities
            need not sum to 1: every conditional is exact for their proportions.

    Raises:
        ValueError: no answer has a probability, a probability is negative, or an answer begins with another
            whole one, so that the shorter one's end could not be told.
    """

    def __init__(self, tokenized: Iterable[tuple[Sequence[int], float]]) -> None:
        masses: dict[tuple[int, ...], dict[int, list[float]]] = {}
        complete: set[tuple[int, ...]] = set()
        for ids, probability in tokenized:
            if not 0 <= probability < math.inf:
                raise ValueError(f"the answer {list(ids)} has the probability {probability}")
            if probability == 0:
                continue
            path = tuple(ids)
            complete.add(path)
            for place, token in enumerate(path):
                masses.setdefault(path[:place], {}).setdefault(token, []).append(probability)
        if not masses:
            raise ValueError("no answer has a probability")
        if swallowed := sorted(complete & masses.keys()):
            raise ValueError(f"the answer {list(swallowed[0])} is the beginning of another one")
        self._complete = complete
        self._next = {prefix: _normalised(children) for prefix, children in masses.items()}

    def next_tokens(self, prefix: Sequence[int]) -> dict[int, float]:
        """The probability of each token after `prefix`; tokens not listed have none, and nothing follows an end.

        Raises:
            ValueError: no answer begins with `prefix`, so the teacher has no opinion.
        """
        path = tuple(prefix)
        if path in self._complete:
            return {}
        if path not in self._next:
            raise ValueError(f"no answer begins with {list(path)}")
        return dict(self._next[path])


def _normalised(children: Mapping[int, Sequence[float]]) -> dict[int, float]:
    # fsum: the result does not depend on the order in which the answers came.
    masses = {token: math.fsum(parts) for token, parts in children.items()}
    total = math.fsum(part for parts in children.values() for part in parts)
    return {token: mass / total for token, mass in sorted(masses.items())}


def teacher_trie(row: Row, tokenizer: Tokenizer) -> AnswerTrie:
    """The answers of `row` as paths of token ids."""
    return AnswerTrie((tokenizer.encode_answer(text), share) for text, share in row.answers.items())


def teacher_targets(row: Row, tokenizer: Tokenizer) -> list[dict[int, float]]:
    """The teacher's next-token distribution at each position of the row's sampled answer.

    Returns:
        One distribution a token of `tokenizer.encode_answer(row.teacher_text)`, the end token included: item i
        is what should follow the first i tokens of the answer.
    """
    trie = teacher_trie(row, tokenizer)
    answer = tokenizer.encode_answer(row.teacher_text)
    return [trie.next_tokens(answer[:place]) for place in range(len(answer))]


def halt_labels(answer_tokens: int) -> list[int]:
    """The halt label of each position that a conversation is scored at, from the assistant token to the end token.

    Halt at and after the answer's last content token, continue before it.

    Args:
        answer_tokens: tokens of the answer, the end token included.

    Returns:
        `answer_tokens` + 1 labels, CONTINUE or HALT.
    """
    last_content = answer_tokens - 1  # counted from the assistant token at 0; the end token comes after it
    return [HALT if place >= last_content else CONTINUE for place in range(answer_tokens + 1)]


def entropy(dist: Mapping[int, float]) -> float:
    """Shannon entropy of a distribution, in nats."""
    return math.fsum(share * math.log(1 / share) for share in dist.values() if share > 0)
