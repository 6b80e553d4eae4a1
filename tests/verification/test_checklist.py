"""What each kind of evidence is worth; the evidence itself is measured in test_verify_contract.py."""

from __future__ import annotations

import math
import re
from pathlib import Path

import msgspec
import pytest
from tests.reading import changed, shape_measured

from coremill.core import layout
from coremill.core.config import DistilledVerify
from coremill.core.contract import ShapeFailed, ShapeOk, Toolchain
from coremill.core.diagnostics import ConversionDiagnostics, Notice, NoticeKind, count_notices
from coremill.core.documents import read_json
from coremill.core.gates import Gate, Outcome, PlatformReason, Severity, gates_ok, must_gates_ok
from coremill.core.reports import (
    Answer,
    Backend,
    HeldoutAnswers,
    Perplexity,
    ShapeError,
    StatefulError,
)
from coremill.verification.checklist import ROWS, SUMMARY_ROWS, evaluate, evaluate_failure, rows
from coremill.verification.evidence import Evidence, Facts, FileChecks
from coremill.verification.main_checks import Heldout
from coremill.verification.measurement import Measurement
from coremill.verification.stored_weights import StoredWeights

MEASURED = shape_measured()


@pytest.fixture(scope="module")
def good(pristine) -> Evidence:
    """Evidence of a package without fault, on a machine without Core ML."""
    return Evidence(
        subject=Facts(
            model_type="magic-8-ball", imported=False, stateful=False, has_halt_head=True, asks_moods=True
        ),
        contract=pristine.read_contract(),
        config=DistilledVerify(),
        files=FileChecks(
            graph_problem=None,
            checkpoint_problem=None,
            source_problem=None,
            contract_problem=None,
            diagnostics=read_json(layout.diagnostics_file(pristine.package.parent), ConversionDiagnostics),
            diagnostics_problem=None,
            interface_problems=(),
            weights=StoredWeights(tensors=20, values=100, functions=1),
            parameters=100,
            package_bytes=400,
        ),
        measured=Measurement(
            load_problem=None,
            operations=100,
            shapes={"T80": MEASURED, "T96": MEASURED, "T128": MEASURED},
            leak=0.0,
            padding_sqnr_db=60.0,
            rounding_db=120.0,
            rounding_problem=None,
            stateful=None,
            heldout=Heldout(
                answers=HeldoutAnswers(
                    asked=64,
                    exact=64,
                    right_mood=60,
                    with_mood=60,
                    right_tool_call=1,
                    with_tool_call=4,
                    out_of_vocabulary=0,
                    teacher_kl_nats=0.01,
                    teacher_entropy_nats=0.2,
                    cross_entropy_nats=0.21,
                ),
                halt_decisions=1000,
                right_halts=1000,
            ),
            sampled=tuple(Answer(prompt="?", answer=str(i), mood=None, right=True) for i in range(24)),
            has_core_ml=False,
            core_ml_sqnr_db=None,
            core_ml_problem=None,
        ),
    )


def gate(evidence: Evidence, name: str, **changes) -> Gate:
    (found,) = [gate for gate in evaluate(changed(evidence, **changes)) if gate.name == name]
    return found


def heldout(evidence: Evidence, **changes) -> Heldout:
    assert evidence.measured.heldout is not None
    answers = msgspec.structs.replace(evidence.measured.heldout.answers, **changes)
    return msgspec.structs.replace(evidence.measured.heldout, answers=answers)


def test_good_evidence_is_good(good):
    gates = evaluate(good)
    assert gates_ok(gates)
    assert must_gates_ok(gates)


def test_every_row_is_there_whatever_the_evidence(good):
    names = [gate.name for gate in evaluate(good)]
    assert names == [*(row.name for row in rows(good.subject)), *(name for name, _ in SUMMARY_ROWS)]
    assert len({row.name for row in ROWS}) == len(ROWS)
    failed = evaluate_failure("no package", good.subject)
    assert [gate.name for gate in failed] == names
    assert not must_gates_ok(failed)
    assert not gates_ok(failed)


