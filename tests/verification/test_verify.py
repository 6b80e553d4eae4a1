"""Verification of an imported model: real texts, and functions with a cache."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.reading import bad_gates, gate_of

from coremill.conversion import convert_coreml, export_pytorch
from coremill.conversion.verify_contract import main, run_stage
from coremill.core import layout
from coremill.core.command import exit_on_error
from coremill.core.config import ExportConfig
from coremill.core.contract import ShapeOk, ShapeSet
from coremill.core.digest import file_digest
from coremill.core.documents import encode, read_json, write_json
from coremill.core.errors import GATES_FAILED
from coremill.core.gates import Severity, failed, must_gates_ok
from coremill.core.parity import SourceParity
from coremill.core.reports import ShapeMeasured, StatefulError, StatefulMeasured, VerificationReport
from coremill.core.stage import StageContext
from coremill.coreml.interface import package_interfaces
from coremill.coreml.package import read_spec
from coremill.verification.cached_checks import answer_greedily

CONFIGS = Path(__file__).parents[2] / "configs"


def verified(build, **changes) -> VerificationReport:
    """Args: changes: of the build's configuration."""
    run_stage(changed(build.context("verify", *build.stages), **changes))
    return read_json(layout.verification_report(build.root / "verify"), VerificationReport)


def changed(context: StageContext, **changes) -> StageContext:
    return msgspec.structs.replace(context, config=msgspec.structs.replace(context.config, **changes))


def made_again(build, **changes) -> None:
    export_pytorch.run_stage(changed(build.context("export", *build.stages[:2]), **changes))
    convert_coreml.run_stage(changed(build.context("convert", "export"), **changes))


@pytest.fixture(scope="module")
def report(pristine_imported) -> VerificationReport:
    """The report on the package as it was made."""
    return verified(pristine_imported)


# The package as it was made


def test_a_good_package_passes(report):
    assert bad_gates(report) == {}
    assert report.gates_ok
    assert (report.run, report.model_type, report.primary) == ("tiny-llama", "llama", "T24")
    assert (report.heldout, report.sampled_seed) == (None, None)


def test_every_shape_is_measured_on_every_token_of_a_text(report):
    assert list(report.shapes) == ["T16", "T24", "T40"]
    for seq_len, shape in zip((16, 24, 40), report.shapes.values(), strict=True):
        assert isinstance(shape, ShapeMeasured)
        assert (shape.positions, shape.perplexity.tokens) == (seq_len, seq_len - 1)
        assert shape.sqnr_db > 50
        # Random weights have learned nothing: about as likely as 1 in 300, or less.
        assert shape.perplexity.reference > 100
        assert 0 < shape.perplexity.change < 0.005
    primary = report.shapes["T24"].perplexity
    assert gate_of(report, "Perplexity matches the checkpoint's").measured == primary.change


def test_the_functions_with_a_cache_are_measured(report):
    found = report.stateful
    assert isinstance(found, StatefulMeasured)
    assert (found.cache_positions, found.prefills, found.decoded, found.continued) == (40, 6, 20, 11)
    assert found.padding_err == 0.0
    assert gate_of(report, "Decode depends on the cache").measured == found.emptied_sqnr_db < 20


def test_the_answers_are_greedy_and_the_checkpoints_own(report):
    assert [answer.prompt for answer in report.sampled] == ["Why?", "Who is it?", "And how?"]
    assert all(answer.right and answer.mood is None for answer in report.sampled)
    assert gate_of(report, "Greedy answers match the checkpoint's").measured == "3 of 3"


def test_the_same_package_gives_the_same_report(pristine_imported, report):
    assert encode(verified(pristine_imported)) == encode(report)


# Planted bugs


def test_a_missing_causal_mask_is_caught(imported, monkeypatch):
    stateless = ExportConfig()  # with a cache, the export itself finds that `prefill` is not `main`
    with monkeypatch.context() as patch:
        # An export refuses a graph that does not compute what the model computes.
        patch.setattr("coremill.coreml.export.validate", lambda *_: ShapeOk(max_abs_err=0.0))
        patch.setattr("coremill.coreml.decoder.MASKED_SCORE", 0.0)
        made_again(imported, export=stateless)
    bad = bad_gates(verified(imported, export=stateless))
    assert bad["No position depends on a later token"].endswith(
        " logits before the changed token is above 0 logits before the changed token"
    )
    assert {"Padding does not change the logits", "SQNR at the primary shape"} <= bad.keys()


