"""The production checklist: each row is a gate, and a check that evaluates it on the evidence of a verification.

The first rows are the checklist's own "Must Pass", "Should Pass" and "Nice to Have", with their severities. Each
of the others covers one way in which a package that loads can still be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import msgspec

from coremill.core.config import TOY_MODEL_TYPES, ImportedVerify, VerifyConfig
from coremill.core.contract import ShapeFailed, Toolchain
from coremill.core.diagnostics import NoticeKind
from coremill.core.errors import CoremillError
from coremill.core.gates import (
    Finding,
    Gate,
    Outcome,
    PlatformReason,
    Severity,
    at_least,
    at_most,
    failed,
    gates_ok,
    most_of,
    not_run,
    passed,
)
from coremill.core.reports import ShapeError, ShapeMeasured, ShapeReport, StatefulError, StatefulMeasured
from coremill.infra.compatibility import Versions
from coremill.infra.version_gate import check_python, cite_cell
from coremill.verification.evidence import Evidence, Facts
from coremill.verification.rounding import MIN_SQNR_DB

MAX_HALT_DIFFERENCES = 0.02
"""Share of halt decisions that may differ from the label, as `most_of` reads it: where an answer could continue."""

LARGEST_LEAK = 0.0
"""The weight of a masked key is exactly 0 in float16 and float32, so earlier positions must not change at all."""

CACHE_CHANGE_DB = 20.0
"""By how much, in dB, an emptied cache must exceed the allowed noise: 100 times its power."""

_UNTESTED_TORCH = re.compile(r"torch version \S+ has not been tested with coremltools", re.IGNORECASE)

MUST, SHOULD, NICE = Severity.MUST, Severity.SHOULD, Severity.NICE


class Row(msgspec.Struct, frozen=True):
    """One row of the checklist: a gate before it is evaluated."""

    name: str
    severity: Severity
    check: Callable[[Evidence], Finding]
    applies: Callable[[Facts], bool] = lambda _: True
    """Whether the row concerns such a model; the severity of a row is fixed."""


def evaluate(evidence: Evidence) -> tuple[Gate, ...]:
    """Return the gate of every row that applies, in the order of the checklist."""
    gates = [row.check(evidence).gate(row.name, row.severity) for row in rows(evidence.subject)]
    return (*gates, *_summary(gates))


def evaluate_failure(reason: str, subject: Facts) -> tuple[Gate, ...]:
    """Return every row's gate for a conversion that made no package: all of them failed."""
    listed = [*((row.name, row.severity) for row in rows(subject)), *SUMMARY_ROWS]
    return tuple(failed(reason).gate(name, severity) for name, severity in listed)


def rows(subject: Facts) -> tuple[Row, ...]:
    """Return the rows that apply, without the summary rows."""
    return tuple(row for row in ROWS if row.applies(subject))


def _summary(gates: list[Gate]) -> Iterator[Gate]:
    """Yield the gates that summarise the others."""
    bad = [gate.name for gate in gates if gate.severity is not NICE and not gates_ok([gate])]
    imperfect = [f"{gate.name} ({gate.outcome.value})" for gate in gates if gate.outcome is not Outcome.PASSED]
    for (name, severity), names in zip(SUMMARY_ROWS, (bad, imperfect), strict=True):
        yield (failed("not passed: " + "; ".join(names)) if names else passed()).gate(name, severity)


def _problem(problem: str | None, measured: str | int | None = None) -> Finding:
    if problem is None:
        return passed(measured=measured)
    return failed(problem, measured=measured)


def _versions(toolchain: Toolchain) -> Versions:
    """Raises a ValueError if a version of the toolchain is not valid."""
    packages = toolchain.packages
    return Versions(
        python=toolchain.python,
        torch=packages.get("torch"),
        coremltools=packages.get("coremltools"),
        numpy=packages.get("numpy"),
    )


def _python(evidence: Evidence) -> Finding:
    if evidence.files.diagnostics is None:
        return not_run(f"the conversion's Python is not known: {evidence.files.diagnostics_problem}")
    toy = evidence.subject.model_type in TOY_MODEL_TYPES
    stages = {"export": evidence.contract.toolchain, "conversion": evidence.files.diagnostics.toolchain}
    measured = ", ".join(f"{stage} {toolchain.python}" for stage, toolchain in stages.items())
    for toolchain in stages.values():
        try:
            check_python(toy=toy, versions=_versions(toolchain))
        except (CoremillError, ValueError) as failure:
            return failed(str(failure).splitlines()[0], measured=measured)
    return passed(measured=measured, threshold="3.10 or 3.11")