def test_the_checklists_own_rows_have_its_severities(good):
    severities = {gate.name: gate.severity for gate in evaluate(good)}
    must = [name for name, severity in severities.items() if severity is Severity.MUST]
    assert must[:7] == [
        "Python 3.11 available for export and conversion",
        "Checkpoint loads and validates",
        "Export completes",
        "Contract file generated and valid",
        "Primary shape validation succeeds",
        "Core ML conversion completes",
        "The Core ML model loads",
    ]
    should = {"All shape enumerations succeed", "No compatibility warnings", "Verification shows all gates OK"}
    should |= {"Secondary shapes validate"}
    assert {severities[name] for name in should} == {Severity.SHOULD}
    nice = {"All shapes validate without errors", "Zero warnings in conversion logs", "Perfect verification report"}
    nice |= {"Optimal model size and performance"}
    assert {severities[name] for name in nice} == {Severity.NICE}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Export completes", {"graph_problem": "no graph"}, "no graph"),
        ("Checkpoint loads and validates", {"checkpoint_problem": "another"}, "another"),
        ("Contract file generated and valid", {"contract_problem": "another"}, "another"),
        ("Inputs, outputs and shapes match the contract", {"interface_problems": ("a", "b")}, "a; b"),
        (
            "Every weight of the package is the checkpoint's",
            {"weights": StoredWeights(tensors=2, values=9, functions=1, problem="main: norm.weight")},
            "main: norm.weight",
        ),
        (
            "No position depends on a later token",
            {"leak": 1e-9},
            "1e-09 logits before the changed token is above 0",
        ),
        (
            "No position depends on a later token",
            {"leak": math.nan},
            "nan logits before the changed token is above 0",
        ),
        ("Padding does not change the logits", {"padding_sqnr_db": 39.9}, "39.9 dB is below 40 dB"),
        ("Padding does not change the logits", {"padding_sqnr_db": math.nan}, "nan dB is below 40 dB"),
        ("Matches the checkpoint up to weight rounding", {"rounding_db": 89.9}, "89.9 dB is below 90 dB"),
        (
            "Matches the checkpoint up to weight rounding",
            {"rounding_problem": "in float32 arithmetic: no"},
            "in float32 arithmetic: no",
        ),
        ("Core ML loads and predicts", {"core_ml_problem": "Core ML: no"}, "Core ML: no"),
        ("Core ML loads and predicts", {"has_core_ml": True, "core_ml_sqnr_db": 12.0}, "12 dB is below 40 dB"),
        ("Sampled answers differ", {"sampled": ()}, "0 answers were sampled, expected 24"),
        ("The Core ML model loads", {"load_problem": "no such operation"}, "no such operation"),
    ],
)
def test_each_fault_fails_its_gate_and_says_why(good, name, changes, reason):
    found = gate(good, name, **changes)
    assert found.outcome is Outcome.FAILED
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("name", "changes", "measured"),
    [
        ("SQNR at the primary shape", {"sqnr_db": 39.9}, 39.9),
        ("KL divergence at the primary shape", {"kl_nats": 2e-3}, 2e-3),
        ("Top-1 agreement at the primary shape", {"top1_agreement": 0.999}, 0.999),
        ("Top-1 agreement at the primary shape", {"excluded": 21}, 1.0),
    ],
)
def test_a_primary_shape_that_disagrees_fails_its_gate(good, name, changes, measured):
    shapes = {**good.measured.shapes, "T96": msgspec.structs.replace(MEASURED, **changes)}
    found = gate(good, name, shapes=shapes)
    assert (found.outcome, found.measured) == (Outcome.FAILED, measured)
    assert gate(good, "Secondary shapes validate", shapes=shapes).outcome is Outcome.PASSED
    assert gate(good, "All shapes validate without errors", shapes=shapes).outcome is Outcome.FAILED
    secondary = {**good.measured.shapes, "T80": shapes["T96"]}
    assert gate(good, name, shapes=secondary).outcome is Outcome.PASSED
    assert gate(good, "Secondary shapes validate", shapes=secondary).outcome is Outcome.FAILED


