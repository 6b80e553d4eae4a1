"""Rows as tensors: the targets of each position, read back from real rows."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.errors import TrainingError
from coremill.data.rows import Row
from coremill.text.student_tokenizer import Tokenizer
from coremill.training.batches import (
    Example,
    collate,
    encode_rows,
    epoch_batches,
    n_batches,
)


def example(n_prompt: int, n_content: int) -> Example:
    """A prompt of 10, 11, …, then an answer of 50, 51, … and the end token 2; the teacher is certain."""
    answer = (*range(50, 50 + n_content), 2)
    return Example(
        tokens=(*range(10, 10 + n_prompt), *answer),
        answer_start=n_prompt,
        teacher=[{token: 1.0} for token in answer],
    )


def test_an_example_is_the_prompt_and_the_answer(rows: list[Row], tokenizer: Tokenizer) -> None:
    for row, made in zip(rows, encode_rows(rows, tokenizer, max_seq_len=256), strict=True):
        prompt, answer = list(made.tokens[: made.answer_start]), list(made.tokens[made.answer_start :])
        assert tokenizer.decode(prompt) == f"<|bos|><|user|>{row.prompt}<|assistant|>"
        assert tokenizer.decode(answer) == f"{row.teacher_text}<|end|>"
        assert len(made.teacher) == len(answer)
        assert all(dist[token] > 0 for dist, token in zip(made.teacher, answer, strict=True))


def test_rows_with_one_teacher_and_different_samples_have_different_targets(
    rows: list[Row], tokenizer: Tokenizer
) -> None:
    row = next(row for row in rows if row.mood == "hopeful")
    answers = list(row.answers)[:4]
    variants = [msgspec.structs.replace(row, teacher_text=answer) for answer in answers]
    for answer, made in zip(answers, encode_rows(variants, tokenizer, max_seq_len=256), strict=True):
        assert len(made.teacher) == len(tokenizer.encode_answer(answer))
        probability = 1.0
        for dist, token in zip(made.teacher, tokenizer.encode_answer(answer), strict=True):
            probability *= dist[token]
        assert probability == pytest.approx(row.answers[answer])


def test_a_row_that_is_too_long_is_an_error(rows: list[Row], tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode_prompt(rows[0].prompt)) + len(tokenizer.encode_answer(rows[0].teacher_text))
    assert len(encode_rows(rows[:1], tokenizer, max_seq_len=length)) == 1
    with pytest.raises(TrainingError) as caught:
        encode_rows(rows[:1], tokenizer, max_seq_len=length - 1)
    assert str(caught.value) == (
        f"row train-0000000 has {length} tokens\n  expected: at most {length - 1}, the model's max_seq_len"
    )


def test_positions_of_a_batch() -> None:
    batch = collate([example(3, 2), example(2, 1)], pad_id=0, vocab_size=60)
    assert batch.input_ids.tolist() == [[10, 11, 12, 50, 51, 2], [10, 11, 50, 2, 0, 0]]
    assert batch.input_ids.dtype == torch.int32
    # From the assistant token (2 and 6 + 1) to the end token (5 and 6 + 3).
    assert batch.scored_at.tolist() == [2, 3, 4, 5, 7, 8, 9]
    assert batch.halt_labels.tolist() == [0, 0, 1, 1, 0, 1, 1]
    # The scores at the end tokens, the 4th and 7th of these, predict no answer token.
    assert batch.answer_at.tolist() == [0, 1, 2, 4, 5]
    assert batch.answer_ids.tolist() == [50, 51, 2, 50, 2]
    assert batch.teacher.argmax(-1).tolist() == [50, 51, 2, 50, 2]
    assert batch.n_tokens == 10


def test_every_target_of_a_real_batch_is_the_next_token(rows: list[Row], tokenizer: Tokenizer) -> None:
    examples = encode_rows(rows, tokenizer, max_seq_len=256)
    batch = collate(examples, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.scored_at[batch.answer_at] + 1].long(), batch.answer_ids)
    assert torch.allclose(batch.teacher.sum(-1), torch.ones(len(batch.answer_ids)), atol=1e-6)
    assert bool((batch.teacher.gather(1, batch.answer_ids.unsqueeze(1)) > 0).all())
    assert bool((flat[batch.scored_at] != tokenizer.pad_id).all())
    assert int((flat[batch.scored_at] == tokenizer.assistant_id).sum()) == len(rows)
    assert batch.n_tokens == int((batch.input_ids != tokenizer.pad_id).sum())


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_an_epoch_contains_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    examples = [example(length, 1) for length in lengths]

    def epoch() -> list[list[Example]]:
        generator = torch.Generator().manual_seed(seed)
        return list(epoch_batches(examples, batch_size=batch_size, generator=generator))

    batches = epoch()
    assert len(batches) == n_batches(len(examples), batch_size)
    assert sorted(id(item) for batch in batches for item in batch) == sorted(map(id, examples))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert [[id(item) for item in batch] for batch in batches] == [[id(item) for item in b] for b in epoch()]


def test_epochs_differ_and_have_little_padding(rows: list[Row], tokenizer: Tokenizer) -> None:
    examples = encode_rows(rows, tokenizer, max_seq_len=256)
    generator = torch.Generator().manual_seed(0)
    first, second = (list(epoch_batches(examples, batch_size=8, generator=generator)) for _ in range(2))
    assert first != second
    padded = sum(len(batch) * max(len(item.tokens) for item in batch) for batch in first)
    assert sum(len(item.tokens) for item in examples) / padded > 0.9
