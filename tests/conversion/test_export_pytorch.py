"""Export: the contract describes the saved program, and invalid input is an error."""

from __future__ import annotations

import dataclasses
import re

import msgspec
import numpy as np
import pytest
import torch
from tests.sharp import sharpened

from coremill.conversion.export_pytorch import main, parse_shapes
from coremill.core.command import exit_on_error
from coremill.core.config import ExportConfig
from coremill.core.contract import ShapeFailed, ShapeOk, ShapeSet, ShapeValidation, read_contract
from coremill.core.digest import file_digest
from coremill.core.errors import ConfigError, ExportError
from coremill.coreml import export
from coremill.coreml.decoder import Main
from coremill.coreml.export import MAX_RELATIVE_ERR, validate
from coremill.coreml.graph import as_input, load_program, run_program
from coremill.infra.compatibility import Versions
from coremill.model.checkpoint import build_student, load_checkpoint, save_checkpoint
from coremill.model.float32 import Float32Bounds
from coremill.model.reference import Reference
from coremill.text.student_tokenizer import Tokenizer


def arguments(build, *more: str) -> list[str]:
    return ["--checkpoint", str(build.checkpoint), "--out", str(build.root / "new"), "--toy", *more]


def export_here(build, *more: str) -> int:
    argv = arguments(build, "--tokenizer", str(build.tokenizer), "--shapes", "80,96,128", "--primary", "96", *more)
    return exit_on_error(lambda: main(argv))


def test_the_command_writes_the_same_contract_as_the_stage(build):
    assert export_here(build) == 0
    new = build.root / "new"
    assert sorted(path.name for path in new.iterdir()) == ["tiny_ball.pt", "tiny_ball_contract.json"]
    contract = read_contract(new / "tiny_ball_contract.json")
    old = build.read_contract()
    # torch counts class names per process, so only first traces in different processes have the same digest.
    assert msgspec.structs.replace(contract, graph_digest=old.graph_digest) == old


def test_the_contract_describes_the_saved_program(pristine):
    contract = pristine.read_contract()
    assert contract.graph == pristine.graph.name
    assert contract.graph_digest == file_digest(pristine.graph)
    assert contract.checkpoint_digest == file_digest(pristine.checkpoint)
    assert contract.model_type == "magic-8-ball"
    assert contract.tokenizer.digest == file_digest(pristine.tokenizer)
    assert contract.model_arch.use_halt_head
    assert contract.shapes == ShapeSet(primary=96, all=(80, 96, 128))
    assert contract.states == ()
    assert sorted(contract.toolchain.packages) == ["coremltools", "numpy", "tokenizers", "torch"]
    for result in contract.shape_validation.values():
        assert isinstance(result, ShapeOk)
        assert 0 < result.max_abs_err <= MAX_RELATIVE_ERR * 100  # all its logits are within ±100


def test_the_program_matches_the_checkpoint_at_other_lengths_than_the_traced_one(pristine):
    student = build_student(load_checkpoint(pristine.checkpoint))
    program = load_program(pristine.graph)
    prompts = pristine.read_prompts()
    for seq_len in (1, 2, 63, 80, 96, 127, 128):
        (ids,) = prompts.packed(seq_len, 1)
        with torch.no_grad():
            expected = student(as_input(ids))
        for found, wanted in zip(run_program(program, ids), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_secondary_shape_that_fails_is_recorded_and_does_not_stop_the_export(build, caplog):
    # 129 is one more than the model's rotary table covers.
    assert export_here(build, "--shapes", "96,129") == 0
    contract = read_contract(build.root / "new" / "tiny_ball_contract.json")
    assert contract.shape_validation == {
        "T96": build.read_contract().shape_validation["T96"],
        "T129": ShapeFailed(error="beyond the model's context of 128 tokens"),
    }
    assert "T129 failed, which does not stop the export: beyond the model's context" in caplog.text
    assert [spec.shape for spec in contract.outputs] == [(1, 96, 512), (1, 96, 2)]


def test_a_primary_shape_beyond_the_context_is_an_error(build, capsys):
    assert export_here(build, "--shapes", "96,129", "--primary", "129") == ExportError.exit_code
    assert capsys.readouterr().err == (
        "export error: the primary shape T129 is beyond the model's context of 128 tokens\n"
        "  expected: at most 128\n"
        "  run: edit [shapes] and [export] in the run's configuration, or choose other --shapes\n"
    )
    assert not (build.root / "new").exists()


class Specialised(Main):
    """A graph that contains the length at which it was traced, because of a careless reshape."""

    def forward(self, input_ids):
        logits, halt_logits = super().forward(input_ids)
        return logits.reshape(1, int(input_ids.shape[1]), -1), halt_logits


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python integer")
def test_a_graph_specialised_to_the_length_of_its_capture_is_an_error(build, monkeypatch, capsys):
    monkeypatch.setattr(export, "Main", Specialised)
    assert export_here(build) == ExportError.exit_code
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "export error: the primary shape T96 failed: the program returns [1, 16, 3072], the model [1, 96, 512]",
        "  expected: the model's outputs, within 1e-05 of their largest magnitude",
        "  run: python -m coremill.training.check_checkpoint --help",
    ]
    assert not list((build.root / "new").iterdir())


