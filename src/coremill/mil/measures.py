"""How far two arrays are apart: the measures of every comparison, in one place.

All sums are float64.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

MOST_DB = 300.0
"""What `sqnr_db` says of arrays that are equal: a float64 ratio says nothing beyond."""


def max_abs_err(reference: Array, measured: Array) -> float:
    """The largest absolute difference; 0 of nothing."""
    return float(np.abs(_wide(reference) - _wide(measured)).max(initial=0.0))


def sqnr_db(reference: Array, measured: Array) -> float:
    """Signal to quantization noise, 10·log10(Σ r² / Σ (r − m)²) in dB (Oppenheim and Schafer 2010, section 4.8).

    At most `MOST_DB`, which equal values have; 0 for a reference that is all zeros and measured otherwise; NaN
    where a value is not finite.
    """
    return ratio_db(power(reference), power(_wide(reference) - _wide(measured)))


def power(values: Array) -> float:
    """Σ v²."""
    return float(np.square(_wide(values)).sum())


def ratio_db(signal: float, noise: float) -> float:
    """The ratio of two powers in dB; see :func:`sqnr_db` for its ends."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return MOST_DB
    return min(MOST_DB, 10 * math.log10(signal / noise)) if signal else 0.0


def kl_nats(reference: Array, measured: Array) -> Array:
    """KL(softmax r ‖ softmax m) = Σ p·(log p − log q) in nats over the last axis (Kullback and Leibler 1951).

    Returns:
        One number a position: (…,) for logits (…, V).
    """
    log_p, log_q = log_softmax(reference), log_softmax(measured)
    divergence: Array = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return divergence


def log_softmax(logits: Array) -> Array:
    """log softmax over the last axis, in float64 and without overflow."""
    wide = _wide(logits)
    shifted = wide - wide.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _wide(values: Array) -> Array:
    return values.astype(np.float64)