def test_too_many_near_ties_are_said_in_numbers(good):
    shapes = {**good.measured.shapes, "T96": msgspec.structs.replace(MEASURED, excluded=21)}
    assert gate(good, "Top-1 agreement at the primary shape", shapes=shapes).reason == (
        "21 of 1000 positions are within 0.05 logits of a tie, more than 20, by max_excluded_share 0.02"
    )


@pytest.mark.parametrize(
    ("excluded", "positions", "outcome"),
    [
        (20, 1000, Outcome.PASSED),
        (2, 16, Outcome.PASSED),
        (3, 16, Outcome.FAILED),
        (1, 2, Outcome.PASSED),
        (1, 1, Outcome.FAILED),  # no position is left to compare
    ],
)
def test_a_near_tie_among_few_positions_is_chance(good, excluded, positions, outcome):
    shape = msgspec.structs.replace(MEASURED, excluded=excluded, positions=positions)
    shapes = {**good.measured.shapes, "T96": shape, "T80": shape}
    assert gate(good, "Top-1 agreement at the primary shape", shapes=shapes).outcome is outcome
    assert gate(good, "Secondary shapes validate", shapes=shapes).outcome is outcome
    # A position outside the margin that differs is never chance.
    wrong = {**shapes, "T96": msgspec.structs.replace(shape, top1_agreement=14 / 15)}
    assert gate(good, "Top-1 agreement at the primary shape", shapes=wrong).outcome is Outcome.FAILED


@pytest.mark.parametrize(
    ("name", "changes", "measured"),
    [
        ("Every held-out answer is exact", {"exact": 63}, 63 / 64),
        ("Held-out answers have the right mood", {"right_mood": 56}, 56 / 60),
        ("No token outside the vocabulary", {"out_of_vocabulary": 1}, 1),
        ("KL divergence from the teacher", {"teacher_kl_nats": 0.021}, 0.021),
    ],
)
def test_answers_that_are_not_good_enough_fail_their_gate(good, name, changes, measured):
    found = gate(good, name, heldout=heldout(good, **changes))
    assert (found.outcome, found.measured) == (Outcome.FAILED, pytest.approx(measured))


def test_what_could_not_be_asked_is_not_run_and_no_must_gate_is_excused(good):
    broken = changed(
        good,
        shapes={**good.measured.shapes, "T96": ShapeError(backend=Backend.MIL_REFERENCE, error="broke")},
        leak=None,
        padding_sqnr_db=None,
        rounding_db=None,
        heldout=None,
        sampled=(),
    )
    gates = evaluate(broken)
    silent = [gate for gate in gates if gate.reason == "the package does not run at the primary shape T96"]
    assert len(silent) == 12
    assert {gate.outcome for gate in silent} == {Outcome.NOT_RUN}
    assert not must_gates_ok(gates)


def test_a_model_without_a_halt_head_or_moods_has_no_such_rows(good):
    plain = msgspec.structs.replace(good.subject, model_type="toy", has_halt_head=False, asks_moods=False)
    gates = evaluate(changed(good, subject=plain))
    missing = {"Halt decisions match the labels", "Held-out answers have the right mood"}
    assert {gate.name for gate in evaluate(good)} - {gate.name for gate in gates} == missing
    assert gates_ok(gates)
    assert [gate.name for gate in evaluate_failure("no", plain)] == [gate.name for gate in gates]