def _checkpoint(evidence: Evidence) -> Finding:
    return _problem(evidence.files.checkpoint_problem, evidence.contract.checkpoint_digest)


def _source(evidence: Evidence) -> Finding:
    return _problem(evidence.files.source_problem)


def _export(evidence: Evidence) -> Finding:
    return _problem(evidence.files.graph_problem, evidence.contract.graph_digest)


def _contract(evidence: Evidence) -> Finding:
    return _problem(evidence.files.contract_problem)


def _primary_shape(evidence: Evidence) -> Finding:
    if evidence.measured.load_problem is not None:
        return not_run(evidence.unmeasured)
    ran = evidence.measured.shapes[evidence.primary]
    if isinstance(ran, ShapeError):
        return failed(f"{evidence.primary}: {ran.error}", measured="error")
    return passed(measured=f"{evidence.primary} ok")


def _conversion(evidence: Evidence) -> Finding:
    if evidence.files.diagnostics is None:
        return not_run(str(evidence.files.diagnostics_problem))
    errors = evidence.files.diagnostics.of_kind(NoticeKind.ERROR)
    if errors:
        return failed(errors[0].text, measured=len(errors), threshold=0)
    return passed(measured=0, threshold=0)


def _loads(evidence: Evidence) -> Finding:
    if evidence.measured.load_problem is not None:
        return failed(evidence.measured.load_problem)
    return passed(measured=f"{evidence.measured.operations} operations lowered by coremill.mil")


def _interface(evidence: Evidence) -> Finding:
    return _problem("; ".join(evidence.files.interface_problems) or None)


def _weights(evidence: Evidence) -> Finding:
    return _problem(evidence.files.weights.problem, str(evidence.files.weights))


def _causality(evidence: Evidence) -> Finding:
    if evidence.measured.leak is None:
        return not_run(evidence.unmeasured)
    return at_most(evidence.measured.leak, LARGEST_LEAK, " logits before the changed token")


def _padding(evidence: Evidence) -> Finding:
    if evidence.measured.padding_sqnr_db is None:
        return not_run(evidence.unmeasured)
    return at_least(evidence.measured.padding_sqnr_db, evidence.config.min_sqnr_db, " dB")


def _rounding(evidence: Evidence) -> Finding:
    if evidence.measured.rounding_problem is not None:
        return failed(evidence.measured.rounding_problem)
    if evidence.measured.rounding_db is None:
        return not_run(evidence.unmeasured)
    return at_least(evidence.measured.rounding_db, MIN_SQNR_DB, " dB")


def _sqnr(evidence: Evidence) -> Finding:
    if (shape := evidence.primary_shape) is None:
        return not_run(evidence.unmeasured)
    return at_least(shape.sqnr_db, evidence.config.min_sqnr_db, " dB")


def _kl(evidence: Evidence) -> Finding:
    if (shape := evidence.primary_shape) is None:
        return not_run(evidence.unmeasured)
    return at_most(shape.kl_nats, evidence.config.max_kl_nats, " nats")


def _top1(evidence: Evidence) -> Finding:
    if (shape := evidence.primary_shape) is None:
        return not_run(evidence.unmeasured)
    if problem := _too_many_excluded(shape, evidence.config):
        return failed(problem, measured=shape.top1_agreement, threshold=1.0)
    return at_least(shape.top1_agreement, 1.0)


def _exact(evidence: Evidence) -> Finding:
    if evidence.measured.heldout is None:
        return not_run(evidence.unmeasured)
    answers = evidence.measured.heldout.answers
    if answers.asked != evidence.distilled.heldout_answers:
        reason = f"{answers.asked} held-out questions were asked, expected {evidence.distilled.heldout_answers}"
        return failed(reason, measured=answers.asked, threshold=evidence.distilled.heldout_answers)
    return at_least(answers.exact / answers.asked, 1.0)


