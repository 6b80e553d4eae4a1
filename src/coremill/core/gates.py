"""Gates: the named checks of a build with their severities and outcomes, and the rule for `gates_ok`."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import NamedTuple

from coremill.core.documents import Record

Figure = float | int | str | None


class Severity(str, enum.Enum):
    MUST = "must"
    SHOULD = "should"
    NICE = "nice"


class Outcome(str, enum.Enum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not_run"


class PlatformReason(str, enum.Enum):
    """The platform reasons that excuse a check from running; nothing else does."""

    NEEDS_MACOS = "needs macOS"
    NEEDS_CUDA = "needs a CUDA device"
    NEEDS_OLLAMA = "needs an Ollama server"


class Gate(Record):
    """One gate and its outcome.

    Raises:
        ValueError: a gate that did not pass has no reason, or a gate that ran has a platform reason.
    """

    name: str
    severity: Severity
    outcome: Outcome
    measured: Figure = None
    threshold: Figure = None
    reason: str | None = None
    platform_reason: PlatformReason | None = None

    def __post_init__(self) -> None:
        if self.outcome is not Outcome.PASSED and not self.reason:
            raise ValueError(f"gate {self.name!r} is {self.outcome.value} without a reason")
        if self.platform_reason is not None and self.outcome is not Outcome.NOT_RUN:
            raise ValueError(f"gate {self.name!r} is {self.outcome.value} and gives a platform reason")


class Finding(NamedTuple):
    """The result of a check, before it has a gate's name and severity."""

    outcome: Outcome
    measured: Figure = None
    threshold: Figure = None
    reason: str | None = None
    platform_reason: PlatformReason | None = None

    def gate(self, name: str, severity: Severity) -> Gate:
        return Gate(name=name, severity=severity, **self._asdict())


def passed(*, measured: Figure = None, threshold: Figure = None, reason: str | None = None) -> Finding:
    return Finding(Outcome.PASSED, measured, threshold, reason)


def failed(reason: str, *, measured: Figure = None, threshold: Figure = None) -> Finding:
    return Finding(Outcome.FAILED, measured, threshold, reason)


def not_run(reason: str, platform: PlatformReason | None = None) -> Finding:
    return Finding(Outcome.NOT_RUN, reason=reason, platform_reason=platform)


def at_least(measured: float, threshold: float, unit: str = "") -> Finding:
    """Compare a figure that must reach `threshold`; a NaN fails."""
    if measured >= threshold:
        return passed(measured=measured, threshold=threshold)
    return failed(f"{measured:g}{unit} is below {threshold:g}{unit}", measured=measured, threshold=threshold)


def at_most(measured: float, threshold: float, unit: str = "") -> Finding:
    """Compare a figure that must not exceed `threshold`; a NaN fails."""
    if measured <= threshold:
        return passed(measured=measured, threshold=threshold)
    return failed(f"{measured:g}{unit} is above {threshold:g}{unit}", measured=measured, threshold=threshold)


CHANCE = 0.99
"""The probability with which a model whose share is half the bound passes, however few positions are compared."""


def most_of(count: int, share: float) -> int:
    """Return how many of `count` positions may be exceptions, if at most `share` of all positions may be.

    That is ⌊share · count⌋, but of few positions a single one is already more than a small share. A model whose
    exceptions are independent and half as frequent as the bound allows has k of them with the binomial probability
    B(k; count, share / 2); so at least as many are allowed as it stays within with the probability `CHANCE`: 2 of
    16 at 5 %. From about 300 positions at 5 %, and 700 at 2 %, this is below ⌊share · count⌋ and changes nothing.
    """
    allowed = math.floor(share * count + 1e-9)  # 0.29 · 100 is 28.999999999999996
    log_yes, log_no = (math.log(p) if p else -math.inf for p in (share / 2, 1 - share / 2))
    within = 0.0
    for k in range(count + 1):
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        within += math.exp(ways + (k * log_yes if k else 0.0) + (count - k) * log_no)
        if within >= CHANCE or k == count:
            return max(allowed, k)
    raise AssertionError("the last k returns")


def gates_ok(gates: Iterable[Gate]) -> bool:
    """Whether every must and should gate passed or has a platform reason; false if there are none.

    No platform reason excuses a must gate: one that did not run fails.
    """
    weighty = [gate for gate in gates if gate.severity is not Severity.NICE]
    return bool(weighty) and all(
        gate.outcome is Outcome.PASSED or (gate.severity is Severity.SHOULD and gate.platform_reason is not None)
        for gate in weighty
    )


def must_gates_ok(gates: Iterable[Gate]) -> bool:
    """Whether every must gate passed; false if there are none, because then nothing was checked."""
    must = [gate for gate in gates if gate.severity is Severity.MUST]
    return bool(must) and all(gate.outcome is Outcome.PASSED for gate in must)
