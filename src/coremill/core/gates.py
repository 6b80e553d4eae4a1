"""Gates: what a build must, should or would ideally fulfil, and the rule for `gates_ok`."""

from __future__ import annotations

import enum
from collections.abc import Iterable

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
    """The listed reasons for which a check cannot run on a machine; nothing else excuses one."""

    NEEDS_MACOS = "needs macOS"
    NEEDS_CUDA = "needs a CUDA device"
    NEEDS_OLLAMA = "needs an Ollama server"


class Gate(Record):
    """One gate and how it came out.

    Raises:
        ValueError: a gate that did not pass gives no reason, or a passed one claims a platform reason.
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


def passed(name: str, severity: Severity, *, measured: Figure = None, threshold: Figure = None) -> Gate:
    return Gate(name=name, severity=severity, outcome=Outcome.PASSED, measured=measured, threshold=threshold)


def failed(
    name: str, severity: Severity, reason: str, *, measured: Figure = None, threshold: Figure = None
) -> Gate:
    return Gate(
        name=name,
        severity=severity,
        outcome=Outcome.FAILED,
        reason=reason,
        measured=measured,
        threshold=threshold,
    )


def not_run(name: str, severity: Severity, reason: str, platform: PlatformReason | None = None) -> Gate:
    return Gate(name=name, severity=severity, outcome=Outcome.NOT_RUN, reason=reason, platform_reason=platform)


def at_least(name: str, severity: Severity, measured: float, threshold: float, unit: str = "") -> Gate:
    """A gate on a figure that must reach `threshold`; a NaN does not."""
    if measured >= threshold:
        return passed(name, severity, measured=measured, threshold=threshold)
    reason = f"{measured:g}{unit} is below {threshold:g}{unit}"
    return failed(name, severity, reason, measured=measured, threshold=threshold)


def at_most(name: str, severity: Severity, measured: float, threshold: float, unit: str = "") -> Gate:
    """A gate on a figure that must stay within `threshold`; a NaN does not."""
    if measured <= threshold:
        return passed(name, severity, measured=measured, threshold=threshold)
    reason = f"{measured:g}{unit} is above {threshold:g}{unit}"
    return failed(name, severity, reason, measured=measured, threshold=threshold)


def gates_ok(gates: Iterable[Gate]) -> bool:
    """Every must and should gate passed, or could not run for a listed platform reason; false for no gates.

    A must-gate has no platform excuse: one that did not run fails.
    """
    weighty = [gate for gate in gates if gate.severity is not Severity.NICE]
    return bool(weighty) and all(
        gate.outcome is Outcome.PASSED or (gate.severity is Severity.SHOULD and gate.platform_reason is not None)
        for gate in weighty
    )


def must_gates_ok(gates: Iterable[Gate]) -> bool:
    """Every must-gate passed; false where there is none, because then nothing was checked."""
    must = [gate for gate in gates if gate.severity is Severity.MUST]
    return bool(must) and all(gate.outcome is Outcome.PASSED for gate in must)
