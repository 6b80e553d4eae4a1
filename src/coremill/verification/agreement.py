"""How far two sets of logits are apart, gathered sequence by sequence.

The measures are those of `coremill.mil.measures`, in float64. Here they are taken together, some rows at a time:
all logits of one sequence may take 800 MB, and a copy in float64 twice that.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coremill.core.documents import Record
from coremill.core.reports import Perplexity
from coremill.mil.measures import ratio_db

Logits = Any
"""np.ndarray (N, V) of floats; numpy has no types where this is checked."""

_CHUNK = 1 << 20
"""Logits that are compared at a time, if one row is not more: their copies stay in a processor's cache."""


class Agreement(Record):
    """How logits (N, V) agree with reference logits (N, V)."""

    max_abs_err: float
    sqnr_db: float
    kl_nats: float
    """KL(reference ‖ measured), the mean over positions."""
    top1_agreement: float
    """Share of the judged positions, less the excluded ones, whose argmax is the same; 0 where all are excluded."""
    positions: int
    """All of them, N."""
    judged: int
    """Those that `top1_agreement` was asked about."""
    excluded: int
    """Of the judged ones, those where the reference's largest logit exceeds its second by no more than the margin:
    there, rounding alone may turn the order."""
    perplexity: Perplexity | None
    """Where the tokens were given."""


class Comparison:
    """All measures of logits against reference logits, gathered sequence by sequence.

    Sums are kept, not logits.

    Args:
        margin: see :attr:`Agreement.excluded`.
    """

    def __init__(self, *, margin: float) -> None:
        self._margin = margin
        self._positions = self._judged = self._counted = self._same = self._predicted = 0
        self._max_abs_err = self._signal = self._noise = self._kl_nats = 0.0
        self._reference_nats = self._measured_nats = 0.0

    def add(
        self,
        reference: Logits,
        measured: Logits,
        *,
        judged: slice | Logits = slice(None),
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Compare `measured` (N, V) with `reference` (N, V) as well.

        Args:
            judged: the positions that the top-1 agreement is about: a slice of them, or (N,) of bools.
            tokens: the N tokens that the logits are of, for the perplexity: row i predicts token i + 1.

        Raises:
            ValueError: the shapes differ, there are no positions, or a value is NaN or infinite.
        """
        if reference.shape != measured.shape or reference.ndim != 2 or not len(reference):
            raise ValueError(f"logits of shape {measured.shape} cannot be compared with {reference.shape}")
        for name, logits in (("reference", reference), ("measured", measured)):
            if bad := sum(int((~np.isfinite(logits[rows])).sum()) for rows in _chunks(logits)):
                raise ValueError(f"{bad} of the {logits.size} {name} logits are NaN or infinite")
        is_judged = np.zeros(len(reference), bool)
        is_judged[judged] = True
        for rows in _chunks(reference):
            following = () if tokens is None else tokens[rows.start + 1 : rows.stop + 1]
            self._add(reference[rows], measured[rows], is_judged[rows], following)

    def _add(self, reference: Logits, measured: Logits, is_judged: Any, following: Sequence[int]) -> None:
        """Add a few rows; `following` are the tokens that the first of them predict."""
        x, y = reference.astype(np.float64), measured.astype(np.float64)
        difference = x - y
        each = np.arange(len(x))
        best = x.argmax(-1)
        first = x[each, best]
        same = y.argmax(-1) == best
        x[each, best] = -np.inf
        counts = is_judged & (first - x.max(-1) > self._margin)
        x[each, best] = first
        self._positions += len(x)
        self._judged += int(is_judged.sum())
        self._counted += int(counts.sum())
        self._same += int(same[counts].sum())
        self._max_abs_err = max(self._max_abs_err, float(np.abs(difference).max()))
        self._signal += float(np.vdot(x, x))
        self._noise += float(np.vdot(difference, difference))
        predicted, tokens = each[: len(following)], np.asarray(following, np.intp)
        said_x, said_y = x[predicted, tokens], y[predicted, tokens]
        log_sum_x, log_sum_y = _log_sum_exp_in_place(x), _log_sum_exp_in_place(y)
        # Σ p·(log p − log q) = Σ p·(x − y) − (log Σ e^x − log Σ e^y), and x holds e^x up to a factor by now.
        mean_difference = np.einsum("nv,nv->n", x, difference) / x.sum(-1)
        self._kl_nats += float((mean_difference - (log_sum_x - log_sum_y)).sum())
        self._predicted += len(following)
        self._reference_nats += float((log_sum_x[predicted] - said_x).sum())
        self._measured_nats += float((log_sum_y[predicted] - said_y).sum())

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
            judged=self._judged,
            excluded=self._judged - self._counted,
            perplexity=self._perplexity(),
        )

    def _perplexity(self) -> Perplexity | None:
        if not self._predicted:
            return None
        reference, measured = (_exp(nats / self._predicted) for nats in (self._reference_nats, self._measured_nats))
        return Perplexity(reference=reference, measured=measured, tokens=self._predicted)


def compare(
    reference: Logits, measured: Logits, *, margin: float, tokens: Sequence[int] | None = None
) -> Agreement:
    """All measures of `measured` (N, V) against `reference` (N, V); raises as :meth:`Comparison.add` does."""
    comparison = Comparison(margin=margin)
    comparison.add(reference, measured, tokens=tokens)
    return comparison.result()


def _chunks(logits: Logits) -> Iterator[slice]:
    """The rows of `logits`, a few at a time."""
    count = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(logits), count):
        yield slice(start, min(start + count, len(logits)))


def _log_sum_exp_in_place(logits: Logits) -> Logits:
    """log Σ e^x of each row; x itself becomes e^(x − max x)."""
    largest = logits.max(-1)
    logits -= largest[:, None]
    np.exp(logits, out=logits)
    return np.log(logits.sum(-1)) + largest


def _exp(nats: float) -> float:
    """e^x; infinite where a float does not hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
