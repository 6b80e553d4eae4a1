"""The production checklist as it is checked today: what each row means, and how verification's evidence fares.

The rows and severities of the first part are those of the checklist's "Must Pass", "Should Pass" and "Nice to
Have"; the rest give those words a meaning: each is a way in which a package that loads can be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import msgspec

from coremill.core.config import TOY_MODEL_TYPES, DistilledVerify, ImportedVerify, VerifyConfig
from coremill.core.contract import Contract, ShapeFailed, Toolchain, shape_key
from coremill.core.diagnostics import ConversionDiagnostics, NoticeKind
from coremill.core.errors import CoremillError
from coremill.core.gates import (
    Gate,
    Outcome,
    PlatformReason,
    Severity,
    at_least,
    at_most,
    failed,
    gates_ok,
    not_run,
    passed,
)
from coremill.core.reports import (
    Answer,
    ShapeError,
    ShapeMeasured,
    ShapeReport,
    StatefulError,
    StatefulMeasured,
    StatefulReport,
)
from coremill.infra.compatibility import Versions
from coremill.infra.version_gate import check_python, cite_cell
from coremill.verification.main_checks import Heldout
from coremill.verification.rounding import MIN_SQNR_DB

MIN_HALT_AGREEMENT = 0.98
"""Share of halt decisions that must be the label's; 1 in 50 may fall where the words of an answer could go on."""

LARGEST_LEAK = 0.0
"""A masked key's weight is an exact 0 in float16 and float32, so earlier positions must not change at all."""

CACHE_CHANGE_DB = 20.0
"""By how much, in dB, an emptied cache must change the logits beyond the noise allowed: 100 times its power."""

_UNTESTED_TORCH = re.compile(r"torch version \S+ has not been tested with coremltools", re.IGNORECASE)

MUST, SHOULD, NICE = Severity.MUST, Severity.SHOULD, Severity.NICE


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which rows there are; of the checkpoint and its questions, not of what is verified."""

    model_type: str
    """The checkpoint's."""
    imported: bool
    """The run imports its model: there are texts and no held-out answers."""
    stateful: bool
    """The run exports functions with a key/value cache."""
    has_halt_head: bool
    """The checkpoint's model has one."""
    asks_moods: bool
    """The held-out questions are of a dataset whose questions have moods."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What verification found. A None was not measured: see :attr:`unmeasured`."""

    subject: Facts
    contract: Contract
    config: VerifyConfig
    graph_problem: str | None
    """Why the exported program beside the contract is not the one that it describes."""
    checkpoint_problem: str | None
    """Why the checkpoint at hand is not the one that was exported."""
    contract_problem: str | None
    """Why the package was not made from this contract."""
    diagnostics: ConversionDiagnostics | None
    diagnostics_problem: str | None
    """Why there are no diagnostics of this very package."""
    interface_problems: tuple[str, ...]
    load_problem: str | None
    """Why coremill.mil does not load the package."""
    operations: int | None
    """Operations that coremill.mil lowered."""
    shapes: Mapping[str, ShapeReport]
    leak: float | None
    padding_sqnr_db: float | None
    rounding_db: float | None
    """SQNR of the package in float32 arithmetic against the checkpoint with rounded weights; see `rounding.py`."""
    rounding_problem: str | None
    """Why the package does not run so."""
    stateful: StatefulReport | None
    heldout: Heldout | None
    sampled: tuple[Answer, ...]
    """Of a student; of an imported model, what it answers greedily."""
    has_core_ml: bool
    """This machine is a Mac."""
    core_ml_sqnr_db: float | None
    """Core ML's own logits against the reference backend's, the worst length."""
    core_ml_problem: str | None
    parameters: int
    package_bytes: int

    @property
    def primary(self) -> str:
        return shape_key(self.contract.shapes.primary)

    @property
    def unmeasured(self) -> str:
        """Why a measure that is None was not taken."""
        if self.load_problem is not None:
            return f"the package does not load: {self.load_problem}"
        if isinstance(self.shapes[self.primary], ShapeError):
            return f"the package does not run at the primary shape {self.primary}"
        what = "text or question" if self.subject.imported else "held-out conversation"
        return f"nothing was compared: no {what} serves for it"

    @property
    def distilled(self) -> DistilledVerify:
        """What is asked of a student."""
        assert isinstance(self.config, DistilledVerify)  # the rows that ask for it apply to no other
        return self.config