def test_an_imported_model_is_asked_for_its_text_and_not_for_a_teachers_answers(good, good_imported):
    assert gates_ok(evaluate(good_imported))
    of_students = {gate.name for gate in evaluate(good)}
    of_imported = {gate.name for gate in evaluate(good_imported)}
    assert of_students - of_imported == {
        "Every held-out answer is exact",
        "Held-out answers have the right mood",
        "No token outside the vocabulary",
        "KL divergence from the teacher",
        "Halt decisions match the labels",
        "Sampled answers differ",
    }
    of_caches = {
        "Prefill matches main",
        "Decode from an empty cache matches main",
        "Decode after a prompt matches main",
        "Prompt padding has no effect",
        "Decode depends on the cache",
        "A full cache is an error",
    }
    about_answers = "Greedy answers match the checkpoint's"
    of_imports = {"Perplexity matches the checkpoint's", "The checkpoint computes what its source does"}
    assert of_imported - of_students == {*of_imports, about_answers, *of_caches}
    for evidence, added in ((good_imported, {about_answers, *of_caches}), (good, of_caches)):
        names = [
            {row.name for row in rows(msgspec.structs.replace(evidence.subject, stateful=stateful))}
            for stateful in (True, False)
        ]
        assert names[0] - names[1] == added
    assert {row.severity for row in ROWS if row.name in of_imported - of_students} == {Severity.MUST}


def with_perplexity(evidence: Evidence, key: str, measured: float) -> Evidence:
    perplexity = Perplexity(reference=20.0, measured=measured, tokens=23)
    shape = msgspec.structs.replace(evidence.measured.shapes[key], perplexity=perplexity)
    return changed(evidence, shapes={**evidence.measured.shapes, key: shape})


@pytest.mark.parametrize(("measured", "change"), [(20.2, 0.01), (19.8, 0.01)])
def test_a_perplexity_that_is_not_the_checkpoints_fails_whichever_is_better(good_imported, measured, change):
    name = "Perplexity matches the checkpoint's"
    assert gate(good_imported, name).measured == pytest.approx(5e-4)
    found = gate(with_perplexity(good_imported, "T24", measured), name)
    assert (found.outcome, found.measured, found.threshold) == (Outcome.FAILED, pytest.approx(change), 0.005)
    what = f"of its perplexity, {measured:.4f} for 20.0000,"
    assert found.reason == f"0.01 {what} is above 0.005 {what}"
    elsewhere = with_perplexity(good_imported, "T40", measured)
    assert gate(elsewhere, name).outcome is Outcome.PASSED
    assert gate(elsewhere, "Secondary shapes validate").reason == (
        "T40: perplexity differs by 1.000%, more than 0.500%"
    )


def test_a_must_gate_about_text_that_was_not_measured_does_not_pass(good_imported):
    shapes = dict.fromkeys(good_imported.measured.shapes, MEASURED)
    found = gate(good_imported, "Perplexity matches the checkpoint's", shapes=shapes)
    assert (found.outcome, found.reason) == (
        Outcome.NOT_RUN,
        "nothing was compared: no text or question is suitable",
    )
    found = gate(good_imported, "Greedy answers match the checkpoint's", sampled=())
    assert (found.outcome, found.reason) == (
        Outcome.NOT_RUN,
        "nothing was compared: no text or question is suitable",
    )


@pytest.mark.parametrize(
    ("name", "figure", "value", "reason"),
    [
        ("Prefill matches main", "prefill_sqnr_db", 39.9, "39.9 dB is below 40 dB"),
        ("Decode from an empty cache matches main", "decode_sqnr_db", 39.9, "39.9 dB is below 40 dB"),
        ("Decode after a prompt matches main", "continued_sqnr_db", 39.9, "39.9 dB is below 40 dB"),
        (
            "Prompt padding has no effect",
            "padding_err",
            1e-7,
            "1e-07 logits with other padding is above 0 logits with other padding",
        ),
        (
            "Decode depends on the cache",
            "emptied_sqnr_db",
            20.1,
            "20.1 dB with an emptied cache is above 20 dB with an emptied cache",
        ),
        ("A full cache is an error", "end_problem", "it wraps", "it wraps"),
    ],
)
def test_each_fault_of_the_cache_fails_its_gate_alone(good_imported, name, figure, value, reason):
    found = msgspec.structs.replace(good_imported.measured.stateful, **{figure: value})
    gates = evaluate(changed(good_imported, stateful=found))
    bad = [gate for gate in gates if gate.severity is Severity.MUST and gate.outcome is not Outcome.PASSED]
    assert [(gate.name, gate.outcome, gate.reason) for gate in bad] == [(name, Outcome.FAILED, reason)]


