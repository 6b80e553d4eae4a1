"""Gates: no outcome without a reason, and the rules for `gates_ok` and the exit code."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremill.core.gates import (
    Gate,
    Outcome,
    PlatformReason,
    Severity,
    at_least,
    at_most,
    failed,
    gates_ok,
    most_of,
    must_gates_ok,
    not_run,
    passed,
)

MUST, SHOULD, NICE = Severity.MUST, Severity.SHOULD, Severity.NICE
MAC = PlatformReason.NEEDS_MACOS


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.NOT_RUN])
def test_a_gate_that_did_not_pass_says_why(outcome):
    with pytest.raises(ValueError, match=f"gate 'g' is {outcome.value} without a reason"):
        Gate(name="g", severity=MUST, outcome=outcome)


def test_only_a_gate_that_did_not_run_has_a_platform_reason():
    with pytest.raises(ValueError, match="gate 'g' is failed and gives a platform reason"):
        Gate(name="g", severity=SHOULD, outcome=Outcome.FAILED, reason="x", platform_reason=MAC)


@pytest.mark.parametrize(
    ("gates", "ok", "must"),
    [
        ([], False, False),
        ([passed().gate("a", MUST)], True, True),
        ([passed().gate("a", NICE)], False, False),
        ([passed().gate("a", SHOULD)], True, False),
        ([passed().gate("a", MUST), failed("r").gate("b", SHOULD)], False, True),
        ([passed().gate("a", MUST), failed("r").gate("b", NICE)], True, True),
        ([passed().gate("a", MUST), not_run("r").gate("b", NICE)], True, True),
        ([passed().gate("a", MUST), not_run("r").gate("b", SHOULD)], False, True),
        ([passed().gate("a", MUST), not_run("r", MAC).gate("b", SHOULD)], True, True),
        ([passed().gate("a", MUST), not_run("r").gate("b", MUST)], False, False),
        ([passed().gate("a", MUST), not_run("r", MAC).gate("b", MUST)], False, False),
        ([failed("r").gate("a", MUST)], False, False),
    ],
)
def test_the_rules(gates, ok, must):
    assert (gates_ok(gates), must_gates_ok(gates)) == (ok, must)


GATES = st.builds(
    lambda severity, outcome, platform: Gate(
        name="g",
        severity=severity,
        outcome=outcome,
        reason="r",
        platform_reason=platform if outcome is Outcome.NOT_RUN else None,
    ),
    st.sampled_from(Severity),
    st.sampled_from(Outcome),
    st.sampled_from([None, *PlatformReason]),
)


@given(st.lists(GATES, max_size=5))
def test_gates_ok_with_a_must_gate_implies_the_must_gates(gates):
    if gates_ok(gates) and any(gate.severity is MUST for gate in gates):
        assert must_gates_ok(gates)


@given(st.lists(GATES, max_size=5), GATES)
def test_a_further_gate_never_mends_a_failed_one(gates, gate):
    if any(each.outcome is Outcome.FAILED and each.severity is not NICE for each in gates):
        assert not gates_ok([*gates, gate])


def test_figures_are_compared_and_kept():
    assert at_least(41.0, 40.0).gate("sqnr", MUST).outcome is Outcome.PASSED
    assert at_most(0.02, 0.02).gate("kl", MUST).outcome is Outcome.PASSED
    gate = at_least(39.5, 40.0, " dB").gate("sqnr", MUST)
    assert (gate.outcome, gate.reason) == (Outcome.FAILED, "39.5 dB is below 40 dB")
    assert at_most(0.5, 0.02, " nats").gate("kl", MUST).reason == "0.5 nats is above 0.02 nats"


def test_a_nan_passes_no_gate():
    assert at_least(math.nan, 0.0).gate("a", MUST).outcome is Outcome.FAILED
    assert at_most(math.nan, 0.0).gate("a", MUST).outcome is Outcome.FAILED


@pytest.mark.parametrize(
    ("count", "share", "most"),
    [
        # Of Binomial(16, 0.025): P(X <= 1) = 0.9406, P(X <= 2) = 0.9936.
        (16, 0.05, 2),
        # Of Binomial(100, 0.01): P(X <= 3) = 0.9816, P(X <= 4) = 0.9966.
        (100, 0.02, 4),
        (1, 0.05, 1),
        (1, 0.02, 0),
        (0, 0.05, 0),
        (100, 0.29, 29),
        (1000, 0.02, 20),
        (5000, 0.05, 250),
        (40, 0.0, 0),
        (40, 1.0, 40),
    ],
)
def test_few_positions_are_judged_by_chance_and_many_by_their_share(count, share, most):
    assert most_of(count, share) == most


@given(st.integers(0, 300), st.floats(0, 1))
def test_the_binomial_bound_is_the_smallest_that_chance_keeps(count, share):
    def within(k: int) -> float:
        p = share / 2
        return math.fsum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k + 1))

    most = most_of(count, share)
    assert most >= math.floor(share * count)
    assert within(most) > 0.99 - 1e-9
    assert most <= share * count + 1e-6 or within(most - 1) < 0.99 + 1e-9
