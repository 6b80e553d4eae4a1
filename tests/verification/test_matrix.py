"""The agreement matrix: its figures are those of torch's own functions, and each row is what it says it is."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from contextlib import nullcontext

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coremill.conversion import convert_coreml, export_pytorch
from coremill.core import layout
from coremill.core.config import ConvertConfig, ExportConfig
from coremill.core.digest import digest, file_digest
from coremill.core.documents import encode, read_json, write_json
from coremill.core.errors import ConfigError, ContractMismatchError, DigestError
from coremill.core.gates import PlatformReason
from coremill.core.matrix import FORMATS, FormatFailed, FormatMeasured, FormatNotRun, Measure
from coremill.core.parity import GgufParity, HuggingFaceParity
from coremill.coreml.graph import load_program, run_program
from coremill.coreml.package import WEIGHT_FILE
from coremill.data.prompts import Compared
from coremill.model.checkpoint import build_student, load_checkpoint, save_checkpoint
from coremill.model.reference import Reference
from coremill.verification.backends import reference_runner
from coremill.verification.matrix import Format, Group, Subject, _Measured, agreement_matrix, groups_of

BY_NAME = {
    "eager": "the checkpoint in float32",
    "torchscript": "the checkpoint in float32",
    "torch-export": "the checkpoint in float32",
    "mil-reference": "the checkpoint in float32",
    "transformers": "the checkpoint in float32",
    "gguf-f32": "the checkpoint in float32",
    "gguf-f16": "the checkpoint in float32",
    "gguf-q8_0": "the checkpoint in float32",
    "gguf-q4_0": "the checkpoint in float32",
    "mil-float32": "the checkpoint in float32, its weights rounded as the package's",
}
"""The formats that run anywhere, with what they are compared with."""


EXPORTS = {}
"""Of each run, by its name."""


@pytest.fixture(scope="module", autouse=True)
def _forms(exports):
    EXPORTS.update(exports)


def subject_of(build) -> Subject:
    return Subject(
        run=build.config.name,
        checkpoint=build.checkpoint,
        tokenizer=build.tokenizer,
        prompts=build.dataset,
        contract=build.contract,
        package=build.package,
        hf=EXPORTS[build.config.name].hf,
        hf_dtype="float32",
        gguf=EXPORTS[build.config.name].gguf,
    )


def matrix_of(build, *, seq_len=None, chosen=tuple(FORMATS), **verify):
    verify = msgspec.structs.replace(build.config.verify, **verify)
    return agreement_matrix(subject_of(build), verify, build.config.convert, seq_len=seq_len, chosen=chosen)


def rows_of(matrix) -> dict:
    return {row.format: row for row in matrix.rows}


@pytest.fixture(scope="module")
def matrix(pristine_imported):
    return matrix_of(pristine_imported)


@pytest.fixture(scope="module")
def rows(matrix):
    return rows_of(matrix)


# What is in it


def test_every_format_is_a_row_and_every_row_within_its_tolerances(matrix, rows):
    assert list(rows) == list(FORMATS)
    for name, reference in BY_NAME.items():
        assert isinstance(rows[name], FormatMeasured), rows[name]
        assert rows[name].reference == reference
        assert rows[name].outside == ()
        assert (rows[name].positions, rows[name].judged) == (24, 24)
    assert matrix.within


def test_core_ml_runs_on_a_mac_and_says_so_elsewhere(rows):
    if sys.platform == "darwin":
        assert rows["coreml"].outside == ()
    else:
        assert rows["coreml"] == FormatNotRun(
            format="coreml", reason="Core ML runs on macOS only", platform_reason=PlatformReason.NEEDS_MACOS
        )


def test_it_says_what_it_is_about(pristine_imported, matrix):
    assert (matrix.run, matrix.shape, matrix.sequences, matrix.argmax_margin) == ("tiny-llama", "T24", 1, 0.05)
    assert matrix.lane == pristine_imported.read_contract().toolchain.packages["torch"].partition("+")[0]
    assert matrix.checkpoint_digest == file_digest(pristine_imported.checkpoint)
    assert matrix.contract_digest == file_digest(pristine_imported.contract)
    assert matrix.package_digest == digest(pristine_imported.package)


def test_the_same_artifacts_give_the_same_matrix(pristine_imported, matrix):
    assert encode(matrix_of(pristine_imported)) == encode(matrix)


def test_the_figures_are_those_of_torch_s_own_functions(pristine_imported, rows):
    (ids,) = pristine_imported.read_prompts().packed(24, 1)
    student = build_student(load_checkpoint(pristine_imported.checkpoint))
    contract = pristine_imported.read_contract()
    with torch.no_grad():
        x = student(torch.tensor([ids]))[0][0].double()
    package = reference_runner(pristine_imported.package, contract).run(ids)["logits"]
    program = run_program(load_program(pristine_imported.graph), ids)[0][0]
    for name, y in (("mil-reference", torch.from_numpy(package)), ("torchscript", program)):
        y = y.double()
        row = rows[name]
        assert row.max_abs_err == pytest.approx(float((x - y).abs().max()), rel=1e-12)
        assert row.sqnr_db == pytest.approx(float(10 * torch.log10(x.square().sum() / (x - y).square().sum())))
        log_p, log_q = F.log_softmax(x, -1), F.log_softmax(y, -1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        assert row.kl_nats == pytest.approx(float(kl), rel=1e-6, abs=1e-13)
        best = x.topk(2, -1).values
        counts = best[:, 0] - best[:, 1] > 0.05
        assert row.excluded == int((~counts).sum())
        assert row.top1_agreement == float((x.argmax(-1) == y.argmax(-1))[counts].double().mean())
        for found, logits in ((row.perplexity.reference, x), (row.perplexity.measured, y)):
            assert found == pytest.approx(
                float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp()), rel=1e-9
            )


def test_each_tolerance_is_the_configuration_s_or_float32_s(pristine_imported, matrix):
    (ids,) = pristine_imported.read_prompts().packed(24, 1)
    checkpoint = load_checkpoint(pristine_imported.checkpoint)
    largest = float(np.abs(Reference.of(checkpoint).run(ids)["logits"]).max())
    in_float32 = ("eager", "torchscript", "torch-export", "transformers", "gguf-f32")
    configured = tuple(name for name in FORMATS if not name.startswith("gguf-"))
    others = tuple(name for name in configured if name != "mil-float32")
    found = [(each.measure, each.bound, each.rows) for each in matrix.tolerances]
    assert found == [
        (Measure.MAX_ABS_ERR, 1e-5 * largest, in_float32),
        (Measure.SQNR_DB, 40.0, others),
        (Measure.SQNR_DB, 90.0, ("mil-float32",)),
        (Measure.TOP1_AGREEMENT, 1.0, configured),
        (Measure.KL_NATS, 1e-3, configured),
        (Measure.EXCLUDED_SHARE, 4 / 24, configured),  # of few positions: `most_of`
        (Measure.PERPLEXITY_CHANGE, 0.005, configured),
        (Measure.KL_NATS, 1e-4, ("gguf-f16",)),
        (Measure.KL_NATS, 5e-3, ("gguf-q8_0",)),
        (Measure.KL_NATS, 1.0, ("gguf-q4_0",)),
    ]
    assert [each.source for each in matrix.tolerances][:7] == [
        f"float32 rounding, as at export: 1e-05 of the largest logit, {largest:.4g}",
        "min_sqnr_db in [verify]",
        "float32 rounding; both sides have the same rounded weights",
        "every position except ties, by argmax_margin in [verify]: 0.05 logits",
        "max_kl_nats in [verify]",
        "max_excluded_share in [verify]",
        "max_perplexity_change in [verify]",
    ]


def test_a_student_has_no_perplexity_and_its_answers_are_judged(pristine):
    matrix = matrix_of(pristine)
    assert matrix.within
    assert matrix.sequences == 4 + 10  # packed, and each held-out conversation
    assert Measure.PERPLEXITY_CHANGE not in [each.measure for each in matrix.tolerances]
    tokenizer = pristine.read_tokenizer()
    answers = sum(len(tokenizer.encode_answer(row.teacher_text)) for row in pristine.read_rows())
    for name in BY_NAME:
        row = rows_of(matrix)[name]
        assert (row.perplexity, row.judged) == (None, answers)
    assert rows_of(matrix)["mil-float32"].sqnr_db > 110


def test_another_length_is_chosen_from_those_that_run(pristine_imported):
    matrix = matrix_of(pristine_imported, seq_len=40, chosen=["torchscript"])
    assert (matrix.shape, rows_of(matrix)["torchscript"].positions) == ("T40", 40)
    with pytest.raises(ConfigError) as caught:
        matrix_of(pristine_imported, seq_len=17)
    assert (caught.value.found, caught.value.expected) == (
        "the graph does not run at T17",
        "one of T16, T24, T40",
    )


def test_formats_that_are_not_chosen_say_so_and_read_nothing(imported):
    shutil.rmtree(imported.package)
    matrix = matrix_of(imported, chosen=["torch-export"])
    assert matrix.package_digest is None
    assert matrix.within
    found = rows_of(matrix)
    assert isinstance(found.pop("torch-export"), FormatMeasured)
    assert list(found.values()) == [
        FormatNotRun(format=name, reason="not selected by --formats") for name in FORMATS if name != "torch-export"
    ]


def test_a_run_of_the_other_front_end_has_both_programs_too(imported):
    config = msgspec.structs.replace(imported.config, export=ExportConfig(frontend="torch-export"))
    build = msgspec.structs.replace(imported, config=config)
    shutil.rmtree(imported.root / "export")
    export_pytorch.run_stage(build.context("export", "texts", "import"))
    assert [path.suffix for path in sorted((imported.root / "export").iterdir())] == [".pt2", ".json"]
    found = rows_of(matrix_of(build, chosen=["torchscript", "torch-export"]))
    assert found["torchscript"].outside == found["torch-export"].outside == ()
    assert found["torchscript"].max_abs_err > 0  # not the reference itself


def test_a_package_in_float32_is_compared_with_the_weights_as_they_are(imported):
    settings = ConvertConfig(compute_precision="float32")
    config = msgspec.structs.replace(imported.config, convert=settings, export=ExportConfig())
    build = msgspec.structs.replace(imported, config=config)
    export_pytorch.run_stage(build.context("export", "texts", "import"))
    convert_coreml.run_stage(build.context("convert", "export"))
    found = rows_of(matrix_of(build, chosen=["mil-reference", "mil-float32"]))
    assert found["mil-reference"].sqnr_db > 100
    assert found["mil-float32"].sqnr_db == found["mil-reference"].sqnr_db


def test_weights_that_float16_does_not_hold_are_not_rounded_and_their_row_says_so(pristine_imported):
    checkpoint = load_checkpoint(pristine_imported.checkpoint)
    checkpoint.state_dict["layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    prompts, contract = pristine_imported.read_prompts(), pristine_imported.read_contract()
    groups = groups_of(subject_of(pristine_imported), contract, checkpoint, prompts, ConvertConfig(), 24)
    names = [each.name for group in groups for each in group.formats]
    assert names == list(FORMATS)
    assert groups[1].formats[0].not_run == FormatNotRun(
        format="mil-float32",
        reason="a weight is outside float16's range, so the conversion does not round the weights",
    )


# What is outside its tolerance, and what does not run


def test_a_weight_scaled_by_a_hundredth_is_seen_by_the_row_that_leaves_rounding_aside(imported):
    imported.scale_weight("layers_1_down_weight", 1.01)
    matrix = matrix_of(imported)
    found = rows_of(matrix)
    assert found["mil-reference"].outside == ()
    assert found["mil-float32"].outside == (Measure.SQNR_DB,)
    assert 40 < found["mil-float32"].sqnr_db < 60
    assert not matrix.within


def test_a_weight_scaled_by_a_third_is_seen_by_the_package_s_own_row(imported):
    imported.scale_weight("layers_1_down_weight", 1.3)
    found = rows_of(matrix_of(imported))
    assert Measure.SQNR_DB in found["mil-reference"].outside
    assert found["torchscript"].outside == found["torch-export"].outside == ()


def test_stricter_tolerances_fail_rows(pristine_imported):
    matrix = matrix_of(pristine_imported, min_sqnr_db=80.0, max_kl_nats=0.0, max_perplexity_change=0.0)
    found = rows_of(matrix)
    assert found["mil-reference"].outside == (Measure.SQNR_DB, Measure.KL_NATS, Measure.PERPLEXITY_CHANGE)
    assert Measure.SQNR_DB not in found["torchscript"].outside
    assert not matrix.within


def test_a_format_that_does_not_run_is_a_row_and_the_others_are_measured(imported):
    def plant(spec):
        function = spec.mlProgram.functions["main"]
        operations = function.block_specializations[function.opset].operations
        next(operation for operation in operations if operation.type == "gather").type = "no_such_operation"

    imported.edit_spec(plant)
    matrix = matrix_of(imported)
    found = rows_of(matrix)
    assert isinstance(found["mil-reference"], FormatFailed)
    assert "no_such_operation" in found["mil-reference"].error
    assert found["torchscript"].outside == ()
    assert not matrix.within


@pytest.mark.parametrize("changed", ["checkpoint", "program", "contract"])
def test_artifacts_of_different_builds_are_not_compared(imported, changed):
    match changed:
        case "checkpoint":
            save_checkpoint(imported.checkpoint, _scaled(load_checkpoint(imported.checkpoint)))
            what = str(imported.checkpoint)
        case "program":
            imported.graph.write_bytes(imported.graph.read_bytes() + b" ")
            what = str(imported.graph)
        case "contract":
            imported.contract.write_bytes(imported.contract.read_bytes() + b"\n")
            what = f"the contract of {imported.package}"
    with pytest.raises(ContractMismatchError) as caught:
        matrix_of(imported)
    assert caught.value.found.startswith(f"{what} is sha256:")
    assert caught.value.expected.endswith(f", as {imported.contract} records")


def _scaled(checkpoint):
    weights = {name: weight * 2 for name, weight in checkpoint.state_dict.items()}
    return type(checkpoint)(**{**vars(checkpoint), "state_dict": weights})


def test_a_package_that_was_altered_is_not_run(imported):
    path = imported.package / "Data" / WEIGHT_FILE
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DigestError):
        matrix_of(imported)


# How it is measured


class Counted(np.ndarray):
    """An array that can be asked whether it is still there."""


def test_of_the_formats_logits_one_s_are_kept_at_a_time(pristine_imported):
    alive: list[weakref.ref] = []

    def counted(ids):
        assert not [each for each in alive if each() is not None]
        logits = np.ones((len(ids), 5), np.float32).view(Counted)
        alive.append(weakref.ref(logits))
        return {"logits": logits}

    def ones(ids):
        return {"logits": np.ones((len(ids), 5), np.float32)}

    compared = [Compared([1, 2, 3], slice(None), scored=False)] * 3
    formats = tuple(Format(name=name, load=lambda: nullcontext(counted)) for name in ("eager", "torchscript"))
    group = Group(reference="ones", make=lambda: ones, formats=formats)
    verify = pristine_imported.config.verify
    found = _Measured(compared, verify).rows(group, ["eager", "torchscript"])
    assert len(alive) == 6
    assert [(row.max_abs_err, row.positions) for row in found] == [(0.0, 9), (0.0, 9)]


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        (lambda n: {"other": np.ones((n, 5), np.float32)}, "ValueError: it has no output `logits`"),
        (
            lambda n: {"logits": np.full((n, 5), np.nan, np.float32)},
            "ValueError: 15 of the 15 measured logits are NaN or infinite",
        ),
        (
            lambda n: {"logits": np.ones((n, 6), np.float32)},
            "ValueError: logits of shape (3, 6) cannot be compared with (3, 5)",
        ),
    ],
)
def test_logits_that_cannot_be_compared_are_a_failed_row(pristine_imported, outputs, error):
    def ones(ids):
        return {"logits": np.ones((len(ids), 5), np.float32)}

    group = Group(
        reference="ones",
        make=lambda: ones,
        formats=(Format(name="torchscript", load=lambda: nullcontext(lambda ids: outputs(len(ids)))),),
    )
    measured = _Measured([Compared([1, 2, 3], slice(None), scored=False)], pristine_imported.config.verify)
    assert measured.rows(group, ["torchscript"]) == [FormatFailed(format="torchscript", error=error)]


# The formats that others run


def test_gguf_rows_are_logits_of_the_model_itself(pristine_imported, rows):
    assert rows["gguf-f32"].max_abs_err < 1e-4
    assert 0 < rows["gguf-f32"].kl_nats < 1e-9
    assert rows["gguf-f32"].top1_agreement == rows["gguf-f16"].top1_agreement == 1.0
    assert rows["gguf-f32"].max_abs_err < rows["gguf-f16"].max_abs_err < rows["gguf-q8_0"].max_abs_err
    assert rows["gguf-q4_k"] == FormatNotRun(
        format="gguf-q4_k", reason="the configuration's `formats` or [gguf] types do not include it"
    )


@pytest.fixture
def broken_forms(imported, tmp_path, monkeypatch):
    """The exports in folders of their own, to be broken."""
    whole = EXPORTS[imported.config.name]
    shutil.copytree(whole.hf, tmp_path / "hf")
    shutil.copytree(whole.gguf["f16"].parent, tmp_path / "gguf")
    files = {kind: tmp_path / "gguf" / path.name for kind, path in whole.gguf.items()}
    monkeypatch.setitem(
        EXPORTS, imported.config.name, msgspec.structs.replace(whole, hf=tmp_path / "hf", gguf=files)
    )
    return EXPORTS[imported.config.name]


def test_a_truncated_gguf_is_a_failed_row_and_the_others_stand(imported, broken_forms):
    path = broken_forms.gguf["f16"]
    path.write_bytes(path.read_bytes()[:-100])
    matrix = matrix_of(imported, chosen=["gguf-f32", "gguf-f16"])
    found = rows_of(matrix)
    assert isinstance(found["gguf-f32"], FormatMeasured)
    assert isinstance(found["gguf-f16"], FormatFailed)
    assert f"{path} is truncated: " in found["gguf-f16"].error
    assert not matrix.within


def test_a_flipped_bit_is_a_failed_row(imported, broken_forms):
    path = broken_forms.gguf["q8_0"]
    proved, data = file_digest(path), bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    (broken_forms.hf / "README.md").write_text("mine")
    found = rows_of(matrix_of(imported, chosen=["gguf-f32", "gguf-q8_0", "transformers"]))
    assert isinstance(found["gguf-f32"], FormatMeasured)
    assert found["gguf-q8_0"] == FormatFailed(
        format="gguf-q8_0", error=f"{path} is {file_digest(path)}, but {proved} was verified"
    )
    assert found["transformers"].error.startswith(f"{broken_forms.hf}/README.md is sha256:")


def test_files_of_another_checkpoint_are_failed_rows(imported, broken_forms):
    other = "sha256:" + 64 * "0"
    for folder, kind in ((broken_forms.hf, HuggingFaceParity), (broken_forms.gguf["f16"].parent, GgufParity)):
        report = layout.parity_report(folder)
        write_json(report, msgspec.structs.replace(read_json(report, kind), checkpoint_digest=other))
    found = rows_of(matrix_of(imported, chosen=["gguf-f16", "transformers"]))
    assert found["gguf-f16"].error == f"{broken_forms.gguf['f16']} was made from {other}"
    assert found["transformers"].error.endswith(f" was made from {other}")


def test_another_model_s_directory_is_beyond_its_tolerance(imported, broken_forms):
    path = broken_forms.hf / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 0.1
    path.write_text(json.dumps(config))
    report = layout.parity_report(broken_forms.hf)
    proof = read_json(report, HuggingFaceParity)
    write_json(report, msgspec.structs.replace(proof, files=proof.files | {path.name: file_digest(path)}))
    found = rows_of(matrix_of(imported, chosen=["transformers"]))
    assert Measure.MAX_ABS_ERR in found["transformers"].outside
