"""What is gathered sequence by sequence, and what cannot be compared; the measures have tests of their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coremill.conversion.agreement import Comparison, compare, top1_counts
from coremill.mil.measures import MOST_DB

LOGITS = arrays(np.float32, (5, 7), elements=st.floats(-60, 60, width=32))


def test_positions_within_the_margin_are_left_out_and_counted():
    reference = np.array([[1.0, 0.0, 0.0], [0.52, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.05, 0.0]])
    measured = np.array([[2.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    # Position 1 is nearly a tie and 3 exactly at the margin; of the other two, one agrees.
    assert top1_counts(reference, measured, margin=0.05) == (2, 1)
    assert top1_counts(reference, measured, margin=0.0) == (4, 2)
    assert top1_counts(reference, measured, margin=10.0) == (0, 0)
    agreement = compare(reference, measured, margin=0.05)
    assert (agreement.top1_agreement, agreement.positions, agreement.excluded) == (0.5, 4, 2)


@given(reference=LOGITS, measured=LOGITS, cut=st.integers(1, 4))
def test_parts_add_up_to_the_whole(reference, measured, cut):
    parts = Comparison(margin=0.05)
    for part in (slice(0, cut), slice(cut, None)):
        parts.add(reference[part], measured[part])
    found, whole = parts.result(), compare(reference, measured, margin=0.05)
    assert (found.positions, found.excluded, found.max_abs_err) == (
        whole.positions,
        whole.excluded,
        whole.max_abs_err,
    )
    assert found.top1_agreement == whole.top1_agreement
    assert found.kl_nats == pytest.approx(whole.kl_nats, abs=1e-9)
    assert found.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-6)


def test_nothing_compared_is_no_agreement():
    with pytest.raises(ValueError, match=r"^nothing was compared$"):
        Comparison(margin=0.05).result()


@given(reference=LOGITS)
def test_equal_logits_agree_in_everything(reference):
    agreement = compare(reference, reference.copy(), margin=0.05)
    assert (agreement.max_abs_err, agreement.sqnr_db, agreement.positions) == (0.0, MOST_DB, 5)
    assert agreement.kl_nats == pytest.approx(0, abs=1e-12)
    assert agreement.top1_agreement == (0.0 if agreement.excluded == 5 else 1.0)


@pytest.mark.parametrize(("side", "value"), [("reference", np.nan), ("measured", np.inf), ("measured", -np.inf)])
def test_values_that_are_not_finite_are_refused(side, value):
    sides = {"reference": np.ones((2, 3)), "measured": np.ones((2, 3))}
    sides[side][1, 2] = value
    with pytest.raises(ValueError, match=f"^1 of the 6 {side} logits are NaN or infinite$"):
        compare(**sides, margin=0.05)


@pytest.mark.parametrize(("left", "right"), [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_what_cannot_be_compared_is_refused(left, right):
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(np.ones(left), np.ones(right), margin=0.05)
