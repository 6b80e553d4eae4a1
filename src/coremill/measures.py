"""How far two arrays are apart: SQNR, KL divergence, largest error, top-1 agreement and perplexity.

Every comparison uses these. All sums are float64. Depends on numpy alone.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.generic]
Float32Array: TypeAlias = npt.NDArray[np.float32]
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
        self._sums = _Sums()

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
        is_judged = np.zeros(len(reference), bool)
        is_judged[judged] = True

        def sums_of(rows: slice) -> _Sums:
            following = () if tokens is None else tokens[rows.start + 1 : rows.stop + 1]
            return _sums(reference[rows], measured[rows], is_judged[rows], following, self._margin)

        with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy uses one
            total = functools.reduce(_Sums.plus, threads.map(sums_of, _chunks(reference)))
        if not (math.isfinite(total.signal) and math.isfinite(total.noise)):
            for name, logits in (("reference", reference), ("measured", measured)):
                if bad := sum(int((~np.isfinite(logits[rows])).sum()) for rows in _chunks(logits)):
                    raise ValueError(f"{bad} of the {logits.size} {name} logits are NaN or infinite")
        self._sums = self._sums.plus(total)

    def result(self) -> Agreement:
        """Return the measures over everything that was added.

        Raises:
            ValueError: nothing was added.
        """
        sums = self._sums
        if not sums.positions:
            raise ValueError("nothing was compared")
        count = sums.predicted
        return Agreement(
            max_abs_err=sums.max_abs_err,
            sqnr_db=ratio_db(sums.signal, sums.noise),
            kl_nats=sums.kl_nats / sums.positions,
            top1_agreement=sums.same / sums.counted if sums.counted else 0.0,
            positions=sums.positions,
            judged=sums.judged,
            excluded=sums.judged - sums.counted,
            cross_entropies=CrossEntropies(sums.reference_nats / count, sums.measured_nats / count, count)
            if count
            else None,
        )


class _Sums(NamedTuple):
    """What :class:`Comparison` keeps of the positions that were compared."""

    positions: int = 0
    judged: int = 0
    counted: int = 0
    """Judged and not excluded."""
    same: int = 0
    """Counted, with the same argmax."""
    predicted: int = 0
    max_abs_err: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    kl_nats: float = 0.0
    reference_nats: float = 0.0
    measured_nats: float = 0.0

    def plus(self, other: _Sums) -> _Sums:
        added = _Sums(*(own + more for own, more in zip(self, other, strict=True)))
        return added._replace(max_abs_err=max(self.max_abs_err, other.max_abs_err))


def _sums(
    reference: Floats,
    measured: Floats,
    is_judged: npt.NDArray[np.bool_],
    following: Sequence[int],
    margin: float,
) -> _Sums:
    """Compare a few rows; the first rows predict the tokens `following`."""
    with np.errstate(all="ignore"):  # the caller looks for values that are not finite
        x, y = _wide(reference), _wide(measured)
        difference = x - y
        each = np.arange(len(x))
        best = x.argmax(-1)
        first = x[each, best]
        same = y.argmax(-1) == best
        x[each, best] = -np.inf
        counts = is_judged & (first - x.max(-1) > margin)
        x[each, best] = first
        signal, noise = float(np.vdot(x, x)), float(np.vdot(difference, difference))
        max_abs_err = float(max(difference.max(), -difference.min()))
        predicted, tokens = each[: len(following)], np.asarray(following, np.intp)
        said_x, said_y = x[predicted, tokens], y[predicted, tokens]
        log_sum_x, log_sum_y = _log_sum_exp_in_place(x), _log_sum_exp_in_place(y)
        # Σ p·(log p − log q) = Σ p·(x − y) − (log Σ e^x − log Σ e^y), and x holds e^x up to a factor by now.
        mean_difference = np.einsum("nv,nv->n", x, difference) / x.sum(-1)
    return _Sums(
        positions=len(x),
        judged=int(is_judged.sum()),
        counted=int(counts.sum()),
        same=int(same[counts].sum()),
        predicted=len(following),
        max_abs_err=max_abs_err,
        signal=signal,
        noise=noise,
        kl_nats=float((mean_difference - (log_sum_x - log_sum_y)).sum()),
        reference_nats=float((log_sum_x[predicted] - said_x).sum()),
        measured_nats=float((log_sum_y[predicted] - said_y).sum()),
    )


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