def test_a_token_that_does_not_see_itself_is_caught(imported):
    def plant(spec):
        function = spec.mlProgram.functions["decode"]
        (hidden,) = [
            operation
            for operation in function.block_specializations[function.opset].operations
            if operation.type == "greater"
        ]
        hidden.type = "greater_equal"

    imported.edit_spec(plant)
    report = verified(imported)
    assert report.stateful.end_problem is None
    decode = "Decode from an empty cache matches main"
    after = "Decode after a prompt matches main"
    assert {decode, after} <= bad_gates(report).keys()
    rounding = "Matches the checkpoint up to weight rounding"
    assert set(bad_gates(report)) <= {decode, after, rounding, "Greedy answers match the checkpoint's"}
    assert bad_gates(report)[decode] == f"{report.stateful.decode_sqnr_db:g} dB is below 40 dB"


def test_logits_that_are_not_finite_in_an_answer_alone_are_a_failure_and_no_crash(imported, monkeypatch):
    def answer_by(runner, *arguments, **options):
        say = runner.decode
        runner.decode = lambda token: {name: value * np.float32("nan") for name, value in say(token).items()}
        return answer_greedily(runner, *arguments, **options)

    monkeypatch.setattr("coremill.verification.measurement.answer_greedily", answer_by)
    report = verified(imported)
    error = "no answer to a question: ValueError: logits contain NaN or +inf, or are all -inf"
    assert (report.stateful.error, report.sampled) == (error, ())
    assert set(bad_gates(report).values()) == {error}
    assert len(bad_gates(report)) == 7


def test_functions_that_do_not_load_fail_their_gates_and_no_others(imported):
    def plant(spec):
        function = spec.mlProgram.functions["decode"]
        operations = function.block_specializations[function.opset].operations
        next(operation for operation in operations if operation.type == "gather").type = "no_such_operation"

    imported.edit_spec(plant)
    report = verified(imported)
    assert isinstance(report.stateful, StatefulError)
    assert report.stateful.error.startswith("the functions do not load: ")
    assert "no_such_operation" in report.stateful.error
    bad = bad_gates(report)
    assert "no_such_operation" in bad.pop("Matches the checkpoint up to weight rounding")
    assert len(bad) == 7
    assert set(bad.values()) == {report.stateful.error}
    assert report.sampled == ()


def test_a_contract_with_a_cache_that_the_run_does_not_export_is_caught(imported):
    report = verified(imported, export=ExportConfig())
    assert bad_gates(report) == {
        "Contract file generated and valid": (
            "export.stateful is false, the contract has prefill, decode with a cache"
        )
    }
    assert (report.stateful, report.sampled) == (None, ())


def test_a_contract_without_the_cache_that_the_run_exports_is_caught(imported):
    made_again(imported, export=ExportConfig())
    report = verified(imported)
    bad = bad_gates(report)
    assert bad.pop("Contract file generated and valid") == (
        "export.stateful is true, the contract has no functions with a cache"
    )
    assert len(bad) == 7
    assert set(bad.values()) == {"the contract has no functions with a cache"}


# A student with a cache


@pytest.mark.parametrize(
    ("shapes", "stateful"),
    # A shape beyond the model's context cannot have a cache.
    [((24,), True), ((24,), False), ((24, 4096), False)],
    ids=["with a cache", "without", "and another beyond the context"],
)
def test_a_package_of_one_length_passes(imported, shapes, stateful):
    """With one working length, the functions have the names that they have with several."""
    again = {"shapes": ShapeSet(primary=24, all=shapes), "export": ExportConfig(stateful=stateful)}
    made_again(imported, **again)
    contract = imported.read_contract()
    names = ["main", "prefill_T24", "decode"] if stateful else ["main"]
    assert [function.name for function in contract.package_functions] == names
    assert [each.name for each in package_interfaces(read_spec(imported.package))] == names
    report = verified(imported, **again)
    beyond = {key for key, shape in report.shapes.items() if not isinstance(shape, ShapeMeasured)}
    assert beyond == {f"T{seq_len}" for seq_len in shapes[1:]}
    assert must_gates_ok(report.gates)
    if stateful:
        assert report.stateful.prefills == 4