def test_functions_that_did_not_run_fail_and_those_that_are_not_there_did_not_run(good_imported):
    broke = StatefulError(backend=Backend.MIL_REFERENCE, error="broke")
    contract = msgspec.structs.replace(good_imported.contract, states=(), functions=())
    for changes, outcome, reason in (
        ({"stateful": broke}, Outcome.FAILED, "broke"),
        ({"stateful": None, "contract": contract}, Outcome.NOT_RUN, "the contract has no functions with a cache"),
        ({"stateful": None, "load_problem": "no"}, Outcome.NOT_RUN, "the package does not load: no"),
    ):
        gates = evaluate(changed(good_imported, **changes))
        cached = {row.name for row in ROWS if row.applies(good_imported.subject)} & {
            row.name
            for row in ROWS
            if not row.applies(msgspec.structs.replace(good_imported.subject, stateful=False))
        }
        found = [gate for gate in gates if gate.name in cached]
        assert len(found) == 7
        assert {(gate.outcome, gate.reason) for gate in found} == {(outcome, reason)}
        assert not must_gates_ok(gates)


def test_no_contract_and_no_question_takes_a_must_gate_away(good):
    """What is verified cannot say that it need not be: the checkpoint and the kind of dataset do."""
    arch = msgspec.structs.replace(good.contract.model_arch, use_halt_head=False)
    evidence = changed(
        good,
        contract=msgspec.structs.replace(good.contract, model_arch=arch),
        heldout=Heldout(
            answers=msgspec.structs.replace(good.measured.heldout.answers, with_mood=0, right_mood=0),
            halt_decisions=0,
            right_halts=0,
        ),
    )
    for name in ("Halt decisions match the labels", "Held-out answers have the right mood"):
        found = gate(evidence, name)
        assert (found.outcome, found.severity) == (Outcome.NOT_RUN, Severity.MUST)
    assert not must_gates_ok(evaluate(evidence))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("No position depends on a later token", {"leak": None}),
        ("Padding does not change the logits", {"padding_sqnr_db": None}),
        ("Matches the checkpoint up to weight rounding", {"rounding_db": None}),
        ("Every held-out answer is exact", {"heldout": None}),
    ],
)
def test_where_nothing_was_compared_a_must_gate_does_not_pass(good, name, changes):
    found = gate(good, name, **changes)
    assert (found.outcome, found.severity, found.reason) == (
        Outcome.NOT_RUN,
        Severity.MUST,
        "nothing was compared: no held-out conversation is suitable",
    )


def test_fewer_questions_than_configured_fail_though_each_answer_is_exact(good):
    few = heldout(good, asked=5, exact=5, with_mood=1, right_mood=1, with_tool_call=4)
    found = gate(good, "Every held-out answer is exact", heldout=few)
    assert (found.outcome, found.reason, found.measured, found.threshold) == (
        Outcome.FAILED,
        "5 held-out questions were asked, expected 64",
        5,
        64,
    )


