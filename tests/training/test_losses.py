"""The losses against their formulas in float64, and the positions that they must ignore."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coremill.core.config import TrainingConfig
from coremill.data.rows import Row
from coremill.data.teacher import entropy
from coremill.model.student import new_student
from coremill.text.student_tokenizer import Tokenizer
from coremill.training.batches import Batch, collate, encode_rows
from coremill.training.losses import (
    distillation_loss,
    learning_rate,
    teacher_entropy,
    teacher_kl,
    training_losses,
)
from coremill.training.recipe import default_recipe

RECIPE = TrainingConfig(
    epochs=1,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.01,
    grad_clip=1.0,
    temperature=2.0,
    kd_weight=0.75,
    halt_weight=0.25,
    seed=0,
)
shapes = st.tuples(st.integers(1, 5), st.integers(2, 9))


@st.composite
def logits_and_teacher(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(shapes)
    logits = draw(arrays(np.float32, shape, elements=st.floats(-8, 8, width=32)))
    weights = draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0])))
    weights[:, 0] += 0.125  # no row of zeros
    return logits, (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over rows of Σ p log(p/q); a p of 0 adds nothing."""
    return float(
        np.mean(
            [
                sum(a * math.log(a / b) for a, b in zip(*pair, strict=True) if a > 0)
                for pair in zip(p, q, strict=True)
            ]
        )
    )


@given(logits_and_teacher(), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_distillation_loss_is_the_softened_kl_times_the_squared_temperature(
    case: tuple[np.ndarray, np.ndarray], temperature: float
) -> None:
    logits, teacher = case
    with np.errstate(divide="ignore"):  # log 0 is -inf, which softmax makes 0 again
        softened = softmax(np.log(teacher.astype(np.float64)) / temperature)
    expected = temperature**2 * kl(softened, softmax(logits.astype(np.float64) / temperature))
    found = float(distillation_loss(torch.from_numpy(logits), torch.from_numpy(teacher), temperature))
    assert found == pytest.approx(expected, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_loss_and_gradient_are_zero_at_the_teacher(temperature: float) -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.01, 0.01, 0.98]])
    logits = (teacher.log() + 7).requires_grad_()  # softmax ignores a constant
    loss = distillation_loss(logits, teacher, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_the_squared_temperature_keeps_the_gradient_at_high_temperature() -> None:
    """Hinton et al. 2015, equation 4: T²·∂KL/∂z tends to (z - v)/V for logits of mean 0."""
    student = torch.tensor([[1.0, -1.0, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    taught = torch.tensor([[0.25, 0.75, -1.5, 0.5]], dtype=torch.float64)
    distillation_loss(student, taught.softmax(-1), 1000.0).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, (student.detach() - taught) / 4, atol=2e-3)


@given(logits_and_teacher())
def test_kl_and_entropy_add_up_to_the_cross_entropy(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, teacher = (torch.from_numpy(values) for values in case)
    total = teacher_kl(logits, teacher) + teacher_entropy(teacher)
    assert torch.allclose(total, -(teacher * logits.log_softmax(-1)).sum(-1), atol=1e-4)
    assert bool((teacher_kl(logits, teacher) > -1e-5).all())


def test_the_entropy_equals_that_of_the_data_package(rows: list[Row], tokenizer: Tokenizer) -> None:
    examples = encode_rows(rows[:20], tokenizer, max_seq_len=256)
    batch = collate(examples, pad_id=0, vocab_size=512)
    expected = [entropy(dist) for example in examples for dist in example.teacher]
    assert teacher_entropy(batch.teacher).tolist() == pytest.approx(expected, abs=1e-5)


def outputs_for(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    n_scored = len(batch.scored_at)
    return torch.randn(n_scored, 512, generator=generator), torch.randn(n_scored, 2, generator=generator)


@pytest.fixture
def batch(rows: list[Row], tokenizer: Tokenizer) -> Batch:
    return collate(encode_rows(rows[:6], tokenizer, max_seq_len=256), pad_id=0, vocab_size=512)


def test_the_total_is_the_weighted_sum(batch: Batch) -> None:
    losses = training_losses(outputs_for(batch), batch, RECIPE)
    assert float(losses.total) == pytest.approx(
        0.75 * float(losses.kd) + 0.25 * float(losses.ce) + 0.25 * float(losses.halt), rel=1e-6
    )
    assert min(float(losses.kd), float(losses.ce), float(losses.halt)) > 0.1
    without_head = training_losses(outputs_for(batch)[:1], batch, RECIPE)
    assert float(without_head.halt) == 0
    assert float(without_head.total) == pytest.approx(0.75 * float(losses.kd) + 0.25 * float(losses.ce), rel=1e-6)


def test_only_answer_tokens_have_gradients(batch: Batch) -> None:
    """Logits at end tokens have no gradient, all others do; every scored position has one for the halt head."""
    logits, halt_logits = (values.requires_grad_() for values in outputs_for(batch))
    training_losses((logits, halt_logits), batch, RECIPE).total.backward()
    assert logits.grad is not None
    assert halt_logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).nonzero().flatten().tolist() == batch.answer_at.tolist()
    assert bool((halt_logits.grad.abs().sum(-1) > 0).all())


def test_padding_does_not_change_the_loss(rows: list[Row], tokenizer: Tokenizer) -> None:
    """Compare six rows alone with the same rows padded to the length of a seventh, which is excluded."""
    student = new_student(default_recipe("toy", vocab_size=512).model, seed=0).eval()
    by_length = sorted(encode_rows(rows, tokenizer, max_seq_len=256), key=lambda example: len(example.tokens))
    alone = collate(by_length[:6], pad_id=0, vocab_size=512)
    beside = collate([*by_length[:6], by_length[-1]], pad_id=0, vocab_size=512)
    assert beside.input_ids.shape[1] > alone.input_ids.shape[1] + 5
    n_scored, n_answer = len(alone.scored_at), len(alone.answer_ids)
    first_six = dataclasses.replace(
        beside,
        scored_at=beside.scored_at[:n_scored],
        halt_labels=beside.halt_labels[:n_scored],
        answer_at=beside.answer_at[:n_answer],
        answer_ids=beside.answer_ids[:n_answer],
        teacher=beside.teacher[:n_answer],
    )
    with torch.no_grad():
        expected, found = (
            training_losses(student.score_at(batch.input_ids, batch.scored_at), batch, RECIPE)
            for batch in (alone, first_six)
        )
    assert [float(loss) for loss in found] == pytest.approx([float(loss) for loss in expected], rel=1e-5)


def rate(step: int, n_steps: int = 101, warmup_steps: int = 10) -> float:
    return learning_rate(step, n_steps, peak=2.0, warmup_steps=warmup_steps)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    assert [rate(step) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rate(10) == pytest.approx(2.0)
    assert rate(55) == pytest.approx((2.0 + 0.2) / 2)  # halfway down the cosine
    assert rate(100) == pytest.approx(0.2)
    assert all(rate(step) > rate(step + 1) for step in range(10, 100))
    assert rate(0, warmup_steps=0) == pytest.approx(2.0)
    assert rate(0, n_steps=1, warmup_steps=0) == pytest.approx(2.0)
