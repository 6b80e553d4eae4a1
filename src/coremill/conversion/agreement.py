"""How far two sets of logits are apart, gathered sequence by sequence.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coremill.core.documents import Record
from coremill.mil.measures import kl_nats, max_abs_err, power, ratio_db

Logits = Any
"""np.ndarray (N, V) of floats; numpy has no types where this is checked."""


class Agreement(Record):
    """How logits (N, V) agree with reference logits (N, V)."""

    max_abs_err: float
    sqnr_db: float
    kl_nats: float
    top1_agreement: float
    positions: int
    """All of them, N."""
    excluded: int
    """Positions left out of `top1_agreement`, which is 0 where all are."""


class Comparison:
    """All measures of logits against reference logits, gathered sequence by sequence.

    Sums are kept, not logits: those of one sequence may take hundreds of megabytes.
    """

    def __init__(self, *, margin: float) -> None:
        self._margin = margin
        self._positions = self._counted = self._same = 0
        self._max_abs_err = self._signal = self._noise = self._kl_nats = 0.0

    def add(self, reference: Logits, measured: Logits) -> None:
        """Compare `measured` (N, V) with `reference` (N, V) as well.

        Raises:
            ValueError: the shapes differ, there are no positions, or a value is NaN or infinite.
        """
        if reference.shape != measured.shape or reference.ndim != 2 or not len(reference):
            raise ValueError(f"logits of shape {measured.shape} cannot be compared with {reference.shape}")
        for name, logits in (("reference", reference), ("measured", measured)):
            if bad := int((~np.isfinite(logits)).sum()):
                raise ValueError(f"{bad} of the {logits.size} {name} logits are NaN or infinite")
        self._max_abs_err = max(self._max_abs_err, max_abs_err(reference, measured))
        self._signal += power(reference)
        self._noise += power(reference.astype(np.float64) - measured.astype(np.float64))
        self._kl_nats += float(kl_nats(reference, measured).sum())
        counted, same = top1_counts(reference, measured, margin=self._margin)
        self._positions += len(reference)
        self._counted += counted
        self._same += same

    def result(self) -> Agreement:
        """The measures over everything that was added; a ValueError if nothing was."""
        if not self._positions:
            raise ValueError("nothing was compared")
        return Agreement(
            max_abs_err=self._max_abs_err,
            sqnr_db=ratio_db(self._signal, self._noise),
            kl_nats=self._kl_nats / self._positions,
            top1_agreement=self._same / self._counted if self._counted else 0.0,
            positions=self._positions,
            excluded=self._positions - self._counted,
        )


def compare(reference: Logits, measured: Logits, *, margin: float) -> Agreement:
    """All measures of `measured` (N, V) against `reference` (N, V); raises as :meth:`Comparison.add` does."""
    comparison = Comparison(margin=margin)
    comparison.add(reference, measured)
    return comparison.result()


def top1_counts(reference: Logits, measured: Logits, *, margin: float) -> tuple[int, int]:
    """How many positions the top-1 agreement is about, and at how many of them the argmax is the same.

    A position counts where the reference's largest logit exceeds its second by more than `margin`: below it,
    rounding alone may turn the order.
    """
    second, first = np.partition(reference.astype(np.float64), -2, axis=-1)[:, -2:].T  # (N,) each
    counts = (first - second) > margin
    same = reference.argmax(-1) == measured.argmax(-1)
    return int(counts.sum()), int(same[counts].sum())