def test_a_macs_failures_have_no_platform_excuse(good):
    shapes = {**good.measured.shapes, "T96": ShapeError(backend=Backend.MIL_REFERENCE, error="broke")}
    found = gate(good, "Core ML loads and predicts", has_core_ml=True, shapes=shapes)
    assert (found.outcome, found.platform_reason, found.reason) == (
        Outcome.NOT_RUN,
        None,
        "the package does not run at the primary shape T96",
    )
    speed = gate(good, "Optimal model size and performance", has_core_ml=True)
    assert (speed.outcome, speed.platform_reason) == (Outcome.NOT_RUN, None)


def test_a_cell_answers_one_notice_about_torch_and_no_other(good):
    name = "No compatibility warnings"
    torch_notice = next(iter(good.files.diagnostics.of_kind(NoticeKind.COMPATIBILITY)))
    assert gate(good, name).outcome is Outcome.PASSED
    numpy_text = "NumPy version 9 has not been tested with coremltools."
    numpy_notice = msgspec.structs.replace(torch_notice, text=numpy_text)
    for notices in ((numpy_notice,), (torch_notice, numpy_notice)):
        found = gate(good, name, diagnostics=_with_notices(good, *notices))
        assert found.outcome is Outcome.FAILED
        assert found.reason == (
            " ".join(notice.text for notice in notices)
            + " A measured cell only answers a single notice about torch."
        )


def test_a_halt_head_that_decides_wrongly_fails(good):
    def decided(right: int, of: int) -> Gate:
        found = msgspec.structs.replace(good.measured.heldout, halt_decisions=of, right_halts=right)
        return gate(good, "Halt decisions match the labels", heldout=found)

    assert decided(979, 1000).reason == "0.979 is below 0.98"
    assert decided(980, 1000).outcome is Outcome.PASSED
    assert decided(14, 16).outcome is Outcome.PASSED
    assert decided(13, 16).reason == "0.8125 is below 0.875"


def test_a_shape_that_failed_at_export(good):
    validation = {**good.contract.shape_validation, "T128": ShapeFailed(error="no")}
    contract = msgspec.structs.replace(good.contract, shape_validation=validation)
    found = gate(good, "All shape enumerations succeed", contract=contract)
    assert (found.outcome, found.measured, found.reason) == (Outcome.FAILED, "2 of 3", "T128: no")
    assert isinstance(good.contract.shape_validation["T96"], ShapeOk)


def _with_notices(evidence: Evidence, *notices: Notice, **toolchain: str) -> ConversionDiagnostics:
    diagnostics = evidence.files.diagnostics
    return msgspec.structs.replace(
        diagnostics,
        notices=notices,
        counts=count_notices(notices),
        toolchain=Toolchain(
            python=toolchain.pop("python", diagnostics.toolchain.python),
            platform="test",
            packages={**diagnostics.toolchain.packages, **toolchain},
        ),
    )


UNTESTED = Notice(
    kind=NoticeKind.COMPATIBILITY, source="x", text="Torch version 9 has not been tested with coremltools.", count=1
)


def test_a_compatibility_notice_needs_a_measured_cell_to_answer_it(good):
    name = "No compatibility warnings"
    assert gate(good, name, diagnostics=_with_notices(good)).measured == 0
    unmeasured = gate(good, name, diagnostics=_with_notices(good, UNTESTED, torch="9.0.0"))
    assert (unmeasured.outcome, unmeasured.reason) == (
        Outcome.FAILED,
        "Torch version 9 has not been tested with coremltools. No measured cell answers it.",
    )
    failed_cell = gate(good, name, diagnostics=_with_notices(good, UNTESTED, numpy="2.4.1"))
    assert failed_cell.outcome is Outcome.FAILED
    no_version = gate(good, name, diagnostics=_with_notices(good, UNTESTED, torch="nightly"))
    assert (no_version.outcome, no_version.reason) == (
        Outcome.FAILED,
        "`torch` is 'nightly', which is not a version",
    )


