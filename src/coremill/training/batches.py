"""Convert rows to tensors: token ids, the teacher's distribution at each answer token, and halt labels.

Legend: B rows of a batch, T length of its longest row, V vocabulary, M its scored positions, N its answer tokens.

A row's tokens are its prompt, `[bos, user, …, assistant]`, and its answer, `[…, end]`. The logits at position i
score token i + 1, so the answer is scored from the assistant token to the last content token. The halt label at
position i is for token i itself: halt from the last content token on, continue before it. The first position with a
halt label is the assistant token, the last one is the end token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coremill.core.errors import TrainingError
from coremill.data.rows import Row
from coremill.data.teacher import halt_labels, teacher_targets
from coremill.text.student_tokenizer import Tokenizer

_BUCKET_BATCHES = 16
"""Number of batches that are sorted by length together: little padding, but rows are still well mixed."""

Targets = list[dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as token ids, with its teacher."""

    tokens: tuple[int, ...]
    answer_start: int
    """Index of the first answer token; the assistant token is just before it."""
    teacher: Targets
    """The teacher's next-token probabilities, one distribution per answer token."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Several rows. The scored positions are those from each row's assistant token to its end token."""

    input_ids: Tensor
    """(B, T) int32, right-padded."""
    scored_at: Tensor
    """(M,) int64: the scored positions, as indices into the flattened (B·T) batch; never padding."""
    halt_labels: Tensor
    """(M,) int64: CONTINUE or HALT."""
    answer_at: Tensor
    """(N,) int64: which of the M positions score an answer token: all except each row's end token."""
    answer_ids: Tensor
    """(N,) int64: the answer tokens that were sampled."""
    teacher: Tensor
    """(N, V) float32: the teacher's probabilities."""
    n_tokens: int
    """Number of tokens, without padding."""


def encode_rows(rows: Iterable[Row], tokenizer: Tokenizer, *, max_seq_len: int) -> list[Example]:
    """Tokenize `rows` and compute their teachers' distributions.

    Raises:
        TrainingError: a row is longer than `max_seq_len`.
    """
    known: dict[tuple[str, tuple[tuple[str, float], ...]], Targets] = {}  # many rows share few distinct teachers
    examples = []
    for row in rows:
        prompt, answer = tokenizer.encode_prompt(row.prompt), tokenizer.encode_answer(row.teacher_text)
        if len(prompt) + len(answer) > max_seq_len:
            raise TrainingError(
                f"row {row.id} has {len(prompt) + len(answer)} tokens",
                expected=f"at most {max_seq_len}, the model's max_seq_len",
            )
        key = (row.teacher_text, tuple(row.answers.items()))
        if key not in known:
            known[key] = teacher_targets(row, tokenizer)
        examples.append(Example(tokens=(*prompt, *answer), answer_start=len(prompt), teacher=known[key]))
    return examples


def collate(examples: Sequence[Example], *, pad_id: int, vocab_size: int) -> Batch:
    """Combine `examples` into one batch, padded to the longest."""
    seq_len = max(len(example.tokens) for example in examples)
    input_ids = torch.full((len(examples), seq_len), pad_id, dtype=torch.int32)
    scored_at: list[int] = []
    labels: list[int] = []
    answer_at: list[int] = []
    answer_ids: list[int] = []
    taught: list[tuple[int, int, float]] = []  # (answer token, token id, probability)
    for index, example in enumerate(examples):
        input_ids[index, : len(example.tokens)] = torch.tensor(example.tokens, dtype=torch.int32)
        row = index * seq_len
        first = len(scored_at)
        scored_at += range(row + example.answer_start - 1, row + len(example.tokens))
        labels += halt_labels(len(example.tokens) - example.answer_start)
        answer_at += range(first, len(scored_at) - 1)
        for number, dist in enumerate(example.teacher, start=len(answer_ids)):
            taught += [(number, token, share) for token, share in dist.items()]
        answer_ids += example.tokens[example.answer_start :]
    numbers, token_ids, shares = zip(*taught, strict=True)
    teacher = torch.zeros(len(answer_ids), vocab_size)
    teacher[torch.tensor(numbers), torch.tensor(token_ids)] = torch.tensor(shares)
    return Batch(
        input_ids=input_ids,
        scored_at=torch.tensor(scored_at),
        halt_labels=torch.tensor(labels),
        answer_at=torch.tensor(answer_at),
        answer_ids=torch.tensor(answer_ids),
        teacher=teacher,
        n_tokens=sum(len(example.tokens) for example in examples),
    )


def n_batches(n_examples: int, batch_size: int) -> int:
    """Number of batches in an epoch; the last one may be smaller."""
    return -(-n_examples // batch_size)


def epoch_batches(
    examples: Sequence[Example], *, batch_size: int, generator: torch.Generator
) -> Iterator[list[Example]]:
    """Yield every example once, in a random order from `generator`, with similar lengths in a batch."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    groups: list[list[Example]] = []
    run = batch_size * _BUCKET_BATCHES
    for start in range(0, len(order), run):
        alike = sorted(order[start : start + run], key=lambda index: len(examples[index].tokens))
        groups += [
            [examples[index] for index in alike[first : first + batch_size]]
            for first in range(0, len(alike), batch_size)
        ]
    for index in torch.randperm(len(groups), generator=generator).tolist():
        yield groups[index]