def _right_mood(evidence: Evidence) -> Finding:
    if evidence.measured.heldout is None:
        return not_run(evidence.unmeasured)
    answers = evidence.measured.heldout.answers
    if not answers.with_mood:
        return not_run("no held-out question asks for a mood")
    return at_least(answers.right_mood / answers.with_mood, evidence.distilled.min_right_mood)


def _in_vocabulary(evidence: Evidence) -> Finding:
    if evidence.measured.heldout is None:
        return not_run(evidence.unmeasured)
    return at_most(evidence.measured.heldout.answers.out_of_vocabulary, 0)


def _teacher_kl(evidence: Evidence) -> Finding:
    if evidence.measured.heldout is None:
        return not_run(evidence.unmeasured)
    measured = evidence.measured.heldout.answers.teacher_kl_nats
    return at_most(measured, evidence.distilled.max_teacher_kl_nats, " nats per answer token")


def _halt_head(evidence: Evidence) -> Finding:
    found = evidence.measured.heldout
    if found is None or not found.halt_decisions:
        return not_run(evidence.unmeasured)
    may_differ = most_of(found.halt_decisions, MAX_HALT_DIFFERENCES)
    return at_least(found.right_halts / found.halt_decisions, 1 - may_differ / found.halt_decisions)


def _perplexity(evidence: Evidence) -> Finding:
    if (shape := evidence.primary_shape) is None or shape.perplexity is None:
        return not_run(evidence.unmeasured)
    found = shape.perplexity
    what = f" of its perplexity, {found.measured:.4f} for {found.reference:.4f},"
    return at_most(found.change, evidence.imported.max_perplexity_change, what)


def _prefill(evidence: Evidence) -> Finding:
    return _cached(evidence, lambda found: found.prefill_sqnr_db)


def _decode(evidence: Evidence) -> Finding:
    return _cached(evidence, lambda found: found.decode_sqnr_db)


def _continued(evidence: Evidence) -> Finding:
    return _cached(evidence, lambda found: found.continued_sqnr_db)


def _cached(evidence: Evidence, figure: Callable[[StatefulMeasured], float]) -> Finding:
    found = evidence.measured.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(evidence)
    return at_least(figure(found), evidence.config.min_sqnr_db, " dB")


def _prompt_padding(evidence: Evidence) -> Finding:
    found = evidence.measured.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(evidence)
    return at_most(found.padding_err, LARGEST_LEAK, " logits with other padding")


def _cache_matters(evidence: Evidence) -> Finding:
    found = evidence.measured.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(evidence)
    threshold = evidence.config.min_sqnr_db - CACHE_CHANGE_DB
    return at_most(found.emptied_sqnr_db, threshold, " dB with an emptied cache")


def _cache_end(evidence: Evidence) -> Finding:
    found = evidence.measured.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(evidence)
    return _problem(found.end_problem, f"{found.cache_positions} positions")


def _not_cached(evidence: Evidence) -> Finding:
    if isinstance(evidence.measured.stateful, StatefulError):
        return failed(evidence.measured.stateful.error, measured="error")
    if not evidence.contract.functions:
        return not_run("the contract has no functions with a cache")
    return not_run(evidence.unmeasured)


def _greedy_answers(evidence: Evidence) -> Finding:
    if not isinstance(evidence.measured.stateful, StatefulMeasured):
        return _not_cached(evidence)
    if not evidence.measured.sampled:
        return not_run(evidence.unmeasured)
    wrong = [answer.prompt for answer in evidence.measured.sampled if not answer.right]
    measured = f"{len(evidence.measured.sampled) - len(wrong)} of {len(evidence.measured.sampled)}"
    problem = f"the checkpoint answers differently to {'; '.join(map(repr, wrong))}" if wrong else None
    return _problem(problem, measured)


def _all_exported(evidence: Evidence) -> Finding:
    validation = evidence.contract.shape_validation
    bad = {key: result.error for key, result in validation.items() if isinstance(result, ShapeFailed)}
    return _problem(_listed(bad), f"{len(validation) - len(bad)} of {len(validation)}")