def test_an_error_of_the_converter_fails_the_conversion_and_a_warning_does_not(good):
    error = Notice(kind=NoticeKind.ERROR, source="x", text="went wrong", count=2)
    warning = Notice(kind=NoticeKind.WARNING, source="x", text="careful", count=1)
    found = gate(good, "Core ML conversion completes", diagnostics=_with_notices(good, error))
    assert (found.outcome, found.reason) == (Outcome.FAILED, "went wrong")
    diagnostics = _with_notices(good, warning)
    assert gate(good, "Core ML conversion completes", diagnostics=diagnostics).outcome is Outcome.PASSED
    noisy = gate(good, "Zero warnings in conversion logs", diagnostics=diagnostics)
    assert (noisy.outcome, noisy.reason) == (Outcome.FAILED, "the converter reported: careful")


@pytest.mark.parametrize(
    ("python", "outcome"), [("3.10.4", Outcome.PASSED), ("3.12.1", Outcome.FAILED), ("3.13.0", Outcome.PASSED)]
)
def test_the_python_of_the_conversion(good, python, outcome):
    name = "Python 3.11 available for export and conversion"
    found = gate(good, name, diagnostics=_with_notices(good, python=python))
    assert found.outcome is outcome
    assert found.measured == f"export {good.contract.toolchain.python}, conversion {python}"
    production = msgspec.structs.replace(good.subject, model_type="production")
    found = gate(good, name, subject=production, diagnostics=_with_notices(good, python="3.13.0"))
    assert found.outcome is Outcome.FAILED


def test_core_ml_is_excused_by_its_platform_alone(good):
    found = gate(good, "Core ML loads and predicts")
    assert (found.outcome, found.platform_reason) == (Outcome.NOT_RUN, PlatformReason.NEEDS_MACOS)
    assert (
        gate(good, "Core ML loads and predicts", has_core_ml=True, core_ml_sqnr_db=55.0).outcome is Outcome.PASSED
    )
    summary = gate(good, "Verification shows all gates OK", core_ml_problem="broke")
    assert summary.reason == "not passed: Core ML loads and predicts"


def test_the_perfect_report_names_what_is_missing(good):
    found = gate(good, "Perfect verification report")
    assert found.reason == (
        "not passed: Core ML loads and predicts (not_run); Zero warnings in conversion logs (failed); "
        "Optimal model size and performance (not_run)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact": 65}, r"^`exact` is 65, more than `asked` 64 or negative$"),
        ({"right_mood": -1}, r"^`right_mood` is -1, more than `with_mood` 60 or negative$"),
        ({"with_tool_call": 5}, r"^`with_mood` 60 and `with_tool_call` 5 are more than `asked` 64$"),
        ({"out_of_vocabulary": -1}, r"^`out_of_vocabulary` is -1$"),
        ({"teacher_kl_nats": math.nan}, r"^`teacher_kl_nats` is nan$"),
    ],
)
def test_counts_of_answers_that_cannot_be_are_refused(good, changes, message):
    with pytest.raises(ValueError, match=message):
        heldout(good, **changes)


def test_a_contract_promises_nothing_of_a_primary_shape_that_failed_nor_two_tensors_of_one_name(good):
    validation = {**good.contract.shape_validation, "T96": ShapeFailed(error="no")}
    with pytest.raises(ValueError, match=r"^the primary shape T96 failed: no$"):
        msgspec.structs.replace(good.contract, shape_validation=validation)
    outputs = (good.contract.outputs[0], good.contract.outputs[0])
    with pytest.raises(ValueError, match=r"^more than one tensor is named logits$"):
        msgspec.structs.replace(good.contract, outputs=outputs)


def test_the_checklist_page_names_every_gate_and_no_other():
    page = (Path(__file__).parents[2] / "docs" / "PRODUCTION_CHECKLIST.md").read_text()
    assert set(re.findall(r"\*([A-Z][^*|]+)\*", page)) == {
        *(row.name for row in ROWS),
        *(name for name, _ in SUMMARY_ROWS),
    }
