"""The bound of two programs' difference in float32."""

from __future__ import annotations

import math

import pytest

from coremill.core.gates import Outcome
from coremill.core.parity import relative_bound


@pytest.mark.parametrize("own_err", [0.0, 1e-6, 2.4e-6, math.nan])
def test_the_bound_of_most_models_does_not_depend_on_float32(own_err: float) -> None:
    assert relative_bound(own_err) == (1e-5, None)


@pytest.mark.parametrize(
    ("own_err", "limit", "reason"),
    [
        (3e-5, 1.2e-4, "4 times float32's own error, 3e-05 of the largest output"),
        (
            3e-4,
            1e-3,
            "the largest bound there is, less than 4 times float32's own error, 0.0003 of the largest output",
        ),
    ],
)
def test_the_bound_of_a_model_that_float32_computes_less_exactly(own_err: float, limit: float, reason: str) -> None:
    bound = relative_bound(own_err)
    assert bound == (pytest.approx(limit), reason)
    within, beyond = bound.finding(limit * 0.9), bound.finding(limit * 1.1)
    assert (within.outcome, within.reason) == (Outcome.PASSED, reason)
    assert beyond.outcome is Outcome.FAILED
    assert beyond.reason is not None
    assert beyond.reason.endswith(f": {reason}")
