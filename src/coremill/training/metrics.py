"""metrics.jsonl: one record a line, the run first, then each step and each look at the held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from coremill.core.documents import Document, Record
from coremill.core.errors import OutputError
from coremill.core.publish import write_atomic


class RunMetrics(Document, tag_field="kind", tag="run"):
    """The first line: what was trained on what."""

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
    """The weighted sum of the three below."""
    kd: float
    """T² · KL(teacher ‖ student), nats an answer token."""
    ce: float
    """Cross entropy with the sampled answer, nats an answer token."""
    halt: float
    """Cross entropy of the halt head, nats a position."""
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
    """With the teacher's distribution: the entropy and the KL together."""
    teacher_entropy_nats: float
    """The least that the cross entropy can be."""
    halt_accuracy: float | None
    """Share of positions whose halt label the head gives; None without a halt head."""


Metrics = RunMetrics | StepMetrics | HeldoutMetrics


def write_metrics(path: Path, metrics: Iterable[Metrics]) -> None:
    """Write `metrics` to `path`, whole or not at all.

    Raises:
        OutputError: `path` cannot be written.
    """
    try:
        write_atomic(path, b"".join(msgspec.json.encode(record) + b"\n" for record in metrics))
    except OSError as failure:
        raise OutputError(f"cannot write {path}: {failure.strerror}", expected="a writable file") from failure
