"""Summaries of runs on disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import msgspec
import pytest

from coremill.core.command import exit_on_error
from coremill.core.config import ExportConfig
from coremill.core.digest import digest
from coremill.core.documents import json_schemas, read_json
from coremill.core.errors import DigestError, StageError
from coremill.core.gates import Outcome, Severity
from coremill.core.layout import (
    checkpoint_file,
    contract_file,
    package_dir,
    status_file,
    summary_file,
    verification_report,
)
from coremill.core.reports import LaneFailed, LaneVerified, RunSummary, ShapeError, lane_failed
from coremill.report.summary import main, summarise

CONFIG = Path(__file__).parents[2] / "configs" / "magic-8-ball.toml"


def report(finished, *options: str) -> int:
    arguments = ["--config", str(CONFIG), "--build-dir", str(finished.layout.build), *options]
    return exit_on_error(lambda: main(arguments))


def test_summary_of_a_distilled_run(finished) -> None:
    summary = summarise(finished.layout, finished.config, ["2.9.1"])
    assert [(row.stage, row.lane, row.python, row.torch, row.outcome) for row in summary.stages] == [
        ("dataset", None, "3.13.0", "2.9.1", Outcome.PASSED),
        ("training", None, "3.13.0", "2.9.1", Outcome.PASSED),
        ("hf", None, "3.13.0", "2.9.1", Outcome.PASSED),
        ("gguf", None, "3.13.0", "2.9.1", Outcome.PASSED),
        ("export", "2.9.1", "3.11.7", "2.9.1", Outcome.PASSED),
        ("convert", "2.9.1", "3.11.7", "2.9.1", Outcome.PASSED),
        ("verify", "2.9.1", "3.11.7", "2.9.1", Outcome.PASSED),
    ]
    assert summary.figures == {
        "dataset.rows": 2048,
        "training.parameters": 623_232,
        "training.loss_last": 0.3412,
        "hf.max_abs_err": 7e-6,
        "gguf.f32_max_abs_err": 2e-5,
    }
    (lane,) = summary.lanes
    assert lane.package_size_bytes == 1000
    assert lane.converter_notices == {"harmless": 0, "compatibility": 1, "warning": 0, "error": 0}
    assert lane.toolchain.packages == {"torch": "2.9.1", "coremltools": "9.0", "numpy": "2.3.5"}
    assert (summary.gates_ok, summary.sampled_seed, len(summary.sampled)) == (True, 8, 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", summary.created_at)


def test_summary_of_an_imported_run(finished_import) -> None:
    summary = summarise(finished_import.layout, finished_import.config, ["2.9.1"])
    assert [row.stage for row in summary.stages] == ["texts", "import", "hf", "gguf", "export", "convert", "verify"]
    assert {row.outcome for row in summary.stages} == {Outcome.PASSED}
    assert summary.figures == {
        "texts.characters": 121_442,
        "import.parameters": 134_515_008,
        "hf.max_abs_err": 7e-6,
        "gguf.f32_max_abs_err": 2e-5,
    }
    (lane,) = summary.lanes
    assert (lane.primary, sorted(lane.shapes)) == ("T1024", ["T1024", "T2048", "T4096", "T512"])
    assert (lane.heldout, summary.sampled_seed, len(summary.sampled), summary.gates_ok) == (None, None, 2, True)
    assert (lane.stateful.cache_positions, lane.shapes["T1024"].perplexity.tokens) == (4096, 1023)


def test_peak_memory_is_in_the_row_of_its_stage(finished, capsys) -> None:
    finished.publish("gguf", f32_max_abs_err=2e-5, peak_anonymous_bytes=2_345_600_000)
    summary = summarise(finished.layout, finished.config, ["2.9.1"])
    assert {row.stage: row.peak_anonymous_bytes for row in summary.stages if row.peak_anonymous_bytes} == {
        "gguf": 2_345_600_000
    }
    assert "gguf.peak_anonymous_bytes" not in summary.figures
    assert report(finished) == 0
    assert re.search(r"^gguf .* 1\.5 +2,346 MB +passed", capsys.readouterr().out, re.MULTILINE)


def test_changed_export_configuration_is_rejected(finished_import) -> None:
    run = finished_import
    other = msgspec.structs.replace(run.config, export=ExportConfig(frontend="torch-export"))
    with pytest.raises(StageError, match=r"^stage export was run with another configuration"):
        summarise(run.layout, other, ["2.9.1"])


def test_lanes_share_the_first_stages(finished) -> None:
    summary = summarise(finished.layout, finished.config, ["2.9.1", "2.8.0"])
    shared = ["dataset", "training", "hf", "gguf"]
    assert [row.stage for row in summary.stages] == [*shared, *["export", "convert", "verify"] * 2]
    assert [(lane.lane, lane.gates_ok) for lane in summary.lanes] == [("2.9.1", True), ("2.8.0", False)]
    assert isinstance(summary.lanes[1].shapes["T64"], ShapeError)
    assert not summary.gates_ok
    failed = summary.stages[-1]
    assert (failed.outcome, failed.reason) == (
        Outcome.FAILED,
        "must-gates: SQNR at the primary shape; Held-out answers have the right mood; "
        "Every held-out answer is exact",
    )


def test_command_prints_and_writes(finished, capsys) -> None:
    assert report(finished) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "gates_ok: true"
    folder = finished.layout.stage("report")
    written = read_json(summary_file(folder), RunSummary)
    assert msgspec.structs.replace(written, created_at="") == msgspec.structs.replace(
        summarise(finished.layout, finished.config, ["2.9.1"]), created_at=""
    )
    assert "**gates_ok: true**" in status_file(folder).read_text()
    schema = json.loads(json_schemas([RunSummary])["RunSummary.schema.json"])
    jsonschema.validate(json.loads(summary_file(folder).read_text()), schema)


@pytest.mark.parametrize(
    ("options", "code", "last"),
    [
        (["--torch", "2.9.1"], 0, "gates_ok: true"),
        (["--torch", "2.8.0"], 3, "Secondary shapes validate (failed)"),
        (["--torch", "2.9.1", "--torch", "2.8.0"], 3, "validate (failed)"),
    ],
)
def test_exit_code_depends_on_the_must_gates(finished, capsys, options: list[str], code: int, last: str) -> None:
    assert report(finished, *options) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_failed_should_gate_does_not_block(finished, capsys) -> None:
    summary = summarise(finished.layout, finished.config, ["2.9.1", "2.8.0"])
    good, bad = (lane.gates for lane in summary.lanes)
    should = next(gate for gate in bad if gate.name == "Secondary shapes validate")
    gates = tuple(should if gate.name == should.name else gate for gate in good)
    finished.verify("2.9.1", gates, summary.lanes[0].shapes)
    assert report(finished) == 0
    assert "gates_ok: false; should: Secondary shapes" in capsys.readouterr().out


def test_fallback_is_in_every_report(finished, capsys) -> None:
    assert report(finished, "--torch", "2.9.1", "--fell-back-from", "2.8.0") == 0
    text = "fell back to torch-2.9.1, because the conversion in torch-2.8.0 failed"
    assert text in capsys.readouterr().out
    folder = finished.layout.stage("report")
    assert f"- **Fallback**: {text}" in status_file(folder).read_text()
    assert read_json(summary_file(folder), RunSummary).fell_back_from == "2.8.0"


def test_altered_report_is_rejected(finished, capsys) -> None:
    path = verification_report(finished.layout.stage("verify", "2.9.1"))
    path.write_text(path.read_text().replace('"error"', '"ok"').replace("31.24", "62.8") + " ")
    with pytest.raises(DigestError, match=r"verification_report\.json: found sha256:"):
        summarise(finished.layout, finished.config, ["2.9.1"])
    assert report(finished) == 13
    assert not finished.layout.stage("report").exists()


def test_altered_package_is_rejected(finished, capsys) -> None:
    run = finished
    package = next(run.layout.stage("convert", "2.9.1").glob("*.mlpackage"))
    file = next(path for path in package.rglob("*") if path.is_file()) if package.is_dir() else package
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DigestError, match="nox -s pipeline -- --force convert"):
        summarise(run.layout, run.config, ["2.9.1"])


def test_changed_bound_is_rejected(finished) -> None:
    run = finished
    verify = msgspec.structs.replace(run.config.verify, max_teacher_kl_nats=1e-9)
    with pytest.raises(StageError, match="stage verify was run with another configuration"):
        summarise(run.layout, msgspec.structs.replace(run.config, verify=verify), ["2.9.1"])


def test_directory_without_a_manifest_is_named(finished) -> None:
    folder = finished.layout.stage("verify", "2.9.1")
    (folder / "manifest.json").unlink()
    with pytest.raises(StageError) as failure:
        summarise(finished.layout, finished.config, ["2.9.1"])
    assert failure.value.found == f"{folder} has no manifest.json"
    assert report(finished) == 51


def test_stage_of_another_lane_is_rejected(finished) -> None:
    folder = finished.layout.stage("export", "2.9.1")
    folder.rename(folder.with_name("mislaid"))
    finished.layout.stage("export", "2.8.0").rename(folder)
    with pytest.raises(StageError) as failure:
        summarise(finished.layout, finished.config, ["2.9.1"])
    assert failure.value.found == f"{folder} belongs to run 'magic-8-ball', stage export, lane 2.8.0, succeeded"
    assert failure.value.expected == "run 'magic-8-ball', stage export, lane 2.9.1, succeeded"


def test_missing_report_is_rejected(finished) -> None:
    verification_report(finished.layout.stage("verify", "2.9.1")).unlink()
    finished.publish("verify", "2.9.1")
    with pytest.raises(StageError, match=r"has no verification_report\.json"):
        summarise(finished.layout, finished.config, ["2.9.1"])


def test_unknown_lane_is_a_usage_error(finished) -> None:
    with pytest.raises(SystemExit) as stop:
        report(finished, "--torch", "2.7.0")
    assert stop.value.code == 2


# --- lanes that failed ------------------------------------------------------------------------------

ERROR = "coremltools could not convert the graph: ValueError: no\n  expected: a graph\n  run: again"


def outcomes(summary: RunSummary) -> list[tuple[str, str | None, str]]:
    return [(row.stage, row.lane, row.outcome.value) for row in summary.stages]


def test_lane_whose_conversion_failed_is_summarised(finished) -> None:
    folder = finished.fail("convert", "2.8.0", ERROR, log=True)
    summary = summarise(finished.layout, finished.config, ["2.9.1", "2.8.0"])
    good, lane = summary.lanes
    assert isinstance(good, LaneVerified)
    assert good.gates_ok
    assert isinstance(lane, LaneFailed)
    assert (lane.lane, lane.stage, lane.gates_ok, summary.gates_ok) == ("2.8.0", "convert", False, False)
    assert lane.toolchain is not None
    assert lane.toolchain.packages["torch"] == "2.8.0"
    (gate,) = lane.gates
    reason = f"coremltools could not convert the graph: ValueError: no; see {folder / 'conversion.log'}"
    assert (gate.name, gate.severity, gate.outcome) == (
        "Stage convert completes",
        Severity.MUST,
        Outcome.FAILED,
    )
    assert gate.reason == reason
    assert outcomes(summary)[-3:] == [
        ("export", "2.8.0", "passed"),
        ("convert", "2.8.0", "failed"),
        # Its directory from before the failure is of another package.
        ("verify", "2.8.0", "not_run"),
    ]
    failed, after = summary.stages[-2:]
    assert (failed.reason, failed.python, failed.duration_s) == (reason, "3.11.7", 1.5)
    assert (after.reason, after.python, after.duration_s) == ("stage convert did not complete", None, None)


@pytest.mark.parametrize("lanes", [["2.8.0"], ["2.9.1", "2.8.0"], ["2.8.0", "2.9.1"]])
def test_failed_lane_is_reported_and_blocks(finished, capsys, lanes: list[str]) -> None:
    finished.fail("convert", "2.8.0", ERROR, log=True)
    assert report(finished, *(option for lane in lanes for option in ("--torch", lane))) == 3
    printed = capsys.readouterr().out
    assert "Stage convert completes (failed)" in " ".join(printed.splitlines()[-2:])
    # It wraps at the width of the terminal, even within words.
    assert "conversion.log" in "".join(printed.split())
    folder = finished.layout.stage("report")
    page = status_file(folder).read_text()
    assert "| convert  | torch-2.8.0 | 3.11.7 | 2.8.0 |     1.5 |           – | failed  |" in page
    assert "**gates_ok: false; must: " in page
    written = read_json(summary_file(folder), RunSummary)
    assert [lane.lane for lane in written.lanes] == lanes
    assert len(written.sampled) == (7 if len(lanes) == 2 else 0)
    schema = json.loads(json_schemas([RunSummary])["RunSummary.schema.json"])
    jsonschema.validate(json.loads(summary_file(folder).read_text()), schema)


def test_older_success_does_not_hide_a_failure(finished) -> None:
    finished.fail("verify", "2.9.1", "not enough memory")
    (lane,) = summarise(finished.layout, finished.config, ["2.9.1"]).lanes
    assert [gate.reason for gate in lane.gates] == ["not enough memory"]
    finished.publish("verify", "2.9.1")
    assert summarise(finished.layout, finished.config, ["2.9.1"]).gates_ok


def test_stage_that_was_never_run_fails_its_lane(finished) -> None:
    shutil.rmtree(finished.layout.stage("convert", "2.8.0"))
    shutil.rmtree(finished.layout.stage("verify", "2.8.0"))
    summary = summarise(finished.layout, finished.config, ["2.8.0"])
    assert summary.lanes == (lane_failed("2.8.0", "convert", "the stage was never run", None),)
    assert outcomes(summary)[-2:] == [("convert", "2.8.0", "not_run"), ("verify", "2.8.0", "not_run")]
    assert report(finished, "--torch", "2.8.0") == 3


def test_failed_training_fails_every_lane(finished) -> None:
    finished.fail("training", None, "the loss is nan at step 40")
    summary = summarise(finished.layout, finished.config, ["2.9.1", "2.8.0"])
    assert [gate.name for lane in summary.lanes for gate in lane.gates] == ["Stage training completes"] * 2
    assert outcomes(summary)[:3] == [
        ("dataset", None, "passed"),
        ("training", None, "failed"),
        ("hf", None, "not_run"),
    ]
    assert summary.figures == {"dataset.rows": 2048}
    assert (summary.sampled_seed, summary.sampled) == (None, ())
    assert report(finished, "--torch", "2.9.1", "--torch", "2.8.0") == 3


def test_failed_format_fails_the_run_and_no_lane(finished, capsys) -> None:
    finished.fail("gguf", None, "q8_0 differs from the checkpoint by 0.2 nats")
    summary = summarise(finished.layout, finished.config, ["2.9.1"])
    (lane,) = summary.lanes
    assert (lane.gates_ok, summary.gates_ok) == (True, False)
    assert {row.stage: row.outcome for row in summary.stages if row.outcome is not Outcome.PASSED} == {
        "gguf": Outcome.FAILED
    }
    assert report(finished, "--torch", "2.9.1") == 3
    printed = capsys.readouterr().out
    assert "q8_0 differs from the checkpoint by 0.2 nats" in printed
    assert printed.splitlines()[-1] == "gates_ok: false; stages: gguf (failed)"


def test_format_that_is_switched_off_is_not_missing(finished, capsys, tmp_path) -> None:
    shutil.rmtree(finished.layout.stage("gguf"))
    config = tmp_path / "off.toml"
    config.write_text(
        CONFIG.read_text().replace('type = "magic-8-ball"\n', 'type = "magic-8-ball"\nformats = ["hf"]\n')
    )
    arguments = ["--config", str(config), "--build-dir", str(finished.layout.build)]
    assert exit_on_error(lambda: main(arguments)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^gguf +–.* switched off", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == "gates_ok: true"
    folder = finished.layout.stage("report")
    assert read_json(summary_file(folder), RunSummary).switched_off == ("gguf",)
    assert re.search(r"^\| gguf .* \| switched off \|$", status_file(folder).read_text(), re.MULTILINE)


def test_report_without_a_build_is_an_error(finished, capsys) -> None:
    shutil.rmtree(finished.layout.root)
    assert report(finished) == 51
    assert capsys.readouterr().err == (
        f"stage error: {finished.layout.root} contains no stage that was run\n"
        "  expected: a build\n"
        "  run: nox -s pipeline -- --config configs/magic-8-ball.toml --torch 2.9.1\n"
    )
    assert not finished.layout.root.exists()


def test_failed_manifest_in_the_directory_of_a_success_is_rejected(finished) -> None:
    shutil.rmtree(finished.layout.stage("export", "2.9.1"))
    finished.fail("export", "2.9.1", "no").rename(finished.layout.stage("export", "2.9.1"))
    with pytest.raises(StageError, match=r"stage export, lane 2\.9\.1, failed"):
        summarise(finished.layout, finished.config, ["2.9.1"])


# --- artifacts newer than their reports -------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "artifact"),
    [("package_digest", "magic_8_ball.mlpackage"), ("contract_digest", "magic_8_ball_contract.json")],
)
def test_verification_of_other_artifacts_is_rejected(finished, capsys, field: str, artifact: str) -> None:
    lane = summarise(finished.layout, finished.config, ["2.9.1"]).lanes[0]
    folder = finished.verify("2.9.1", lane.gates, lane.shapes, **{field: "sha256:beef"})
    paths = {
        "package_digest": package_dir(finished.layout.stage("convert", "2.9.1"), "magic-8-ball"),
        "contract_digest": contract_file(finished.layout.stage("export", "2.9.1"), "magic-8-ball"),
    }
    assert report(finished) == 51
    assert capsys.readouterr().err == (
        f"stage error: {folder}/verification_report.json is about {artifact} sha256:beef\n"
        f"  expected: {digest(paths[field])}, as in the manifest next to {paths[field]}\n"
        "  run: nox -s pipeline -- --config configs/magic-8-ball.toml --torch 2.9.1 --force verify\n"
    )
    assert not finished.layout.stage("report").exists()


def test_package_converted_after_its_verification_is_rejected(finished, capsys) -> None:
    package = package_dir(finished.layout.stage("convert", "2.9.1"), "magic-8-ball")
    before = digest(package)
    (package / "Manifest.json").write_text("{}")
    finished.publish("convert", "2.9.1")
    assert report(finished) == 51
    assert capsys.readouterr().err == (
        f"stage error: {finished.layout.stage('verify', '2.9.1')} was made from "
        f"convert/magic_8_ball.mlpackage {before}\n"
        f"  expected: {digest(package)}, the current one of stage convert\n"
        "  run: nox -s pipeline -- --config configs/magic-8-ball.toml --torch 2.9.1\n"
    )


def test_checkpoint_newer_than_the_exports_is_rejected(finished) -> None:
    checkpoint_file(finished.layout.stage("training"), "magic-8-ball").write_text("other weights")
    finished.publish("training")
    for lane in ("2.9.1", "2.8.0"):
        with pytest.raises(StageError, match=r"export was made from training/magic_8_ball\.ckpt sha256:"):
            summarise(finished.layout, finished.config, [lane])


def test_removed_input_is_rejected(finished) -> None:
    contract_file(finished.layout.stage("export", "2.9.1"), "magic-8-ball").unlink()
    finished.publish("export", "2.9.1")
    with pytest.raises(StageError) as failure:
        summarise(finished.layout, finished.config, ["2.9.1"])
    assert failure.value.expected == "no such output, the current one of stage export"
