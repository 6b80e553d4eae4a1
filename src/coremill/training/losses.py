"""The training losses, and measures of the student's distance from its teacher.

Legend: V vocabulary, M scored positions of a batch, N answer tokens, as in `batches`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.core.config import TrainingConfig
from coremill.training.batches import Batch


class Losses(NamedTuple):
    """Scalars, each a mean in nats; `total` is the weighted sum that is minimised."""

    total: Tensor
    kd: Tensor
    ce: Tensor
    halt: Tensor
    """0 for a model without a halt head."""


def training_losses(outputs: Sequence[Tensor], batch: Batch, config: TrainingConfig) -> Losses:
    """kd_weight · KD + (1 - kd_weight) · CE + halt_weight · halt, over the answer tokens of `batch`.

    Args:
        outputs: those of `Student.score_at` at the batch's M scored positions.
    """
    logits = outputs[0].index_select(0, batch.answer_at)  # (N, V)
    kd = distillation_loss(logits, batch.teacher, config.temperature)
    ce = F.cross_entropy(logits, batch.answer_ids)
    total = config.kd_weight * kd + (1 - config.kd_weight) * ce
    if len(outputs) == 1:
        return Losses(total, kd, ce, torch.zeros(()))
    halt = F.cross_entropy(outputs[1], batch.halt_labels)
    return Losses(total + config.halt_weight * halt, kd, ce, halt)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, mean over answer tokens: Hinton et al. 2015, arXiv:1503.02531.

    Both distributions are softened: the student's to softmax(logits / T), the teacher's to p^(1/T), normalised,
    which is softmax(log p / T). The factor T² makes the size of the gradient independent of T.

    Args:
        logits: (N, V).
        teacher: (N, V), each row a distribution; zeros stay zeros.
    """
    softened = teacher ** (1 / temperature)
    softened = softened / softened.sum(-1, keepdim=True)
    log_student = F.log_softmax(logits / temperature, dim=-1)
    return F.kl_div(log_student, softened, reduction="batchmean") * temperature**2


def teacher_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each answer token: (N,), nats; logits and teacher (N, V)."""
    return F.kl_div(F.log_softmax(logits, dim=-1), teacher, reduction="none").sum(-1)


def teacher_entropy(teacher: Tensor) -> Tensor:
    """Entropy of the teacher at each answer token: (N,), nats; teacher (N, V)."""
    terms: Tensor = torch.special.entr(teacher)
    return terms.sum(-1)


def learning_rate(step: int, n_steps: int, *, peak: float, warmup_steps: int) -> float:
    """The rate of a step, 0 to n_steps - 1: a linear warm-up to `peak`, then a cosine decay to a tenth of it.

    Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, n_steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