def _compatibility(evidence: Evidence) -> Finding:
    if evidence.files.diagnostics is None:
        return not_run(str(evidence.files.diagnostics_problem))
    count = evidence.files.diagnostics.counts[NoticeKind.COMPATIBILITY.value]
    texts = list(
        dict.fromkeys(notice.text for notice in evidence.files.diagnostics.of_kind(NoticeKind.COMPATIBILITY))
    )
    if not texts:
        return passed(measured=0, threshold=0)
    notice = " ".join(texts)
    if len(texts) > 1 or not _UNTESTED_TORCH.match(notice):
        reason = f"{notice} A measured cell only answers a single notice about torch."
        return failed(reason, measured=count, threshold=0)
    try:
        cell = cite_cell(_versions(evidence.files.diagnostics.toolchain))
    except ValueError as failure:
        return failed(str(failure), measured=count, threshold=0)
    if cell is None:
        return failed(f"{notice} No measured cell answers it.", measured=count, threshold=0)
    return passed(measured=count, threshold=0, reason=f"answered by the measured pass of cell {cell}")


def _secondary_shapes(evidence: Evidence) -> Finding:
    if evidence.measured.load_problem is not None:
        return not_run(evidence.unmeasured)
    others = {key: report for key, report in evidence.measured.shapes.items() if key != evidence.primary}
    bad = {key: why for key, report in others.items() if (why := _why_not(report, evidence.config))}
    return _problem(_listed(bad), f"{len(others) - len(bad)} of {len(others)}")


def _core_ml(evidence: Evidence) -> Finding:
    if evidence.measured.core_ml_problem is not None:
        return failed(evidence.measured.core_ml_problem)
    if not evidence.measured.has_core_ml:
        return not_run("Core ML runs on macOS only", PlatformReason.NEEDS_MACOS)
    if evidence.measured.core_ml_sqnr_db is None:
        return not_run(evidence.unmeasured)
    return at_least(evidence.measured.core_ml_sqnr_db, evidence.config.min_sqnr_db, " dB")


def _distinct_samples(evidence: Evidence) -> Finding:
    if evidence.measured.heldout is None:
        return not_run(evidence.unmeasured)
    asked, wanted = len(evidence.measured.sampled), evidence.distilled.sampled_answers
    if asked != wanted:
        reason = f"{asked} answers were sampled, expected {wanted}"
        return failed(reason, measured=asked, threshold=wanted)
    distinct = len({answer.answer for answer in evidence.measured.sampled})
    return at_least(distinct, evidence.distilled.min_distinct_sampled, " different answers")


def _all_shapes(evidence: Evidence) -> Finding:
    if evidence.measured.load_problem is not None:
        return not_run(evidence.unmeasured)
    bad = {
        key: why for key, report in evidence.measured.shapes.items() if (why := _why_not(report, evidence.config))
    }
    return _problem(_listed(bad), f"{len(evidence.measured.shapes) - len(bad)} of {len(evidence.measured.shapes)}")


def _no_warnings(evidence: Evidence) -> Finding:
    if evidence.files.diagnostics is None:
        return not_run(str(evidence.files.diagnostics_problem))
    counts = evidence.files.diagnostics.counts
    count = sum(counts[kind.value] for kind in NoticeKind if kind is not NoticeKind.HARMLESS)
    if count == 0:
        return passed(measured=0, threshold=0)
    loud = [notice.text for notice in evidence.files.diagnostics.notices if notice.kind is not NoticeKind.HARMLESS]
    return failed("the converter reported: " + "; ".join(loud), measured=count, threshold=0)


def _size_and_performance(evidence: Evidence) -> Finding:
    size = f"{evidence.files.package_bytes:,} bytes for {evidence.files.parameters:,} parameters"
    if evidence.measured.has_core_ml:
        return not_run(f"{size}; its speed was not measured")
    return not_run(f"{size}; speed is measured on a device, and there is none", PlatformReason.NEEDS_MACOS)


def _why_not(report: ShapeReport, config: VerifyConfig) -> str | None:
    """The reason why a shape does not validate, or None."""
    if isinstance(report, ShapeError):
        return report.error
    if not report.sqnr_db >= config.min_sqnr_db:
        return f"SQNR {report.sqnr_db:.1f} dB is below {config.min_sqnr_db:g} dB"
    if not report.kl_nats <= config.max_kl_nats:
        return f"KL {report.kl_nats:.3g} nats is above {config.max_kl_nats:g} nats"
    if report.top1_agreement < 1:
        return f"top-1 agreement {report.top1_agreement:.4f} is below 1"
    return _too_far_in_perplexity(report, config) or _too_many_excluded(report, config)