def test_a_program_that_differs_from_the_model_fails_validation(pristine):
    ckpt = load_checkpoint(pristine.checkpoint)
    program = load_program(pristine.graph)
    sequences = pristine.read_prompts().packed(80, 2)

    def validated(**changed: torch.Tensor) -> ShapeValidation:
        reference = Reference(ckpt.config, {**ckpt.state_dict, **changed})
        return validate(program, reference.score_all(sequences), sequences, Float32Bounds(reference, sequences))

    assert isinstance(validated(), ShapeOk)
    norm = ckpt.state_dict["norm.weight"]
    result = validated(**{"norm.weight": norm * 1.01})
    assert isinstance(result, ShapeFailed)
    assert result.error.startswith("differs from the model by ")
    broken = validated(**{"norm.weight": norm * float("nan")})
    assert broken == ShapeFailed(error="differs from the model by nan, more than nan")


def test_a_model_that_float32_computes_less_exactly_is_exported(pristine, tmp_path):
    """The program differs by more than 1e-5 of the largest logit; a wrong weight still fails."""
    ckpt = sharpened(load_checkpoint(pristine.checkpoint), 60)
    with (tmp_path / "sharp.pt").open("wb") as file:
        export.capture(ckpt, ShapeSet(primary=80, all=(80,)), ExportConfig(), file)
    program = load_program(tmp_path / "sharp.pt")
    sequences = pristine.read_prompts().packed(80, 2)

    def validated(**changed: torch.Tensor) -> ShapeValidation:
        reference = Reference(ckpt.config, {**ckpt.state_dict, **changed})
        bounds = Float32Bounds(reference, sequences, angles=torch.float64)
        return validate(program, reference.score_all(sequences), sequences, bounds)

    result = validated()
    assert isinstance(result, ShapeOk)
    largest = max(np.abs(Reference.of(ckpt).logits(ids)).max() for ids in sequences)
    assert result.max_abs_err > MAX_RELATIVE_ERR * largest
    failed = validated(**{"norm.weight": ckpt.state_dict["norm.weight"] * 1.01})
    assert isinstance(failed, ShapeFailed)
    assert re.fullmatch(r"differs from the model by [\d.e-]+, more than [\d.e-]+", failed.error)


@pytest.mark.parametrize(
    ("break_it", "code", "message"),
    [
        ("truncated checkpoint", 22, "unreadable checkpoint error: "),
        ("other tokenizer", 25, "vocabulary mismatch error: the tokenizer is sha256:"),
        ("no tokenizer", 21, "tokenizer error: cannot read "),
        ("no held-out set", 20, "dataset error: "),
        ("production checkpoint", 31, "toy refused error: --toy with a checkpoint of model type 'production'"),
        ("output directory is a file", 52, "output error: cannot write "),
        ("old python", 30, "version gate error: export and conversion do not support Python 3.12.1 ("),
    ],
)
def test_invalid_input_has_its_own_exit_code_and_changes_no_file(
    build, capsys, monkeypatch, break_it, code, message
):
    before = {path: path.read_bytes() for path in (build.graph, build.contract)}
    match break_it:
        case "truncated checkpoint":
            build.checkpoint.write_bytes(build.checkpoint.read_bytes()[:5000])
        case "other tokenizer":
            texts = [row.prompt for row in build.read_rows()] * 3 + [chr(33 + i) * 40 for i in range(90)]
            Tokenizer.train([*texts, *build.dataset.joinpath("train.jsonl").read_text().split()], 512).save(
                build.tokenizer
            )
        case "no tokenizer":
            build.tokenizer.unlink()
        case "no held-out set":
            build.heldout.unlink()
        case "production checkpoint":
            ckpt = load_checkpoint(build.checkpoint)
            save_checkpoint(build.checkpoint, dataclasses.replace(ckpt, model_type="production"))
        case "output directory is a file":
            (build.root / "new").write_text("a file")
        case "old python":
            versions = Versions(python="3.12.1", torch="2.9.1", coremltools="9.0", numpy="2.3.5")
            monkeypatch.setattr("coremill.infra.version_gate.running_versions", lambda: versions)
    assert export_here(build) == code
    assert capsys.readouterr().err.startswith(message)
    assert {path: path.read_bytes() for path in before} == before
    assert not (build.root / "new").is_dir()


@pytest.mark.parametrize(
    ("text", "primary", "expected"),
    [
        ("64,128,256", 128, ShapeSet(primary=128, all=(64, 128, 256))),
        ("512", None, ShapeSet(primary=512, all=(512,))),
    ],
)
def test_shapes_are_parsed(text, primary, expected):
    assert parse_shapes(text, primary) == expected


@pytest.mark.parametrize(("text", "primary"), [("64,x", 64), ("64,64", 64), ("64,128", 256), ("", 1)])
def test_invalid_shapes_are_an_error(text, primary):
    with pytest.raises(ConfigError, match=f"^--shapes {text} --primary {primary}: ") as caught:
        parse_shapes(text, primary)
    assert caught.value.expected == "lengths such as 64,128,256, and --primary one of them"


def test_several_shapes_need_a_primary_one():
    with pytest.raises(ConfigError, match=r"^--shapes 64,128 without --primary"):
        parse_shapes("64,128", None)
