"""Conversion: its checks, its files, and the files of a failed conversion."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from coremill.conversion.convert_coreml import main, run_stage
from coremill.core import layout
from coremill.core.command import INTERRUPTED, exit_on_error
from coremill.core.config import ConvertConfig
from coremill.core.contract import ModelArch, ShapeOk, ShapeSet
from coremill.core.diagnostics import ConversionDiagnostics, ConversionFailure, NoticeKind
from coremill.core.digest import digest, file_digest
from coremill.core.documents import read_json, write_json
from coremill.core.errors import GATES_FAILED
from coremill.coreml.convert import FailedConversionError
from coremill.coreml.graph import load_program, read_interface, trace, write_traced
from coremill.coreml.package import check_package


def arguments(build, *more: str) -> list[str]:
    return [
        *("--graph", str(build.graph)),
        *("--contract", str(build.contract)),
        *("--out", str(build.package)),
        "--toy",
        *more,
    ]


def convert_here(build, *more: str) -> int:
    return exit_on_error(lambda: main(arguments(build, *more)))


def test_the_diagnostics_describe_the_package(pristine):
    folder = pristine.package.parent
    diagnostics = read_json(layout.diagnostics_file(folder), ConversionDiagnostics)
    assert diagnostics.package == "tiny_ball.mlpackage"
    assert diagnostics.package_digest == digest(pristine.package)
    assert (diagnostics.deployment_target, diagnostics.compute_precision) == ("iOS18", "float16")
    assert diagnostics.toolchain == pristine.read_contract().toolchain
    assert diagnostics.counts["compatibility"] == 1
    assert diagnostics.counts["warning"] == diagnostics.counts["error"] == 0
    (notice,) = diagnostics.of_kind(NoticeKind.COMPATIBILITY)
    assert notice.text.startswith(f"Torch version {torch.__version__} has not been tested with coremltools.")
    log = layout.conversion_log(folder).read_text()
    assert notice.text in log
    assert "stderr: Running MIL coremill decoder pipeline: 28/28 passes" in log
    assert sorted(path.name for path in folder.iterdir()) == [
        "conversion.log",
        "diagnostics.json",
        "tiny_ball.mlpackage",
    ]


def test_settings_come_from_the_command_line_over_the_configuration(build):
    assert convert_here(build, "--compute-precision", "float32") == 0
    diagnostics = read_json(layout.diagnostics_file(build.package.parent), ConversionDiagnostics)
    assert (diagnostics.deployment_target, diagnostics.compute_precision) == ("iOS18", "float32")
    weights = build.package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    parameters = 512 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 64
    assert weights.stat().st_size > 4 * parameters


@pytest.mark.parametrize(
    ("break_it", "code", "message"),
    [
        ("graph is text", 41, "TorchScript error: {graph} is not a TorchScript program: File is not a zip file"),
        ("graph is missing", 41, "TorchScript error: cannot read {graph}: No such file or directory"),
        ("contract is text", 11, "document error: {contract} is not JSON: "),
        ("contract is missing", 11, "document error: cannot read {contract}: No such file or directory"),
        ("contract lacks outputs", 11, "document error: {contract}: Object missing required field `outputs`"),
        ("contract of version 2", 12, "format version error: {contract}: schema_version '2.0'"),
        ("contract of another graph", 42, "contract mismatch error: the graph is sha256:"),
        ("contract with another name", 42, "contract mismatch error: the contract's outputs are tokens float32"),
        ("output is a file", 52, "output error: {package} is a file"),
        ("folder is a file", 52, "output error: cannot write to {package}"),
        ("output is not a package", 52, "output error: {package}.zip does not end in .mlpackage"),
    ],
)
def test_invalid_input_has_its_own_exit_code_and_changes_no_file(build, capsys, break_it, code, message):
    more: tuple[str, ...] = ()
    contract = build.read_contract()
    match break_it:
        case "graph is text":
            build.graph.write_text("import torch")
        case "graph is missing":
            build.graph.unlink()
        case "contract is text":
            build.contract.write_text("no JSON")
        case "contract is missing":
            build.contract.unlink()
        case "contract lacks outputs":
            build.contract.write_text(build.contract.read_text().replace('"outputs"', '"states_too"', 1))
            message = "document error: {contract}: unknown key `states_too` at `$`"
        case "contract of version 2":
            build.contract.write_text(build.contract.read_text().replace('"1.0"', '"2.0"', 1))
        case "contract of another graph":
            write_json(build.contract, msgspec.structs.replace(contract, graph_digest="sha256:0"))
        case "contract with another name":
            outputs = (msgspec.structs.replace(contract.outputs[0], name="tokens"), contract.outputs[1])
            write_json(build.contract, msgspec.structs.replace(contract, outputs=outputs))
        case "output is a file":
            more = ("--out", str(build.root / "file.mlpackage"))
            (build.root / "file.mlpackage").write_text("a file")
            message = message.replace("{package}", str(build.root / "file.mlpackage"))
        case "folder is a file":
            more = ("--out", str(build.graph / "x.mlpackage"))
            message = message.replace("{package}", str(build.graph))
        case "output is not a package":
            more = ("--out", f"{build.package}.zip")
    before = digest(build.root)
    assert convert_here(build, *more) == code
    found = capsys.readouterr().err
    names = {"graph": build.graph, "contract": build.contract, "package": build.package}
    assert message.format(**names) in found
    assert digest(build.root) == before
    check_package(build.package)


class Unconvertible(nn.Module):
    """Runs in TorchScript at any length, but has an operation that coremltools does not support."""

    def forward(self, input_ids):
        return (torch.special.bessel_j0(input_ids.float()),)


@pytest.fixture
def unconvertible(build):
    """The build, with its graph replaced by one that coremltools cannot convert."""
    with build.graph.open("wb") as file:
        write_traced(trace(Unconvertible(), [1] * 96, ["logits"]), (), file)
    program = load_program(build.graph)
    interface = read_interface(program, [[0] * 80, [0] * 96])
    contract = msgspec.structs.replace(
        build.read_contract(),
        model_arch=ModelArch(use_halt_head=False, tie_embeddings=True),
        graph_digest=file_digest(build.graph),
        inputs=interface.inputs,
        outputs=interface.outputs,
        shapes=ShapeSet(primary=96, all=(80, 96)),
        shape_validation={"T80": ShapeOk(max_abs_err=0.0), "T96": ShapeOk(max_abs_err=0.0)},
    )
    write_json(build.contract, contract)
    return build


def test_a_failed_conversion_is_an_error_and_keeps_the_old_package(unconvertible, capsys):
    before = digest(unconvertible.package)
    assert convert_here(unconvertible) == 43
    error = capsys.readouterr().err
    assert error.startswith("conversion error: coremltools could not convert the graph: ")
    assert "special_bessel_j0" in error
    assert error.splitlines()[-1] == (
        "  run: python -m coremill.conversion.convert_coreml --allow-placeholder …, which records the failure"
    )
    assert digest(unconvertible.package) == before
    assert not layout.placeholder_file(unconvertible.package.parent).exists()
    assert "special_bessel_j0" in layout.conversion_log(unconvertible.package.parent).read_text()


def test_a_placeholder_is_a_record_of_the_failure(unconvertible, caplog):
    out = unconvertible.root / "fresh" / "tiny_ball.mlpackage"
    assert convert_here(unconvertible, "--out", str(out), "--allow-placeholder") == GATES_FAILED
    assert sorted(path.name for path in out.parent.iterdir()) == ["conversion.log", "conversion_failed.json"]
    record = read_json(layout.placeholder_file(out.parent), ConversionFailure)
    assert record.package == "tiny_ball.mlpackage"
    assert "special_bessel_j0" in record.error
    assert record.graph_digest == file_digest(unconvertible.graph)
    assert record.contract_digest == file_digest(unconvertible.contract)
    assert "special_bessel_j0" in record.traceback_tail[-1]
    assert record.toolchain.packages["coremltools"] == "9.0"
    assert NoticeKind.ERROR in {notice.kind for notice in record.notices}
    assert "no package was written; the failure is recorded in" in caplog.text


def test_a_failed_stage_leaves_the_record_and_the_log(unconvertible):
    context = unconvertible.context("again", "export")
    with pytest.raises(FailedConversionError, match=r"special_bessel_j0"):
        run_stage(context)
    assert sorted(path.name for path in context.out.iterdir()) == ["conversion.log", "conversion_failed.json"]
    record = read_json(layout.placeholder_file(context.out), ConversionFailure)
    assert (record.package, record.graph_digest) == ("tiny_ball.mlpackage", file_digest(unconvertible.graph))
    assert "special_bessel_j0" in layout.conversion_log(context.out).read_text()


def test_an_interrupted_publication_keeps_the_old_package(build, monkeypatch):
    """Ctrl-C just after the old package was renamed."""
    before = digest(build.package)
    rename = Path.rename

    def interrupted(self, target):
        done = rename(self, target)
        if self == build.package:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    assert convert_here(build) == INTERRUPTED
    assert digest(build.package) == before
    check_package(build.package)


def test_a_directory_that_is_not_a_package_is_not_replaced(build, capsys):
    notes = build.package.parent / "notes.mlpackage"
    notes.mkdir()
    (notes / "todo.txt").write_text("kept")
    code = exit_on_error(lambda: main([*arguments(build), "--out", str(notes)]))
    assert (code, capsys.readouterr().err) == (
        52,
        f"output error: {notes} is a directory that is not a package\n"
        "  expected: a package to replace, or a new path\n"
        f"  run: ls -la {notes}\n",
    )
    assert [path.name for path in notes.iterdir()] == ["todo.txt"]


def test_invalid_input_is_an_error_with_allow_placeholder_too(build):
    build.graph.write_text("no graph")
    assert convert_here(build, "--allow-placeholder") == 41
    assert not layout.placeholder_file(build.package.parent).exists()


def test_a_successful_conversion_removes_the_record_of_an_earlier_failure(build, capsys):
    folder = build.package.parent
    layout.placeholder_file(folder).write_text("{}")
    assert convert_here(build) == 0
    assert not layout.placeholder_file(folder).exists()


def test_the_options_offer_every_setting_of_the_configuration(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "{iOS18,macOS15}" in text
    assert "{float16,float32}" in text
    assert "instead of a package, and exit with 3" in " ".join(text.split())
    assert ConvertConfig() == ConvertConfig(deployment_target="iOS18", compute_precision="float16")
