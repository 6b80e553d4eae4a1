"""How far two arrays are apart: SQNR, KL divergence, largest error, top-1 agreement and perplexity.

Every comparison uses these. All sums are float64. Depends on numpy alone.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.generic]
Floats: TypeAlias = npt.NDArray[np.floating]
Wide: TypeAlias = npt.NDArray[np.float64]

MOST_DB = 300.0
"""The value of `sqnr_db` for equal arrays: float64 cannot resolve a larger ratio."""

_CHUNK = 1 << 20
"""Logits that are compared at a time (at least one row): their float64 copies fit into a processor's cache."""


def max_abs_err(reference: Array, measured: Array) -> float:
    """Return the largest absolute difference; 0 for empty arrays."""
    return float(np.abs(_wide(reference) - _wide(measured)).max(initial=0.0))


def sqnr_db(reference: Array, measured: Array) -> float:
    """Signal-to-quantisation-noise ratio, 10·log10(Σ r² / Σ (r − m)²) in dB (Oppenheim and Schafer 2010, 4.8).

    At most `MOST_DB`, the value for equal arrays; 0 if the reference is all zeros and `measured` is not; NaN if a
    value is not finite.
    """
    signal = noise = 0.0
    for r, m in zip(_parts(reference), _parts(measured), strict=True):
        signal += power(r)
        noise += power(_wide(r) - _wide(m))
    return ratio_db(signal, noise)


def power(values: Array) -> float:
    """Return Σ v²."""
    return float(np.square(_wide(values)).sum())


def ratio_db(signal: float, noise: float) -> float:
    """Return the ratio of two powers in dB; :func:`sqnr_db` documents the limits."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return MOST_DB
    return min(MOST_DB, 10 * math.log10(signal / noise)) if signal else 0.0


def kl_nats(reference: Floats, measured: Floats) -> Wide:
    """KL(softmax r ‖ softmax m) = Σ p·(log p − log q) in nats over the last axis (Kullback and Leibler 1951).

    Returns:
        One value per position: (…,) for logits (…, V).
    """
    rows = reference.reshape(-1, reference.shape[-1]), measured.reshape(-1, measured.shape[-1])
    divergence = np.empty(len(rows[0]))
    for chunk in _chunks(rows[0]):
        log_p, log_q = (log_softmax(side[chunk]) for side in rows)
        divergence[chunk] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return divergence.reshape(reference.shape[:-1])


def log_softmax(logits: Floats) -> Wide:
    """Return log softmax over the last axis, in float64 and without overflow."""
    wide = _wide(logits)
    shifted = wide - wide.max(-1, keepdims=True)
    result: Wide = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


class CrossEntropies(NamedTuple):
    """How well two sets of logits predict one text."""

    reference_nats: float
    """Mean cross entropy of the reference logits, in nats per token."""
    measured_nats: float
    """Mean cross entropy of the measured logits, in nats per token."""
    tokens: int
    """Number of predicted tokens."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How logits (N, V) agree with reference logits (N, V)."""

    max_abs_err: float
    sqnr_db: float
    kl_nats: float
    """KL(reference ‖ measured), the mean over positions."""
    top1_agreement: float
    """Share of the judged, not excluded positions whose argmax is the same; 0 if all are excluded."""
    positions: int
    """All positions, N."""
    judged: int
    """The positions that `top1_agreement` considers, before the exclusion."""
    excluded: int
    """The judged positions at which the reference's largest logit exceeds its second largest by no more than the
    margin: rounding alone may change their order."""
    cross_entropies: CrossEntropies | None
    """None if no tokens were given."""


class Comparison:
    """Every measure of logits against reference logits, accumulated sequence by sequence.

    The measures are taken in one pass over a few rows at a time: all logits of one sequence may take 800 MB, and a
    float64 copy twice that. Sums are kept, not logits.

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
        reference: Floats,
        measured: Floats,
        *,
        judged: slice | npt.NDArray[np.bool_] = slice(None),
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Compare `measured` (N, V) with `reference` (N, V) as well.

        Args:
            judged: the positions that top-1 agreement considers: a slice, or (N,) of bools.
            tokens: the N tokens that the logits belong to, for the perplexity: row i predicts token i + 1.

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

    def _add(
        self, reference: Floats, measured: Floats, is_judged: npt.NDArray[np.bool_], following: Sequence[int]
    ) -> None:
        """Add a few rows; the first rows predict the tokens `following`."""
        x, y = _wide(reference), _wide(measured)
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
        """Return the measures over everything that was added.

        Raises:
            ValueError: nothing was added.
        """
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
            cross_entropies=self._cross_entropies(),
        )

    def _cross_entropies(self) -> CrossEntropies | None:
        count = self._predicted
        return CrossEntropies(self._reference_nats / count, self._measured_nats / count, count) if count else None


def compare(
    reference: Floats, measured: Floats, *, margin: float, tokens: Sequence[int] | None = None
) -> Agreement:
    """Return every measure of `measured` (N, V) against `reference`; raises as :meth:`Comparison.add` does."""
    comparison = Comparison(margin=margin)
    comparison.add(reference, measured, tokens=tokens)
    return comparison.result()


def _wide(values: Array) -> Wide:
    return values.astype(np.float64)


def _parts(values: Array) -> list[Array]:
    """Return the elements in order, in parts: a float64 copy of all logits may take 1.6 GB."""
    flat = values.reshape(-1)
    return [flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK)]


def _chunks(logits: Floats) -> Iterator[slice]:
    """Yield the rows of `logits` (N, V), a few at a time."""
    count = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(logits), count):
        yield slice(start, min(start + count, len(logits)))


def _log_sum_exp_in_place(logits: Wide) -> Wide:
    """Return log Σ e^x of each row; x itself becomes e^(x − max x)."""
    largest = logits.max(-1)
    logits -= largest[:, None]
    np.exp(logits, out=logits)
    result: Wide = np.log(logits.sum(-1)) + largest
    return result
