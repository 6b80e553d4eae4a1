"""The training loop: AdamW on the distillation loss; the same seed gives the same tensors."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from coremill.core.config import ModelConfig, TrainingConfig
from coremill.core.errors import TrainingError
from coremill.model.student import Student, new_student
from coremill.training.batches import Example, collate, epoch_batches, n_batches
from coremill.training.losses import (
    learning_rate,
    teacher_entropy,
    teacher_kl,
    training_losses,
)
from coremill.training.metrics import HeldoutMetrics, Metrics, RunMetrics, StepMetrics

log = logging.getLogger(__name__)

N_THREADS = 1
"""Fixed, because the number of threads determines the order of summation, and so the last bits of a sum. A second
thread gains nothing for so small a model, and slows training tenfold if another process uses the cores."""

_ADAM_BETAS = (0.9, 0.95)
"""Those of GPT-3 and Llama. With 0.999, the second moment of a short run would still depend on its start."""

_EVALUATION_BATCH = 128

Watch = Callable[[Metrics], None]
"""Receives each record when it is made, for a progress bar or a log."""


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The result of a training run."""

    student: Student
    """In evaluation mode."""
    steps: int
    metrics: tuple[Metrics, ...]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [record.loss for record in self.metrics if isinstance(record, StepMetrics)]

    @property
    def heldout(self) -> HeldoutMetrics | None:
        """The last evaluation on the held-out rows; None if there are none."""
        evaluations = [record for record in self.metrics if isinstance(record, HeldoutMetrics)]
        return evaluations[-1] if evaluations else None


def distill(
    train: Sequence[Example],
    heldout: Sequence[Example],
    *,
    model: ModelConfig,
    recipe: TrainingConfig,
    pad_id: int,
    watch: Watch | None = None,
) -> Distilled:
    """Train a new student on `train`, and evaluate it on `heldout`, if any, after each epoch.

    On one machine, the same arguments give the same tensors, bit for bit; another processor may round differently.

    Raises:
        TrainingError: there are no rows, the warm-up is longer than the run, or a loss or gradient is not finite.
    """
    n_steps = recipe.epochs * n_batches(len(train), recipe.batch_size)
    if not train:
        raise TrainingError("there are no rows to train on")
    if recipe.warmup_steps >= n_steps:
        raise TrainingError(
            f"the warm-up has {recipe.warmup_steps} steps, the run has {n_steps}",
            expected="a warm-up shorter than the run: more rows or epochs, or fewer `warmup_steps`",
        )
    metrics: list[Metrics] = []

    def note(record: Metrics) -> None:
        metrics.append(record)
        if watch is not None:
            watch(record)

    student = new_student(model, seed=recipe.seed)
    note(
        RunMetrics(
            parameters=student.n_parameters,
            rows=len(train),
            heldout_rows=len(heldout),
            steps=n_steps,
            seed=recipe.seed,
        )
    )
    with _fixed_threads():
        step = 0
        optimizer = _optimizer(student, recipe)
        generator = torch.Generator().manual_seed(recipe.seed)
        for _ in range(recipe.epochs):
            for examples in epoch_batches(train, batch_size=recipe.batch_size, generator=generator):
                note(_step(student, optimizer, examples, recipe, step=step, n_steps=n_steps, pad_id=pad_id))
                step += 1
            if heldout:
                note(evaluate(student, heldout, step=step, pad_id=pad_id))
    student.eval()
    return Distilled(student=student, steps=step, metrics=tuple(metrics))


def _optimizer(student: Student, recipe: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), with weight decay for matrices, not for norms."""
    parameters = list(student.parameters())
    return torch.optim.AdamW(
        [
            {"params": [item for item in parameters if item.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [item for item in parameters if item.dim() < 2], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=_ADAM_BETAS,
        fused=True,
    )


def _step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    recipe: TrainingConfig,
    *,
    step: int,
    n_steps: int,
    pad_id: int,
) -> StepMetrics:
    """One optimizer step on `examples`."""
    start = time.perf_counter()
    rate = learning_rate(step, n_steps, peak=recipe.learning_rate, warmup_steps=recipe.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    batch = collate(examples, pad_id=pad_id, vocab_size=student.config.vocab_size)
    losses = training_losses(student.score_at(batch.input_ids, batch.scored_at), batch, recipe)
    optimizer.zero_grad()
    losses.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.grad_clip).item()
    total, kd, ce, halt = (loss.item() for loss in losses)
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise TrainingError(
            f"training diverged at step {step + 1} of {n_steps}: loss {total}, norm of the gradient {norm}",
            expected=f"finite values; try a `learning_rate` below {recipe.learning_rate:g}",
        )
    optimizer.step()
    return StepMetrics(
        step=step + 1,
        loss=total,
        kd=kd,
        ce=ce,
        halt=halt,
        lr=rate,
        tokens_per_s=batch.n_tokens / (time.perf_counter() - start),
    )


@torch.no_grad()
def evaluate(student: Student, examples: Sequence[Example], *, step: int, pad_id: int) -> HeldoutMetrics:
    """Measure the distance of `student` from its teacher on `examples`."""
    was_training = student.training
    student.eval()
    kl = entropy = halted = 0.0
    n_tokens = n_positions = 0
    alike = sorted(examples, key=lambda example: len(example.tokens))
    for first in range(0, len(alike), _EVALUATION_BATCH):
        batch = collate(
            alike[first : first + _EVALUATION_BATCH], pad_id=pad_id, vocab_size=student.config.vocab_size
        )
        outputs = student.score_at(batch.input_ids, batch.scored_at)
        logits = outputs[0].index_select(0, batch.answer_at)  # (N, V)
        kl += float(teacher_kl(logits, batch.teacher).sum())
        entropy += float(teacher_entropy(batch.teacher).sum())
        n_tokens += len(batch.answer_ids)
        if len(outputs) == 2:
            halted += int((outputs[1].argmax(-1) == batch.halt_labels).sum())
            n_positions += len(batch.halt_labels)
    student.train(was_training)
    return HeldoutMetrics(
        step=step,
        rows=len(examples),
        answer_tokens=n_tokens,
        kl_nats=kl / n_tokens,
        cross_entropy_nats=(kl + entropy) / n_tokens,
        teacher_entropy_nats=entropy / n_tokens,
        halt_accuracy=halted / n_positions if n_positions else None,
    )


@contextlib.contextmanager
def _fixed_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(N_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
