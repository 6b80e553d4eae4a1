"""Helpers for the tests of verification: what a report contains, and evidence with changes."""

from __future__ import annotations

import msgspec

from coremill.core.gates import Gate, Outcome, Severity
from coremill.core.reports import Backend, ShapeMeasured, VerificationReport
from coremill.verification.evidence import Evidence


def bad_gates(report: VerificationReport) -> dict[str, str]:
    """The must-gates that did not pass, with their reasons."""
    return {
        gate.name: gate.reason
        for gate in report.gates
        if gate.severity is Severity.MUST and gate.outcome is not Outcome.PASSED
    }


def gate_of(report: VerificationReport, name: str) -> Gate:
    (gate,) = [gate for gate in report.gates if gate.name == name]
    return gate


def shape_measured(**figures: float) -> ShapeMeasured:
    """A shape without fault."""
    good = ShapeMeasured(
        backend=Backend.MIL_REFERENCE,
        max_abs_err=0.02,
        sqnr_db=60.0,
        kl_nats=1e-6,
        top1_agreement=1.0,
        positions=1000,
        excluded=20,
    )
    return msgspec.structs.replace(good, **figures)


def changed(evidence: Evidence, **changes) -> Evidence:
    """`evidence` with fields of its own, of its files or of its measurement replaced."""
    parts = {"files": evidence.files, "measured": evidence.measured}
    for name, part in parts.items():
        own = {key: changes.pop(key) for key in part.__struct_fields__ if key in changes}
        parts[name] = msgspec.structs.replace(part, **own)
    return msgspec.structs.replace(evidence, **parts, **changes)
