"""The teacher by token: the exact next-token probabilities of a distribution over whole answers.

A distribution over answers, each a sequence of tokens, is a distribution over the paths of a trie. The
probability of token t after prefix p is mass(p + t) / mass(p), where mass(p) is the probability of all
answers that begin with p: the chain rule, without approximation. The teacher's entropy is the least cross entropy
that a student can reach; the difference is KL(teacher ‖ student).
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
        ValueError: no answer has a positive probability, a probability is negative or not finite, or an answer is a
            prefix of another, so that its end is ambiguous.
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
            for index, token in enumerate(path):
                masses.setdefault(path[:index], {}).setdefault(token, []).append(probability)
        if not masses:
            raise ValueError("no answer has a positive probability")
        if prefixes := sorted(complete & masses.keys()):
            raise ValueError(f"the answer {list(prefixes[0])} is a prefix of another one")
        self._complete = complete
        self._next = {prefix: _normalised(children) for prefix, children in masses.items()}

    def next_tokens(self, prefix: Sequence[int]) -> dict[int, float]:
        """Return the probability of each token after `prefix` if it is positive; none if `prefix` is an answer.

        Raises:
            ValueError: no answer begins with `prefix`, so the distribution is undefined.
        """
        path = tuple(prefix)
        if path in self._complete:
            return {}
        if path not in self._next:
            raise ValueError(f"no answer begins with {list(path)}")
        return dict(self._next[path])


def _normalised(children: Mapping[int, Sequence[float]]) -> dict[int, float]:
    # With fsum, the result does not depend on the order of the answers.
    masses = {token: math.fsum(parts) for token, parts in children.items()}
    total = math.fsum(part for parts in children.values() for part in parts)
    return {token: mass / total for token, mass in sorted(masses.items())}


def teacher_trie(row: Row, tokenizer: Tokenizer) -> AnswerTrie:
    """Return the answers of `row` as paths of token ids."""
    return AnswerTrie((tokenizer.encode_answer(text), share) for text, share in row.answers.items())


def teacher_targets(row: Row, tokenizer: Tokenizer) -> list[dict[int, float]]:
    """Return the teacher's next-token distribution at each position of the row's sampled answer.

    Returns:
        A distribution for each token of `tokenizer.encode_answer(row.teacher_text)`, the end token included: item i
        is that of the token after the first i tokens of the answer.
    """
    trie = teacher_trie(row, tokenizer)
    answer = tokenizer.encode_answer(row.teacher_text)
    return [trie.next_tokens(answer[:index]) for index in range(len(answer))]


def halt_labels(answer_tokens: int) -> list[int]:
    """Return the halt labels of a conversation from the assistant token to the end token.

    They are HALT at and after the answer's last content token, and CONTINUE before it.

    Args:
        answer_tokens: the number of tokens of the answer, the end token included.

    Returns:
        `answer_tokens` + 1 labels, CONTINUE or HALT.
    """
    last_content = answer_tokens - 1  # the assistant token is at 0; the end token follows the last content token
    return [HALT if index >= last_content else CONTINUE for index in range(answer_tokens + 1)]


def entropy(dist: Mapping[int, float]) -> float:
    """Return the Shannon entropy of a distribution in nats."""
    return math.fsum(share * math.log(1 / share) for share in dist.values() if share > 0)
