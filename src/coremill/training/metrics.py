"""metrics.jsonl: one record per line, first the run, then each step and each evaluation on the held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from coremill.core.documents import Document, Record
from coremill.core.publish import write_atomic


class RunMetrics(Document, tag_field="kind", tag="run"):
    """The first line: the sizes of the model, the data and the run."""

    parameters: int
    rows: int
    heldout_rows: int
    steps: int
    seed: int


class StepMetrics(Record, tag_field="kind", tag="step"):
    """One optimizer step."""

    step: int
    """Counts from 1."""
    loss: float
    """The weighted sum of the next three."""
    kd: float
    """T² · KL(teacher ‖ student), nats per answer token."""
    ce: float
    """Cross entropy with the sampled answer, nats per answer token."""
    halt: float
    """Cross entropy of the halt head, nats per position."""
    lr: float
    tokens_per_s: float
    """Tokens of prompts and answers, without padding."""


class HeldoutMetrics(Record, tag_field="kind", tag="heldout"):
    """The student on held-out rows; means over answer tokens, at temperature 1."""

    step: int
    rows: int
    answer_tokens: int
    kl_nats: float
    """KL(teacher ‖ student)."""
    cross_entropy_nats: float
    """Cross entropy with the teacher's distribution: the sum of its entropy and the KL."""
    teacher_entropy_nats: float
    """The lower bound of the cross entropy."""
    halt_accuracy: float | None
    """Share of positions at which the halt head predicts the label; None without a halt head."""


Metrics = RunMetrics | StepMetrics | HeldoutMetrics


def write_metrics(path: Path, metrics: Iterable[Metrics]) -> None:
    """Write `metrics` to `path` atomically.

    Raises:
        OutputError: `path` cannot be written.
    """
    write_atomic(path, b"".join(msgspec.json.encode(record) + b"\n" for record in metrics))