def test_a_student_with_a_cache_is_checked_for_both(build):
    stateful = ExportConfig(stateful=True, context=128)
    made_again(build, export=stateful)
    report = verified(build, export=stateful)
    assert bad_gates(report) == {}
    assert (report.stateful.cache_positions, report.stateful.decoded, report.stateful.prefills) == (128, 32, 6)
    # The halt head's output is compared too; what follows the questions is still what a student is asked.
    assert min(report.stateful.decode_sqnr_db, report.stateful.continued_sqnr_db) > 40
    assert (report.heldout.asked, report.sampled_seed, len(report.sampled)) == (10, 3, 10)
    assert report.shapes["T96"].perplexity is None


# The command


def verify_here(build, *more: str) -> int:
    argv = [
        *("--package", str(build.package)),
        *("--contract", str(build.contract)),
        *("--checkpoint", str(build.checkpoint)),
        *("--dataset-dir", str(build.dataset)),
        *("--tokenizer", str(build.tokenizer)),
        *("--out", str(build.root / "verification_report.json")),
        *more,
    ]
    return exit_on_error(lambda: main(argv))


def test_the_command_asks_of_texts_what_they_allow_and_of_the_contract_whether_there_is_a_cache(
    pristine_imported, tmp_path
):
    out = tmp_path / "report.json"
    assert verify_here(pristine_imported, "--out", str(out)) == 0
    report = read_json(out, VerificationReport)
    assert must_gates_ok(report.gates)
    assert isinstance(report.stateful, StatefulMeasured)
    assert report.stateful.decoded == 32


def test_the_command_exits_with_3_where_a_must_gate_fails(imported):
    def plant(spec):
        spec.mlProgram.functions["decode"].block_specializations["CoreML8"].operations[
            -1
        ].type = "no_such_operation"

    imported.edit_spec(plant)
    assert verify_here(imported) == GATES_FAILED


def test_texts_are_refused_where_a_held_out_set_is_meant(pristine_imported, capsys, tmp_path):
    out = tmp_path / "report.json"
    config = CONFIGS / "magic-8-ball.toml"
    assert verify_here(pristine_imported, "--config", str(config), "--out", str(out)) == 10
    assert capsys.readouterr().err == (
        f"configuration error: {pristine_imported.dataset} has texts\n"
        "  expected: a held-out set: the configuration checks answers\n"
    )
    assert not out.exists()


def test_a_held_out_set_is_refused_where_texts_are_meant(pristine, capsys, tmp_path):
    out = tmp_path / "report.json"
    config = CONFIGS / "smollm2-135m.toml"
    assert verify_here(pristine, "--config", str(config), "--out", str(out)) == 10
    assert capsys.readouterr().err == (
        f"configuration error: {pristine.dataset} has a held-out set\n"
        "  expected: texts: the configuration is of a run that imports its model\n"
    )


def test_an_imported_model_has_no_held_out_questions(pristine_imported, capsys):
    with pytest.raises(SystemExit) as caught:
        verify_here(pristine_imported, "--heldout", "3")
    assert caught.value.code == 2
    assert "--heldout applies to trained models only; this model was imported" in capsys.readouterr().err


def test_an_import_that_was_not_compared_with_its_source_fails_a_must_gate(imported):
    gate = "The checkpoint computes what its source does"
    path = layout.source_parity(imported.checkpoint.parent)
    parity = read_json(path, SourceParity)
    (passed_gate,) = parity.gates
    failed_gate = failed("0.2 is above 1e-05", measured=0.2, threshold=1e-5).gate(passed_gate.name, Severity.MUST)
    write_json(path, msgspec.structs.replace(parity, gates=(failed_gate,)))
    assert bad_gates(verified(imported))[gate] == "in none: relative error of logits: 0.2 is above 1e-05"
    write_json(path, msgspec.structs.replace(parity, checkpoint_digest="sha256:0"))
    digest = file_digest(imported.checkpoint)
    assert bad_gates(verified(imported))[gate] == (
        f"the checkpoint of source_parity.json is sha256:0, not {digest}"
    )
    path.unlink()
    assert bad_gates(verified(imported))[gate] == (
        "there is no source_parity.json next to the checkpoint: import it again with `coremill import`"
    )
