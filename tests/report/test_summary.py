"""Summaries of runs as the stages leave them on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import msgspec
import pytest

from coremill.core.command import exit_on_error
from coremill.core.documents import json_schemas, read_json
from coremill.core.errors import DigestError, StageError
from coremill.core.gates import Outcome
from coremill.core.layout import status_file, summary_file, verification_report
from coremill.core.reports import RunSummary, ShapeError
from coremill.report.summary import main, summarise


def test_a_summary_is_of_what_the_stages_left(finished) -> None:
    summary = summarise(finished.layout, finished.config, ["2.9.1"])
    assert [(row.stage, row.lane, row.python, row.torch, row.outcome) for row in summary.stages] == [
        ("dataset", None, "3.13.0", "2.9.1", Outcome.PASSED),
        ("training", None, "3.13.0", "2.9.1", Outcome.PASSED),
        ("export", "2.9.1", "3.11.7", "2.9.1", Outcome.PASSED),
        ("convert", "2.9.1", "3.11.7", "2.9.1", Outcome.PASSED),
        ("verify", "2.9.1", "3.11.7", "2.9.1", Outcome.PASSED),
    ]
    assert summary.figures == {
        "dataset.rows": 2048,
        "training.parameters": 623_232,
        "training.loss_last": 0.3412,
    }
    (lane,) = summary.lanes
    assert lane.package_size_bytes == 1000
    assert lane.converter_notices == {"harmless": 0, "compatibility": 1, "warning": 0, "error": 0}
    assert lane.toolchain.packages == {"torch": "2.9.1", "coremltools": "9.0", "numpy": "2.3.5"}
    assert (summary.gates_ok, summary.sampled_seed, len(summary.sampled)) == (True, 8, 7)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", summary.created_at)


def test_lanes_share_what_ran_once(finished) -> None:
    summary = summarise(finished.layout, finished.config, ["2.9.1", "2.8.0"])
    assert [row.stage for row in summary.stages] == ["dataset", "training", *["export", "convert", "verify"] * 2]
    assert [(lane.lane, lane.gates_ok) for lane in summary.lanes] == [("2.9.1", True), ("2.8.0", False)]
    assert isinstance(summary.lanes[1].shapes["T64"], ShapeError)
    assert not summary.gates_ok
    failed = summary.stages[-1]
    assert (failed.outcome, failed.reason) == (
        Outcome.FAILED,
        "must-gates: SQNR at the primary shape; Held-out answers have the right mood; "
        "Every held-out answer is exact",
    )


CONFIG = Path(__file__).parents[2] / "configs" / "magic-8-ball.toml"


def report(finished, *options: str) -> int:
    arguments = ["--config", str(CONFIG), "--build-dir", str(finished.layout.build), *options]
    return exit_on_error(lambda: main(arguments))


def test_the_command_prints_and_writes(finished, capsys) -> None:
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
def test_the_exit_code_follows_the_must_gates(finished, capsys, options: list[str], code: int, last: str) -> None:
    assert report(finished, *options) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_should_gate_alone_does_not_block(finished, capsys) -> None:
    summary = summarise(finished.layout, finished.config, ["2.9.1", "2.8.0"])
    good, bad = (lane.gates for lane in summary.lanes)
    should = next(gate for gate in bad if gate.name == "Secondary shapes validate")
    gates = tuple(should if gate.name == should.name else gate for gate in good)
    finished.verify("2.9.1", gates, summary.lanes[0].shapes)
    assert report(finished) == 0
    assert "gates_ok: false; should: Secondary shapes" in capsys.readouterr().out


def test_a_fallback_is_in_every_report(finished, capsys) -> None:
    assert report(finished, "--torch", "2.9.1", "--fell-back-from", "2.8.0") == 0
    text = "fell back: the conversion in torch-2.8.0 failed; this is torch-2.9.1"
    assert text in capsys.readouterr().out
    folder = finished.layout.stage("report")
    assert f"- **Fallback**: {text}" in status_file(folder).read_text()
    assert read_json(summary_file(folder), RunSummary).fell_back_from == "2.8.0"


def test_a_failed_conversion_has_no_package_and_says_so(finished) -> None:
    folder = finished.layout.stage("convert", "2.8.0")
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    finished.convert_fails("2.8.0")
    summary = summarise(finished.layout, finished.config, ["2.8.0"])
    assert summary.lanes[0].package_size_bytes is None
    row = next(row for row in summary.stages if row.stage == "convert")
    assert (row.outcome, row.reason) == (
        Outcome.FAILED,
        "the conversion failed; conversion_failed.json says how",
    )


def test_an_altered_report_is_refused(finished, capsys) -> None:
    path = verification_report(finished.layout.stage("verify", "2.9.1"))
    path.write_text(path.read_text().replace('"error"', '"ok"').replace("31.24", "62.8") + " ")
    with pytest.raises(DigestError, match=r"verification_report\.json: found sha256:"):
        summarise(finished.layout, finished.config, ["2.9.1"])
    assert report(finished) == 13
    assert not finished.layout.stage("report").exists()


def test_an_unfinished_stage_is_named(finished) -> None:
    folder = finished.layout.stage("verify", "2.9.1")
    (folder / "manifest.json").unlink()
    with pytest.raises(StageError) as failure:
        summarise(finished.layout, finished.config, ["2.9.1"])
    assert str(failure.value) == (
        f"{folder} has no manifest.json\n  expected: a finished stage\n  run: nox -s pipeline"
    )
    assert report(finished) == 51


def test_a_stage_of_another_lane_is_refused(finished) -> None:
    folder = finished.layout.stage("export", "2.9.1")
    folder.rename(folder.with_name("mislaid"))
    finished.layout.stage("export", "2.8.0").rename(folder)
    with pytest.raises(StageError) as failure:
        summarise(finished.layout, finished.config, ["2.9.1"])
    assert failure.value.found == f"{folder} is of run 'magic-8-ball', lane 2.8.0"
    assert failure.value.expected == "run 'magic-8-ball', lane 2.9.1"


def test_a_report_that_its_stage_did_not_write_is_refused(finished) -> None:
    verification_report(finished.layout.stage("verify", "2.9.1")).unlink()
    finished.publish("verify", "2.9.1")
    with pytest.raises(StageError, match=r"has no verification_report\.json"):
        summarise(finished.layout, finished.config, ["2.9.1"])


def test_an_unknown_lane_is_a_matter_of_usage(finished) -> None:
    with pytest.raises(SystemExit) as stop:
        report(finished, "--torch", "2.7.0")
    assert stop.value.code == 2
