"""The measures against torch's own, and against values that can be worked out by hand."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coremill.measures import MOST_DB, Comparison, compare, kl_nats, log_softmax, max_abs_err, sqnr_db

LOGITS = arrays(np.float32, (5, 7), elements=st.floats(-60, 60, width=32))


@given(reference=LOGITS, measured=LOGITS)
def test_kl_is_torchs(reference, measured):
    wide = [torch.from_numpy(side.astype(np.float64)) for side in (reference, measured)]
    expected = F.kl_div(F.log_softmax(wide[1], -1), F.log_softmax(wide[0], -1), log_target=True, reduction="none")
    np.testing.assert_allclose(kl_nats(reference, measured), expected.sum(-1).numpy(), atol=1e-9)


@given(logits=LOGITS)
def test_log_softmax_is_torchs_and_does_not_overflow(logits):
    big = logits.astype(np.float64) * 1e3
    np.testing.assert_allclose(log_softmax(big), torch.log_softmax(torch.from_numpy(big), -1).numpy(), atol=1e-9)


def test_kl_of_two_known_distributions():
    """KL((1/2, 1/2) ‖ (3/4, 1/4)) = 1/2·log(2/3) + 1/2·log(2) = log(2) − log(3)/2."""
    reference = np.log(np.array([[0.5, 0.5]]))
    measured = np.log(np.array([[0.75, 0.25]]))
    assert kl_nats(reference, measured)[0] == pytest.approx(math.log(2) - math.log(3) / 2, abs=1e-12)


@pytest.mark.parametrize(("factor", "expected"), [(1.01, 40.0), (1.1, 20.0), (2.0, 0.0), (0.0, 0.0)])
def test_a_relative_error_is_that_many_decibels(factor, expected):
    reference = np.random.default_rng(0).standard_normal((8, 16))
    assert sqnr_db(reference, reference * factor) == pytest.approx(expected, abs=1e-9)


def test_sqnr_at_its_ends():
    zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
    assert sqnr_db(ones, ones) == MOST_DB
    assert sqnr_db(zeros, zeros) == MOST_DB
    assert sqnr_db(zeros, ones) == 0.0
    assert sqnr_db(ones, ones + 1e-20) == MOST_DB
    for value in (math.nan, math.inf, -math.inf):
        assert math.isnan(sqnr_db(ones, np.array([[1, 1, 1], [1, value, 1]])))


def test_max_abs_err_takes_the_worst():
    assert max_abs_err(np.array([[0.0, 1.0, -2.0]]), np.array([[0.5, 1.0, 1.0]])) == 3.0


# --- gathered sequence by sequence


def test_positions_within_the_margin_are_left_out_and_counted():
    reference = np.array([[1.0, 0.0, 0.0], [0.52, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.05, 0.0]])
    measured = np.array([[2.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    # Position 1 is nearly a tie and 3 exactly at the margin; of the other two, one agrees.
    agreement = compare(reference, measured, margin=0.05)
    assert (agreement.top1_agreement, agreement.positions, agreement.judged, agreement.excluded) == (0.5, 4, 4, 2)
    strict = compare(reference, measured, margin=0.0)
    assert (strict.top1_agreement, strict.excluded) == (0.5, 0)
    assert compare(reference, measured, margin=10.0).excluded == 4


def test_two_logits_of_one_size_are_a_tie():
    tie = np.array([[3.0, 3.0, 0.0]])
    assert compare(tie, tie, margin=0.0).excluded == 1


def test_top_1_agreement_is_about_the_judged_positions_and_the_rest_about_all():
    reference = np.eye(4, dtype=np.float32)
    measured = reference.copy()
    measured[0] = [0, 0, 0, 5]
    comparison = Comparison(margin=0.05)
    comparison.add(reference, measured, judged=slice(1, -1))
    found = comparison.result()
    assert (found.top1_agreement, found.positions, found.judged, found.max_abs_err) == (1.0, 4, 2, 5.0)
    none = Comparison(margin=0.05)
    none.add(reference, measured, judged=slice(0, 0))
    assert (none.result().top1_agreement, none.result().judged) == (0.0, 0)


@given(reference=LOGITS, measured=LOGITS)
def test_the_measures_are_those_of_all_logits_at_once(reference, measured):
    found = compare(reference, measured, margin=0.05)
    assert found.max_abs_err == max_abs_err(reference, measured)
    assert found.sqnr_db == pytest.approx(sqnr_db(reference, measured), abs=1e-9)
    assert found.kl_nats == pytest.approx(kl_nats(reference, measured).mean(), abs=1e-12, rel=1e-12)


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


@given(
    logits=st.tuples(LOGITS, LOGITS),
    tokens=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    rows=st.integers(1, 4),
)
def test_cross_entropies_are_torchs(logits, tokens, rows, monkeypatch_chunks):
    monkeypatch_chunks(7 * rows)  # however the rows are cut into chunks, each predicts the token after its own
    found = compare(*logits, margin=0.05, tokens=tokens).cross_entropies
    following = torch.tensor(tokens[1:])
    for side, value in zip(logits, found[:2], strict=True):
        expected = F.cross_entropy(torch.from_numpy(side[:-1]).double(), following)
        assert value == pytest.approx(float(expected), abs=1e-9)
    assert found.tokens == 4


@pytest.fixture(scope="module")
def monkeypatch_chunks():
    with pytest.MonkeyPatch.context() as patch:
        yield lambda size: patch.setattr("coremill.measures._CHUNK", size)


def test_one_token_or_none_gives_no_cross_entropies():
    logits = np.zeros((1, 3), np.float32)
    assert compare(logits, logits, margin=0.05, tokens=[0]).cross_entropies is None
    assert compare(logits, logits, margin=0.05).cross_entropies is None


def test_nothing_compared_is_no_agreement():
    with pytest.raises(ValueError, match=r"^nothing was compared$"):
        Comparison(margin=0.05).result()


@given(reference=LOGITS)
def test_equal_logits_agree_in_everything(reference):
    agreement = compare(reference, reference.copy(), margin=0.05)
    assert (agreement.max_abs_err, agreement.sqnr_db, agreement.positions) == (0.0, MOST_DB, 5)
    assert agreement.kl_nats == pytest.approx(0, abs=1e-12)
    assert agreement.top1_agreement == (0.0 if agreement.excluded == 5 else 1.0)


def test_a_comparison_takes_little_memory_beside_the_logits():
    logits = np.zeros((2048, 4096), np.float32)  # 34 MB, and 67 MB in float64
    tracemalloc.start()
    compare(logits, logits, margin=0.05, tokens=[0] * 2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


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
