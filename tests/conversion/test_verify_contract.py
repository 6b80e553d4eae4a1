"""Verification: a good package passes, and each planted bug is caught by the gate that is there for it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.reading import bad_gates, gate_of

from coremill.conversion import convert_coreml, export_pytorch
from coremill.conversion.verify_contract import main, run_stage
from coremill.core import layout
from coremill.core.command import exit_on_error
from coremill.core.config import RunConfig
from coremill.core.contract import ShapeOk, TokenizerRef
from coremill.core.diagnostics import ConversionFailure
from coremill.core.digest import digest, file_digest
from coremill.core.documents import encode, read_json, write_json
from coremill.core.errors import GATES_FAILED, ContractMismatchError
from coremill.core.gates import Outcome, PlatformReason, Severity, must_gates_ok
from coremill.core.reports import Backend, ShapeError, ShapeMeasured, VerificationReport
from coremill.coreml.package import MODEL, WEIGHT_FILE, read_spec
from coremill.mil import MLModel
from coremill.model.checkpoint import checkpoint_of, load_checkpoint, save_checkpoint
from coremill.model.student import new_student
from coremill.text.student_tokenizer import Tokenizer
from coremill.verification.backends import Runner, core_ml_runner, reference_runner
from coremill.verification.main_checks import ask_heldout
from coremill.verification.scoring import Scorer
from coremill.verification.verify import lane_of


def verified(build, config: RunConfig | None = None) -> VerificationReport:
    context = build.context("verify", *build.stages)
    run_stage(context if config is None else msgspec.structs.replace(context, config=config))
    return read_json(layout.verification_report(build.root / "verify"), VerificationReport)


@pytest.fixture(scope="module")
def report(pristine) -> VerificationReport:
    """The report on the package as it was made."""
    return verified(pristine)


# The package as it was made


def test_a_good_package_passes_every_gate_that_can_run_here(report):
    off_macos = {"Core ML loads and predicts", "Optimal model size and performance"}
    not_passed = {gate.name: gate.outcome for gate in report.gates if gate.outcome is not Outcome.PASSED}
    expected = {
        # coremltools says that it was not tested with this torch; a row that is only nice to have says so.
        "Zero warnings in conversion logs": Outcome.FAILED,
        "Optimal model size and performance": Outcome.NOT_RUN,
        "Perfect verification report": Outcome.FAILED,
    }
    if sys.platform != "darwin":
        expected["Core ML loads and predicts"] = Outcome.NOT_RUN
        reasons = {gate_of(report, name).platform_reason for name in off_macos}
        assert reasons == {PlatformReason.NEEDS_MACOS}
    assert not_passed == expected
    assert report.gates_ok


def test_every_shape_is_measured_on_the_answers_of_the_held_out_questions(pristine, report):
    rows, tokenizer = pristine.read_rows(), pristine.read_tokenizer()
    assert list(report.shapes) == ["T80", "T96", "T128"]
    for shape in report.shapes.values():
        assert isinstance(shape, ShapeMeasured)
        assert shape.backend is Backend.MIL_REFERENCE
        assert shape.positions == sum(len(tokenizer.encode_answer(row.teacher_text)) for row in rows)
        assert 0 < shape.max_abs_err < 0.1
        assert 40 < shape.sqnr_db < 100
        assert shape.top1_agreement == 1.0
        assert shape.excluded <= 0.02 * shape.positions


def test_the_answers_are_those_that_the_student_learned(pristine, report):
    rows = pristine.read_rows()
    heldout = report.heldout
    assert heldout is not None
    assert heldout.asked == heldout.exact == len(rows)
    assert heldout.right_mood == heldout.with_mood == sum(row.mood is not None for row in rows)
    assert heldout.right_tool_call == heldout.with_tool_call == len(rows) - heldout.with_mood
    assert heldout.out_of_vocabulary == 0
    assert heldout.cross_entropy_nats == pytest.approx(heldout.teacher_entropy_nats + heldout.teacher_kl_nats)
    assert 0 < heldout.teacher_kl_nats < 0.02


def test_sampled_answers_are_real_and_the_same_for_the_same_seed(pristine, report):
    assert [answer.prompt for answer in report.sampled] == [row.prompt for row in pristine.read_rows()]
    assert len({answer.answer for answer in report.sampled}) >= 5
    assert report.sampled_seed == 3
    assert encode(verified(pristine)) == encode(report)  # the whole report, to the byte


def test_the_report_names_what_it_is_about(pristine, report):
    assert (report.run, report.lane, report.model_type) == (
        "tiny-ball",
        pristine.read_contract().toolchain.packages["torch"],
        "magic-8-ball",
    )
    assert report.package_digest == digest(pristine.package)
    assert report.contract_digest == file_digest(pristine.contract)
    assert report.primary == "T96"


def test_the_compatibility_gate_cites_the_measured_cell(report):
    gate = gate_of(report, "No compatibility warnings")
    assert (gate.outcome, gate.measured, gate.threshold) == (Outcome.PASSED, 1, 0)
    torch_version = report.lane
    assert gate.reason.startswith(f"answered by the measured pass of cell torch-{torch_version} (python ==3.11.*")


@pytest.mark.needs_macos
def test_core_ml_itself_agrees_with_the_reference(pristine):
    contract = pristine.read_contract()
    runners = [make(pristine.package, contract) for make in (reference_runner, core_ml_runner)]
    (ids,) = pristine.read_prompts().packed(96, 1)
    expected, found = (runner.run(ids)["logits"] for runner in runners)
    np.testing.assert_allclose(found, expected, atol=0.1)


# Planted bugs: each is saved as if the converter had made it so


def test_a_missing_causal_mask_is_caught(build, monkeypatch):
    with monkeypatch.context() as patch:
        # An export refuses a graph that does not compute what the model computes.
        patch.setattr("coremill.coreml.export.validate", lambda *_: ShapeOk(max_abs_err=0.0))
        patch.setattr("coremill.coreml.decoder.MASKED_SCORE", 0.0)
        export_pytorch.run_stage(build.context("export", "dataset", "training"))
        convert_coreml.run_stage(build.context("convert", "export"))
    bad = bad_gates(verified(build))
    assert bad["No position depends on a later token"].endswith(
        " logits before the changed token is above 0 logits before the changed token"
    )
    assert {"Padding does not change the logits", "SQNR at the primary shape"} <= set(bad)


def test_swapped_outputs_are_caught(build, surgery):
    build.edit_spec(surgery.swap_outputs)
    report = verified(build)
    bad = bad_gates(report)
    assert "the package has halt_logits float32 (1, T, 512)" in bad["Inputs, outputs and shapes match the contract"]
    assert bad["Primary shape validation succeeds"] == "T96: the package returns `logits` as float32 [1, 96, 2]"
    assert bad["Every held-out answer is exact"] == "the package does not run at the primary shape T96"
    assert report.heldout is None


def test_an_output_without_its_name_is_caught(build, surgery):
    build.edit_spec(lambda spec: surgery.rename_output(spec, "logits", "var_1292"))
    bad = bad_gates(verified(build))
    assert "the package has var_1292 float32 (1, T, 512)" in bad["Inputs, outputs and shapes match the contract"]
    assert bad["Primary shape validation succeeds"] == "T96: the package returns `var_1292`, `halt_logits`"


def test_a_dropped_length_is_caught(build, surgery):
    build.edit_spec(lambda spec: surgery.drop_length(spec, 80))
    report = verified(build)
    assert bad_gates(report) == {
        "Inputs, outputs and shapes match the contract": (
            "lengths: the contract has [80, 96, 128]; the package has [96, 128]"
        ),
        "Matches the checkpoint up to weight rounding": (
            "in float32 arithmetic: input 'input_ids' is of shape [1, 80]"
        ),
    }
    assert isinstance(report.shapes["T80"], ShapeError)
    secondary = gate_of(report, "Secondary shapes validate")
    assert (secondary.outcome, secondary.measured) == (Outcome.FAILED, "1 of 2")
    assert secondary.reason.startswith("T80: ")
    assert not report.gates_ok


def test_a_scaled_weight_is_caught(build):
    names = [
        operation.outputs[0].name
        for operation in read_spec(build.package)
        .mlProgram.functions["main"]
        .block_specializations["CoreML8"]
        .operations
        if operation.type == "const" and operation.attributes["val"].WhichOneof("value") == "blobFileValue"
    ]
    (name,) = [name for name in names if "layers_1_qkv_weight" in name]
    build.scale_weight(name, 1.2)
    bad = bad_gates(verified(build))
    assert bad["SQNR at the primary shape"].endswith(" dB is below 40 dB")
    assert "Inputs, outputs and shapes match the contract" not in bad


def test_the_contract_of_another_package_is_caught(build):
    contract = build.read_contract()
    write_json(build.contract, msgspec.structs.replace(contract, model_type="toy"))
    assert bad_gates(verified(build)) == {
        "Contract file generated and valid": (
            f"the contract is {file_digest(build.contract)}, not "
            + read_spec(build.package).description.metadata.userDefined["com.coremill.contract_digest"]
            + "; model_type: the contract has 'toy', the checkpoint 'magic-8-ball'"
        )
    }


def test_an_untrained_model_is_caught_by_its_answers_alone(build):
    tokenizer = build.read_tokenizer()
    checkpoint = load_checkpoint(build.checkpoint)
    untrained = checkpoint_of(
        new_student(checkpoint.config, seed=1),
        model_type="magic-8-ball",
        step=0,
        tokenizer=TokenizerRef(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest),
    )
    save_checkpoint(build.checkpoint, untrained)
    export_pytorch.run_stage(build.context("export", "dataset", "training"))
    convert_coreml.run_stage(build.context("convert", "export"))
    config = build.context("verify").config
    few = msgspec.structs.replace(
        config.verify, heldout_answers=4, sampled_answers=2, min_distinct_sampled=1
    )  # its answers never end
    bad = bad_gates(verified(build, msgspec.structs.replace(config, verify=few)))
    assert bad["Every held-out answer is exact"] == "0 is below 1"
    assert bad["Held-out answers have the right mood"] == "0 is below 0.95"
    assert "KL divergence from the teacher" in bad
    assert "Halt decisions match the labels" in bad
    assert "SQNR at the primary shape" not in bad
    assert "No position depends on a later token" not in bad


def test_another_checkpoint_is_caught(build):
    checkpoint = load_checkpoint(build.checkpoint)
    weights = {name: tensor * 1.01 for name, tensor in checkpoint.state_dict.items()}
    save_checkpoint(build.checkpoint, dataclasses.replace(checkpoint, state_dict=weights))
    bad = bad_gates(verified(build))
    assert bad["Checkpoint loads and validates"].startswith("the checkpoint is sha256:")
    assert "SQNR at the primary shape" in bad


@pytest.mark.parametrize(
    ("remove", "gate", "reason"),
    [
        ("graph", "Export completes", "there is no tiny_ball.pt next to the contract"),
        ("diagnostics", "Core ML conversion completes", "there is no diagnostics.json next to the package"),
    ],
)
def test_what_was_not_there_to_be_checked_did_not_pass(build, remove, gate, reason):
    {"graph": build.graph, "diagnostics": layout.diagnostics_file(build.package.parent)}[remove].unlink()
    assert bad_gates(verified(build))[gate] == reason


def test_diagnostics_of_another_package_are_none(build):
    path = layout.diagnostics_file(build.package.parent)
    path.write_text(path.read_text().replace(digest(build.package), "sha256:0"))
    bad = bad_gates(verified(build))
    assert bad["Core ML conversion completes"] == (
        f"the package that diagnostics.json describes is sha256:0, not {digest(build.package)}"
    )


def test_logits_that_are_not_finite_are_a_failed_shape_and_no_crash(build):
    spec = read_spec(build.package)
    (name,) = {
        operation.outputs[0].name
        for operation in spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations
        if operation.type == "const" and "lm_head" in operation.outputs[0].name
    }
    with np.errstate(all="ignore"):
        build.scale_weight(name, float("nan"))
    build.sign()
    report = verified(build)
    assert isinstance(report.shapes["T96"], ShapeError)
    assert "are NaN or infinite" in report.shapes["T96"].error
    assert "are NaN or infinite" in bad_gates(report)["Primary shape validation succeeds"]


def _first_operation(spec, op_type):
    operations = spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations
    return next(operation for operation in operations if operation.type == op_type)


def test_a_package_that_does_not_load_has_a_report_all_the_same(build):
    def plant(spec):
        _first_operation(spec, "gather").type = "no_such_operation"

    build.edit_spec(plant)
    report = verified(build)
    loads = gate_of(report, "The Core ML model loads")
    assert (loads.outcome, loads.severity) == (Outcome.FAILED, Severity.MUST)
    assert "no_such_operation" in loads.reason
    silent = [gate for gate in report.gates if gate.reason == f"the package does not load: {loads.reason}"]
    assert len(silent) == 15
    assert {gate.outcome for gate in silent} == {Outcome.NOT_RUN}
    assert report.heldout is None
    assert all(isinstance(shape, ShapeError) for shape in report.shapes.values())
    assert verify_here(build) == GATES_FAILED


def test_the_operations_counted_are_those_that_were_lowered(pristine, report):
    operations = read_spec(pristine.package).mlProgram.functions["main"].block_specializations["CoreML8"].operations
    count = sum(operation.type != "const" for operation in operations)
    assert gate_of(report, "The Core ML model loads").measured == f"{count} operations lowered by coremill.mil"


class Wide:
    """Runs the package, and says an id that no tokenizer here has wherever it would end an answer."""

    def __init__(self, package: Path) -> None:
        self._model = MLModel(package)

    def predict(self, data):
        outputs = self._model.predict(data)
        logits = outputs["logits"]  # (1, T, V)
        wide = np.concatenate([logits, np.full_like(logits[..., :3], -1e4)], axis=-1)
        ends = wide.argmax(-1) == Tokenizer.end_id
        wide[..., -1][ends] = 1e4
        return {**outputs, "logits": wide}


def test_a_token_beyond_the_vocabulary_is_counted_and_never_exact(pristine):
    contract = pristine.read_contract()
    logits, halt = contract.outputs
    outputs = (msgspec.structs.replace(logits, shape=(1, "T", 515)), halt)
    promised = msgspec.structs.replace(contract, outputs=outputs)
    runner = Runner(Wide(pristine.package), Backend.MIL_REFERENCE, promised)
    tokenizer, rows = pristine.read_tokenizer(), pristine.read_rows()[:2]
    found = ask_heldout(Scorer(runner, [96], tokenizer.pad_id), rows, tokenizer, pristine.read_prompts().answer_key)
    assert found.answers.out_of_vocabulary == 2
    assert (found.answers.asked, found.answers.exact, found.answers.right_mood) == (2, 0, 0)


def test_the_lane_is_the_release_of_torch_and_no_guess(pristine):
    contract = pristine.read_contract()

    def with_torch(packages):
        return msgspec.structs.replace(
            contract, toolchain=msgspec.structs.replace(contract.toolchain, packages=packages)
        )

    assert lane_of(with_torch({"torch": "2.8.0+cu128"})) == "2.8.0"
    with pytest.raises(ContractMismatchError, match=r"^the contract's toolchain has torch None") as caught:
        lane_of(with_torch({}))
    assert caught.value.exit_code == 42


def test_a_contract_that_claims_less_than_the_checkpoint_has_is_caught(build, capsys):
    contract = build.read_contract()
    arch = msgspec.structs.replace(contract.model_arch, use_halt_head=False)
    write_json(build.contract, msgspec.structs.replace(contract, model_arch=arch))
    assert verify_here(build) == 42
    assert "has use_halt_head false, and an output `halt_logits`" in capsys.readouterr().err


# The record of a failed conversion


@pytest.mark.parametrize("given", ["the package that was not made", "the record", "an older package"])
def test_every_gate_fails_on_the_record_of_a_failed_conversion(build, report, given):
    folder = build.root / "failed"
    folder.mkdir()
    package = folder / "tiny_ball.mlpackage"
    if given == "an older package":
        build.package.rename(package)
    record = ConversionFailure(
        package=package.name,
        graph_digest=file_digest(build.graph),
        contract_digest=file_digest(build.contract),
        error="coremltools could not convert the graph: NotImplementedError: no such op",
        traceback_tail=("NotImplementedError: no such op",),
        toolchain=build.read_contract().toolchain,
        notices=(),
    )
    write_json(layout.placeholder_file(folder), record)
    subject = layout.placeholder_file(folder) if given == "the record" else package
    out = build.root / "report.json"
    assert verify_here(build, "--package", str(subject), "--out", str(out)) == GATES_FAILED
    failed = read_json(out, VerificationReport)
    assert [(gate.name, gate.severity) for gate in failed.gates] == [
        (gate.name, gate.severity) for gate in report.gates
    ]
    assert {gate.outcome for gate in failed.gates} == {Outcome.FAILED}
    assert {gate.reason for gate in failed.gates} == {
        "the conversion failed: coremltools could not convert the graph: NotImplementedError: no such op"
    }
    assert not failed.gates_ok
    assert all(isinstance(shape, ShapeError) for shape in failed.shapes.values())


# The command


def verify_here(build, *more: str) -> int:
    argv = [
        *("--package", str(build.package)),
        *("--contract", str(build.contract)),
        *("--checkpoint", str(build.checkpoint)),
        *("--dataset-dir", str(build.dataset)),
        *("--out", str(build.root / "verification_report.json")),
        *more,
    ]
    return exit_on_error(lambda: main(argv))


def test_the_command_passes_a_good_package_and_answers_as_many_questions_as_asked(pristine, tmp_path):
    out = tmp_path / "made" / "report.json"
    assert verify_here(pristine, "--heldout", "7", "--out", str(out)) == 0
    report = read_json(out, VerificationReport)
    assert must_gates_ok(report.gates)
    assert report.heldout is not None
    assert (report.run, report.heldout.asked) == ("tiny-ball", 7)


def test_the_command_exits_with_3_where_a_must_gate_fails_and_writes_the_report(build, surgery):
    build.edit_spec(lambda spec: surgery.drop_length(spec, 80))
    assert verify_here(build) == GATES_FAILED
    assert not read_json(build.root / "verification_report.json", VerificationReport).gates_ok


def _flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("break_it", "code", "message"),
    [
        ("altered weight", 13, "digest error: {package}/Data/com.apple.CoreML/weights/weight.bin: found sha256:"),
        ("missing weight", 44, "package error: {package} lacks Data/com.apple.CoreML/weights/weight.bin"),
        ("altered model", 13, "digest error: {package}/Data/com.apple.CoreML/model.mlmodel does not match "),
        ("missing package", 44, "package error: {package} does not exist"),
        ("contract is text", 11, "document error: {contract} is not JSON: "),
        ("contract of version 2", 12, "format version error: {contract}: schema_version '2.0'"),
        ("truncated checkpoint", 22, "unreadable checkpoint error: "),
        ("no held-out set", 20, "dataset error: {dataset} has no held-out set"),
        ("no answer key", 20, "dataset error: cannot read {dataset}/answers.json: No such file or directory"),
        ("bad held-out line", 20, "dataset error: {dataset}/heldout.jsonl:3: not JSON"),
        ("bad tokenizer", 21, "tokenizer error: {dataset}/tokenizer.json is not JSON"),
    ],
)
def test_bad_input_has_its_own_exit_code_and_leaves_what_was_there(build, capsys, break_it, code, message):
    report = build.root / "verification_report.json"
    report.write_text("an older report")
    match break_it:
        case "altered weight":
            _flip(build.package / "Data" / WEIGHT_FILE, 20_000)
        case "missing weight":
            (build.package / "Data" / WEIGHT_FILE).unlink()
        case "altered model":
            # In the name of an operation: it still parses, and computes the same.
            path = build.package / "Data" / MODEL
            _flip(path, path.read_bytes().rindex(b"decoder_norm_weight"))
        case "missing package":
            build.package.rename(build.root / "elsewhere")
        case "contract is text":
            build.contract.write_text("no JSON")
        case "contract of version 2":
            build.contract.write_text(build.contract.read_text().replace('"1.0"', '"2.0"', 1))
        case "truncated checkpoint":
            build.checkpoint.write_bytes(build.checkpoint.read_bytes()[:5000])
        case "no held-out set":
            build.heldout.unlink()
        case "no answer key":
            layout.answer_key_file(build.dataset).unlink()
        case "bad held-out line":
            lines = build.heldout.read_text().splitlines()
            build.heldout.write_text("\n".join([*lines[:2], "no JSON", *lines[3:]]))
        case "bad tokenizer":
            build.tokenizer.write_text("no JSON")
    assert verify_here(build) == code
    names = {"package": build.package, "contract": build.contract, "dataset": build.dataset}
    assert capsys.readouterr().err.startswith(message.format(**names))
    assert report.read_text() == "an older report"


def test_a_count_of_no_questions_is_a_usage_error(build, capsys):
    with pytest.raises(SystemExit) as caught:
        verify_here(build, "--heldout", "0")
    assert caught.value.code == 2
    assert "--heldout must be at least 1" in capsys.readouterr().err