Judge = Callable[[str, Severity, Evidence], Gate]


class Row(msgspec.Struct, frozen=True):
    """One row of the checklist."""

    name: str
    severity: Severity
    judge: Judge
    applies: Callable[[Facts], bool] = lambda _: True
    """Whether the row is about such a model at all; its severity never depends on anything."""


def evaluate(evidence: Evidence) -> tuple[Gate, ...]:
    """The gate of every row that applies, in the order of the checklist."""
    gates = [row.judge(row.name, row.severity, evidence) for row in rows(evidence.subject)]
    return (*gates, *_summary(gates))


def evaluate_failure(reason: str, subject: Facts) -> tuple[Gate, ...]:
    """Every row's gate for a conversion that made no package: all of them failed."""
    listed = [*((row.name, row.severity) for row in rows(subject)), *SUMMARY_ROWS]
    return tuple(failed(name, severity, reason) for name, severity in listed)


def rows(subject: Facts) -> tuple[Row, ...]:
    """The rows of the checklist that apply, less those about the other rows."""
    return tuple(row for row in ROWS if row.applies(subject))


def _summary(gates: list[Gate]) -> Iterator[Gate]:
    """The rows that are about the other rows."""
    (all_ok, ok_severity), (perfect, perfect_severity) = SUMMARY_ROWS
    if gates_ok(gates):
        yield passed(all_ok, ok_severity)
    else:
        bad = [gate.name for gate in gates if not gates_ok([gate]) and gate.severity is not NICE]
        yield failed(all_ok, ok_severity, "not passed: " + "; ".join(bad))
    imperfect = [f"{gate.name} ({gate.outcome.value})" for gate in gates if gate.outcome is not Outcome.PASSED]
    if imperfect:
        yield failed(perfect, perfect_severity, "not passed: " + "; ".join(imperfect))
    else:
        yield passed(perfect, perfect_severity)


def _problem(name: str, severity: Severity, problem: str | None, measured: str | int | None = None) -> Gate:
    if problem is None:
        return passed(name, severity, measured=measured)
    return failed(name, severity, problem, measured=measured)


def _versions(toolchain: Toolchain) -> Versions:
    """Raises a ValueError for a toolchain whose versions are none."""
    packages = toolchain.packages
    return Versions(
        python=toolchain.python,
        torch=packages.get("torch"),
        coremltools=packages.get("coremltools"),
        numpy=packages.get("numpy"),
    )