def _too_far_in_perplexity(report: ShapeMeasured, config: VerifyConfig) -> str | None:
    if not isinstance(config, ImportedVerify) or report.perplexity is None:
        return None
    if (change := report.perplexity.change) <= config.max_perplexity_change:
        return None
    return f"perplexity differs by {change:.3%}, more than {config.max_perplexity_change:.3%}"


def _too_many_excluded(report: ShapeMeasured, config: VerifyConfig) -> str | None:
    most = most_of(report.positions, config.max_excluded_share)
    if report.excluded <= most and report.excluded < report.positions:
        return None
    return (
        f"{report.excluded} of {report.positions} positions are within {config.argmax_margin:g} logits of a tie, "
        f"more than {most}, by max_excluded_share {config.max_excluded_share:g}"
    )


def _listed(bad: Mapping[str, str]) -> str | None:
    return "; ".join(f"{key}: {why}" for key, why in bad.items()) or None


ROWS = (
    Row("Python 3.11 available for export and conversion", MUST, _python),
    Row("Checkpoint loads and validates", MUST, _checkpoint),
    Row("The checkpoint computes what its source does", MUST, _source, lambda subject: subject.imported),
    Row("Export completes", MUST, _export),
    Row("Contract file generated and valid", MUST, _contract),
    Row("Primary shape validation succeeds", MUST, _primary_shape),
    Row("Core ML conversion completes", MUST, _conversion),
    Row("The Core ML model loads", MUST, _loads),
    Row("Inputs, outputs and shapes match the contract", MUST, _interface),
    Row("Every weight of the package is the checkpoint's", MUST, _weights),
    Row("No position depends on a later token", MUST, _causality),
    Row("Padding does not change the logits", MUST, _padding),
    Row("Matches the checkpoint up to weight rounding", MUST, _rounding),
    Row("SQNR at the primary shape", MUST, _sqnr),
    Row("KL divergence at the primary shape", MUST, _kl),
    Row("Top-1 agreement at the primary shape", MUST, _top1),
    Row("Perplexity matches the checkpoint's", MUST, _perplexity, lambda subject: subject.imported),
    Row("Prefill matches main", MUST, _prefill, lambda subject: subject.stateful),
    Row("Decode from an empty cache matches main", MUST, _decode, lambda subject: subject.stateful),
    Row("Decode after a prompt matches main", MUST, _continued, lambda subject: subject.stateful),
    Row("Prompt padding has no effect", MUST, _prompt_padding, lambda subject: subject.stateful),
    Row("Decode depends on the cache", MUST, _cache_matters, lambda subject: subject.stateful),
    Row("A full cache is an error", MUST, _cache_end, lambda subject: subject.stateful),
    Row(
        "Greedy answers match the checkpoint's",
        MUST,
        _greedy_answers,
        lambda subject: subject.imported and subject.stateful,
    ),
    Row("Every held-out answer is exact", MUST, _exact, lambda subject: not subject.imported),
    Row(
        "Held-out answers have the right mood",
        MUST,
        _right_mood,
        lambda subject: subject.asks_moods and not subject.imported,
    ),
    Row("No token outside the vocabulary", MUST, _in_vocabulary, lambda subject: not subject.imported),
    Row("KL divergence from the teacher", MUST, _teacher_kl, lambda subject: not subject.imported),
    Row(
        "Halt decisions match the labels",
        MUST,
        _halt_head,
        lambda subject: subject.has_halt_head and not subject.imported,
    ),
    Row("All shape enumerations succeed", SHOULD, _all_exported),
    Row("No compatibility warnings", SHOULD, _compatibility),
    Row("Secondary shapes validate", SHOULD, _secondary_shapes),
    Row("Core ML loads and predicts", SHOULD, _core_ml),
    Row("Sampled answers differ", SHOULD, _distinct_samples, lambda subject: not subject.imported),
    Row("All shapes validate without errors", NICE, _all_shapes),
    Row("Zero warnings in conversion logs", NICE, _no_warnings),
    Row("Optimal model size and performance", NICE, _size_and_performance),
)

SUMMARY_ROWS = (("Verification shows all gates OK", SHOULD), ("Perfect verification report", NICE))
