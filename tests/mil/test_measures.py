"""The measures against torch's own, and against values that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coremill.mil.measures import MOST_DB, kl_nats, log_softmax, max_abs_err, sqnr_db

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