def _python(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.diagnostics is None:
        return not_run(name, severity, f"the conversion's Python is not known: {evidence.diagnostics_problem}")
    toy = evidence.subject.model_type in TOY_MODEL_TYPES
    stages = {"export": evidence.contract.toolchain, "conversion": evidence.diagnostics.toolchain}
    measured = ", ".join(f"{stage} {toolchain.python}" for stage, toolchain in stages.items())
    for toolchain in stages.values():
        try:
            check_python(toy=toy, versions=_versions(toolchain))
        except (CoremillError, ValueError) as failure:
            return failed(name, severity, str(failure).splitlines()[0], measured=measured)
    return passed(name, severity, measured=measured, threshold="3.10 or 3.11")


def _checkpoint(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return _problem(name, severity, evidence.checkpoint_problem, evidence.contract.checkpoint_digest)


def _export(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return _problem(name, severity, evidence.graph_problem, evidence.contract.graph_digest)


def _contract(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return _problem(name, severity, evidence.contract_problem)


def _primary_shape(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.load_problem is not None:
        return _not_measured(name, severity, evidence)
    ran = evidence.shapes[evidence.primary]
    if isinstance(ran, ShapeError):
        return failed(name, severity, f"{evidence.primary}: {ran.error}", measured="error")
    return passed(name, severity, measured=f"{evidence.primary} ok")


def _conversion(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.diagnostics is None:
        return not_run(name, severity, str(evidence.diagnostics_problem))
    errors = evidence.diagnostics.of_kind(NoticeKind.ERROR)
    if errors:
        return failed(name, severity, errors[0].text, measured=len(errors), threshold=0)
    return passed(name, severity, measured=0, threshold=0)


def _loads(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.load_problem is not None:
        return failed(name, severity, evidence.load_problem)
    return passed(name, severity, measured=f"{evidence.operations} operations lowered by coremill.mil")


def _interface(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return _problem(name, severity, "; ".join(evidence.interface_problems) or None)


def _causality(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.leak is None:
        return _not_measured(name, severity, evidence)
    return at_most(name, severity, evidence.leak, LARGEST_LEAK, " logits before the changed token")


def _padding(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.padding_sqnr_db is None:
        return _not_measured(name, severity, evidence)
    return at_least(name, severity, evidence.padding_sqnr_db, evidence.config.min_sqnr_db, " dB")


def _rounding(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.rounding_problem is not None:
        return failed(name, severity, evidence.rounding_problem)
    if evidence.rounding_db is None:
        return _not_measured(name, severity, evidence)
    return at_least(name, severity, evidence.rounding_db, MIN_SQNR_DB, " dB")


def _sqnr(name: str, severity: Severity, evidence: Evidence) -> Gate:
    shape = evidence.shapes[evidence.primary]
    if isinstance(shape, ShapeError):
        return _not_measured(name, severity, evidence)
    return at_least(name, severity, shape.sqnr_db, evidence.config.min_sqnr_db, " dB")


def _kl(name: str, severity: Severity, evidence: Evidence) -> Gate:
    shape = evidence.shapes[evidence.primary]
    if isinstance(shape, ShapeError):
        return _not_measured(name, severity, evidence)
    return at_most(name, severity, shape.kl_nats, evidence.config.max_kl_nats, " nats")


def _top1(name: str, severity: Severity, evidence: Evidence) -> Gate:
    shape = evidence.shapes[evidence.primary]
    if isinstance(shape, ShapeError):
        return _not_measured(name, severity, evidence)
    if problem := _too_many_excluded(shape, evidence.config):
        return failed(name, severity, problem, measured=shape.top1_agreement, threshold=1.0)
    return at_least(name, severity, shape.top1_agreement, 1.0)


def _exact(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.heldout is None:
        return _not_measured(name, severity, evidence)
    answers = evidence.heldout.answers
    if answers.asked != evidence.distilled.heldout_answers:
        reason = f"{answers.asked} held-out questions were asked, {evidence.distilled.heldout_answers} are to be"
        return failed(name, severity, reason, measured=answers.asked, threshold=evidence.distilled.heldout_answers)
    return at_least(name, severity, answers.exact / answers.asked, 1.0)


def _right_mood(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.heldout is None:
        return _not_measured(name, severity, evidence)
    answers = evidence.heldout.answers
    if not answers.with_mood:
        return not_run(name, severity, "no held-out question asks for a mood")
    return at_least(name, severity, answers.right_mood / answers.with_mood, evidence.distilled.min_right_mood)


def _in_vocabulary(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.heldout is None:
        return _not_measured(name, severity, evidence)
    return at_most(name, severity, evidence.heldout.answers.out_of_vocabulary, 0)


def _teacher_kl(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.heldout is None:
        return _not_measured(name, severity, evidence)
    measured = evidence.heldout.answers.teacher_kl_nats
    return at_most(name, severity, measured, evidence.distilled.max_teacher_kl_nats, " nats an answer token")


def _halt_head(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.heldout is None or evidence.heldout.halt_agreement is None:
        return _not_measured(name, severity, evidence)
    return at_least(name, severity, evidence.heldout.halt_agreement, MIN_HALT_AGREEMENT)


def _perplexity(name: str, severity: Severity, evidence: Evidence) -> Gate:
    shape = evidence.shapes[evidence.primary]
    if isinstance(shape, ShapeError) or shape.perplexity is None:
        return _not_measured(name, severity, evidence)
    assert isinstance(evidence.config, ImportedVerify)  # the row applies to no other
    found = shape.perplexity
    what = f" of its perplexity, {found.measured:.4f} for {found.reference:.4f},"
    return at_most(name, severity, found.change, evidence.config.max_perplexity_change, what)


def _prefill(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return _cached(name, severity, evidence, lambda found: found.prefill_sqnr_db)


def _decode(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return _cached(name, severity, evidence, lambda found: found.decode_sqnr_db)


def _continued(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return _cached(name, severity, evidence, lambda found: found.continued_sqnr_db)


def _cached(name: str, severity: Severity, evidence: Evidence, figure: Callable[[StatefulMeasured], float]) -> Gate:
    found = evidence.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(name, severity, evidence)
    return at_least(name, severity, figure(found), evidence.config.min_sqnr_db, " dB")


def _prompt_padding(name: str, severity: Severity, evidence: Evidence) -> Gate:
    found = evidence.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(name, severity, evidence)
    return at_most(name, severity, found.padding_err, LARGEST_LEAK, " logits with other padding")


def _cache_matters(name: str, severity: Severity, evidence: Evidence) -> Gate:
    found = evidence.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(name, severity, evidence)
    threshold = evidence.config.min_sqnr_db - CACHE_CHANGE_DB
    return at_most(name, severity, found.emptied_sqnr_db, threshold, " dB with an emptied cache")


def _cache_end(name: str, severity: Severity, evidence: Evidence) -> Gate:
    found = evidence.stateful
    if not isinstance(found, StatefulMeasured):
        return _not_cached(name, severity, evidence)
    return _problem(name, severity, found.end_problem, f"{found.cache_positions} positions")


def _not_cached(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if isinstance(evidence.stateful, StatefulError):
        return failed(name, severity, evidence.stateful.error, measured="error")
    if not evidence.contract.functions:
        return not_run(name, severity, "the contract has no functions with a cache")
    return _not_measured(name, severity, evidence)


def _greedy_answers(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if not isinstance(evidence.stateful, StatefulMeasured):
        return _not_cached(name, severity, evidence)
    if not evidence.sampled:
        return _not_measured(name, severity, evidence)
    wrong = [answer.prompt for answer in evidence.sampled if not answer.right]
    measured = f"{len(evidence.sampled) - len(wrong)} of {len(evidence.sampled)}"
    problem = f"the checkpoint would say something else to {'; '.join(map(repr, wrong))}" if wrong else None
    return _problem(name, severity, problem, measured)


def _all_exported(name: str, severity: Severity, evidence: Evidence) -> Gate:
    validation = evidence.contract.shape_validation
    bad = {key: result.error for key, result in validation.items() if isinstance(result, ShapeFailed)}
    return _problem(name, severity, _listed(bad), f"{len(validation) - len(bad)} of {len(validation)}")


def _compatibility(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.diagnostics is None:
        return not_run(name, severity, str(evidence.diagnostics_problem))
    count = evidence.diagnostics.counts[NoticeKind.COMPATIBILITY.value]
    texts = list(dict.fromkeys(notice.text for notice in evidence.diagnostics.of_kind(NoticeKind.COMPATIBILITY)))
    if not texts:
        return passed(name, severity, measured=0, threshold=0)
    notice = " ".join(texts)
    if len(texts) > 1 or not _UNTESTED_TORCH.match(notice):
        reason = f"{notice} A measured cell answers one notice about torch, and no other."
        return failed(name, severity, reason, measured=count, threshold=0)
    try:
        cell = cite_cell(_versions(evidence.diagnostics.toolchain))
    except ValueError as failure:
        return failed(name, severity, str(failure), measured=count, threshold=0)
    if cell is None:
        return failed(name, severity, f"{notice} No measured cell answers it.", measured=count, threshold=0)
    return Gate(
        name=name,
        severity=severity,
        outcome=Outcome.PASSED,
        measured=count,
        threshold=0,
        reason=f"answered by the measured pass of cell {cell}",
    )


def _secondary_shapes(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.load_problem is not None:
        return _not_measured(name, severity, evidence)
    others = {key: report for key, report in evidence.shapes.items() if key != evidence.primary}
    bad = {key: why for key, report in others.items() if (why := _why_not(report, evidence.config))}
    return _problem(name, severity, _listed(bad), f"{len(others) - len(bad)} of {len(others)}")


def _core_ml(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.core_ml_problem is not None:
        return failed(name, severity, evidence.core_ml_problem)
    if not evidence.has_core_ml:
        return not_run(name, severity, "Core ML runs on macOS only", PlatformReason.NEEDS_MACOS)
    if evidence.core_ml_sqnr_db is None:
        return _not_measured(name, severity, evidence)
    return at_least(name, severity, evidence.core_ml_sqnr_db, evidence.config.min_sqnr_db, " dB")


def _distinct_samples(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.heldout is None:
        return _not_measured(name, severity, evidence)
    asked, wanted = len(evidence.sampled), evidence.distilled.sampled_answers
    if asked != wanted:
        reason = f"{asked} answers were sampled, {wanted} are to be"
        return failed(name, severity, reason, measured=asked, threshold=wanted)
    distinct = len({answer.answer for answer in evidence.sampled})
    return at_least(name, severity, distinct, evidence.distilled.min_distinct_sampled, " different answers")


def _all_shapes(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.load_problem is not None:
        return _not_measured(name, severity, evidence)
    bad = {key: why for key, report in evidence.shapes.items() if (why := _why_not(report, evidence.config))}
    return _problem(name, severity, _listed(bad), f"{len(evidence.shapes) - len(bad)} of {len(evidence.shapes)}")


def _no_warnings(name: str, severity: Severity, evidence: Evidence) -> Gate:
    if evidence.diagnostics is None:
        return not_run(name, severity, str(evidence.diagnostics_problem))
    counts = evidence.diagnostics.counts
    count = sum(counts[kind.value] for kind in NoticeKind if kind is not NoticeKind.HARMLESS)
    if count == 0:
        return passed(name, severity, measured=0, threshold=0)
    loud = [notice.text for notice in evidence.diagnostics.notices if notice.kind is not NoticeKind.HARMLESS]
    return failed(name, severity, "the converter said: " + "; ".join(loud), measured=count, threshold=0)


def _size_and_performance(name: str, severity: Severity, evidence: Evidence) -> Gate:
    size = f"{evidence.package_bytes:,} bytes for {evidence.parameters:,} parameters"
    if evidence.has_core_ml:
        return not_run(name, severity, f"{size}; its speed was not measured")
    return not_run(name, severity, f"{size}; speed is a device's, and none is at hand", PlatformReason.NEEDS_MACOS)


def _not_measured(name: str, severity: Severity, evidence: Evidence) -> Gate:
    return not_run(name, severity, evidence.unmeasured)


def _why_not(report: ShapeReport, config: VerifyConfig) -> str | None:
    """Why a shape does not validate; None if it does."""
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
    if report.excluded <= config.max_excluded_share * report.positions:
        return None
    return (
        f"{report.excluded} of {report.positions} positions are within {config.argmax_margin:g} logits of a tie, "
        f"more than {config.max_excluded_share:.0%}"
    )


def _listed(bad: Mapping[str, str]) -> str | None:
    return "; ".join(f"{key}: {why}" for key, why in bad.items()) or None


ROWS = (
    Row("Python 3.11 available for export and conversion", MUST, _python),
    Row("Checkpoint loads and validates", MUST, _checkpoint),
    Row("Export completes", MUST, _export),
    Row("Contract file generated and valid", MUST, _contract),
    Row("Primary shape validation succeeds", MUST, _primary_shape),
    Row("Core ML conversion completes", MUST, _conversion),
    Row("The Core ML model loads", MUST, _loads),
    Row("Inputs, outputs and shapes are the contract's", MUST, _interface),
    Row("No position sees a later token", MUST, _causality),
    Row("Padding does not change the logits", MUST, _padding),
    Row("Nothing but rounding sets it apart", MUST, _rounding),
    Row("SQNR at the primary shape", MUST, _sqnr),
    Row("KL divergence at the primary shape", MUST, _kl),
    Row("Top-1 agreement at the primary shape", MUST, _top1),
    Row("Perplexity is the checkpoint's", MUST, _perplexity, lambda subject: subject.imported),
    Row("Prefill scores as main does", MUST, _prefill, lambda subject: subject.stateful),
    Row("Decode from an empty cache scores as main does", MUST, _decode, lambda subject: subject.stateful),
    Row("Decode after a prompt scores as main does", MUST, _continued, lambda subject: subject.stateful),
    Row("Padding of a prompt has no effect", MUST, _prompt_padding, lambda subject: subject.stateful),
    Row("The cache matters", MUST, _cache_matters, lambda subject: subject.stateful),
    Row("The end of the cache is an error", MUST, _cache_end, lambda subject: subject.stateful),
    Row(
        "Greedy answers are the checkpoint's",
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
    Row("No token beyond the vocabulary", MUST, _in_vocabulary, lambda subject: not subject.imported),
    Row("KL divergence from the teacher", MUST, _teacher_kl, lambda subject: not subject.imported),
    Row(
        "The halt head decides as labelled",
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
