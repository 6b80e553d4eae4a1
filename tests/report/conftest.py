"""Runs as the stages leave them: one that is all right, one that is not, and one of two lanes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from coremill.core.config import RunConfig, read_config
from coremill.core.contract import Toolchain
from coremill.core.diagnostics import (
    ConversionDiagnostics,
    ConversionFailure,
    Notice,
    NoticeKind,
    count_notices,
)
from coremill.core.documents import write_json
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
from coremill.core.layout import (
    MANIFEST,
    RunLayout,
    diagnostics_file,
    package_dir,
    placeholder_file,
    verification_report,
)
from coremill.core.manifest import Fingerprint, StageManifest, measure_outputs
from coremill.core.reports import (
    Answer,
    Backend,
    HeldoutAnswers,
    LaneSummary,
    RunSummary,
    ShapeError,
    ShapeMeasured,
    ShapeReport,
    StageSummary,
    VerificationReport,
)

BLOCKING = (
    "SQNR at the primary shape",
    "Held-out answers have the right mood",
    "Every held-out answer is exact",
)
"""The must-gates that the bad run does not pass."""
GOLDEN = Path(__file__).parent / "golden"
CONFIG = Path(__file__).parents[2] / "configs" / "magic-8-ball.toml"
MUST, SHOULD, NICE = Severity.MUST, Severity.SHOULD, Severity.NICE

ANSWERS = (
    ("I feel lucky: will my garden bloom by spring?", "It is decidedly so.", "hopeful", True),
    ("I fear the worst: will the old bridge hold tonight?", "My sources say no.", "doubtful", True),
    ("Who can say: will the train to Graz be late?", "Ask again later.", "unclear", True),
    ("Against all odds, will [my team] win the cup?", "Outlook not so good.", "doubtful", True),
    (
        "Last one: what is the date of the full moon this autumn? Look twice.",
        '<|tool_call|>{"name": "moon", "args": {"phase": "full", "season": "autumn"}}',
        None,
        True,
    ),
    ("With joy I ask: will the letter come?", "Reply hazy, try again.", "hopeful", False),
    (
        "It looks bleak: will the harvest last the winter, for all of us and for the cattle?",
        "My reply is no.",
        "doubtful",
        True,
    ),
)


def toolchain(python: str = "3.11.7", **packages: str) -> Toolchain:
    return Toolchain(python=python, platform="Linux-6.1-x86_64-with-glibc2.36", packages=packages)


def answers() -> tuple[Answer, ...]:
    return tuple(Answer(prompt=p, answer=a, mood=m, right=r) for p, a, m, r in ANSWERS)


def heldout() -> HeldoutAnswers:
    return HeldoutAnswers(
        asked=64,
        exact=64,
        right_mood=53,
        with_mood=54,
        right_tool_call=10,
        with_tool_call=10,
        out_of_vocabulary=0,
        teacher_kl_nats=0.00412,
        teacher_entropy_nats=0.3127,
        cross_entropy_nats=0.3168,
    )


def good_shapes() -> dict[str, ShapeReport]:
    figures = {"T64": (1.1e-3, 63.4, 812, 3), "T128": (1.4e-3, 62.8, 1604, 5), "T256": (1.9e-3, 62.1, 1604, 5)}
    return {
        name: ShapeMeasured(
            backend=Backend.MIL_REFERENCE,
            max_abs_err=error,
            sqnr_db=sqnr,
            kl_nats=2.3e-7,
            top1_agreement=1.0,
            positions=positions,
            excluded=excluded,
        )
        for name, (error, sqnr, positions, excluded) in figures.items()
    }


def good_gates() -> tuple[Gate, ...]:
    """As verification gives them, under its names."""
    return (
        passed(
            "Python 3.11 available for export and conversion",
            MUST,
            measured="export 3.11.7, conversion 3.11.7",
            threshold="3.10 or 3.11",
        ),
        passed("Checkpoint loads and validates", MUST, measured=f"sha256:{'9f2c1d7e' * 8}"),
        passed("Primary shape validation succeeds", MUST, measured="T128 ok"),
        passed("Core ML conversion completes", MUST, measured=0, threshold=0),
        passed("The Core ML model loads", MUST, measured="312 operations lowered by coremill.mil"),
        passed("Inputs, outputs and shapes are the contract's", MUST),
        at_most("No position sees a later token", MUST, 0.0, 0.0),
        at_least("SQNR at the primary shape", MUST, 62.84, 40.0, " dB"),
        at_most("KL divergence at the primary shape", MUST, 2.3e-7, 1e-3, " nats"),
        at_least("Held-out answers have the right mood", MUST, 53 / 54, 0.95),
        passed("All shape enumerations succeed", SHOULD, measured="3 of 3"),
        Gate(
            name="No compatibility warnings",
            severity=SHOULD,
            outcome=Outcome.PASSED,
            measured=1,
            threshold=0,
            reason="answered by the measured pass of cell torch-2.9.1 (python ==3.11.*, torch ==2.9.1, "
            "coremltools ==9.0, numpy ==2.3.5)",
        ),
        passed("Secondary shapes validate", SHOULD, measured="2 of 2"),
        not_run("Core ML loads and predicts", SHOULD, "Core ML runs on macOS only", PlatformReason.NEEDS_MACOS),
        failed(
            "Zero warnings in conversion logs",
            NICE,
            "the converter said: torch 2.9.1 has not been tested with coremltools",
            measured=1,
            threshold=0,
        ),
    )


def bad_gates() -> tuple[Gate, ...]:
    """A package of one fixed shape, without enough precision, and with nobody to ask it anything."""
    gates = {gate.name: gate for gate in good_gates()}
    error = "shape (1, 64) is not among the shapes that `input_ids` admits, which are [(1, 128)]"
    nobody = "no dataset with held-out questions was given"
    for gate in (
        at_least("SQNR at the primary shape", MUST, 31.24, 40.0, " dB"),
        not_run("Held-out answers have the right mood", MUST, nobody),
        not_run("Every held-out answer is exact", MUST, nobody),
        failed(
            "Secondary shapes validate",
            SHOULD,
            f"T64: {error}; T256: {error.replace('64', '256')}",
            measured="0 of 2",
        ),
    ):
        gates[gate.name] = gate
    return tuple(gates.values())


def bad_shapes() -> dict[str, ShapeReport]:
    error = "RuntimeError: shape (1, 64) is not among the shapes that `input_ids` admits, which are [(1, 128)]"
    return {
        "T64": ShapeError(backend=Backend.MIL_REFERENCE, error=error),
        "T128": good_shapes()["T128"],
        "T256": ShapeError(backend=Backend.MIL_REFERENCE, error=error.replace("64", "256")),
    }


def lane_summary(lane: str, gates: tuple[Gate, ...], shapes: dict[str, ShapeReport]) -> LaneSummary:
    return LaneSummary(
        lane=lane,
        toolchain=toolchain(torch=lane, coremltools="9.0", numpy="2.3.5"),
        primary="T128",
        gates_ok=gates_ok(gates),
        gates=gates,
        shapes=shapes,
        heldout=heldout(),
        package_size_bytes=1_392_511,
        convert_duration_s=9.471,
        converter_notices={"harmless": 8, "compatibility": 1, "warning": 0, "error": 0},
    )


def stage_summary(stage: str, lane: str | None, duration_s: float, reason: str | None = None) -> StageSummary:
    return StageSummary(
        stage=stage,
        lane=lane,
        python="3.13.0" if lane is None else "3.11.7",
        torch=lane or ("2.9.1" if stage == "training" else None),
        duration_s=duration_s,
        started_at="2026-05-04T09:12:33+00:00",
        outcome=Outcome.PASSED if reason is None else Outcome.FAILED,
        reason=reason,
    )


def run_summary(lanes: Sequence[LaneSummary], verify_reason: str | None = None) -> RunSummary:
    stages = [stage_summary("dataset", None, 0.614), stage_summary("training", None, 17.96)]
    for lane in lanes:
        stages += [
            stage_summary("export", lane.lane, 5.12),
            stage_summary("convert", lane.lane, 9.471),
            stage_summary("verify", lane.lane, 11.03, None if lane.gates_ok else verify_reason),
        ]
    return RunSummary(
        run="magic-8-ball",
        model_type="magic-8-ball",
        created_at="2026-05-04T09:13:20+00:00",
        stages=tuple(stages),
        lanes=tuple(lanes),
        figures={
            "dataset.rows": 2048,
            "dataset.train": "sha256:9f2c1d7e00aa",
            "training.parameters": 623_232,
            "training.loss_last": 0.3412,
        },
        sampled_seed=8,
        sampled=answers(),
        gates_ok=all(lane.gates_ok for lane in lanes),
    )


@pytest.fixture
def good() -> RunSummary:
    return run_summary([lane_summary("2.9.1", good_gates(), good_shapes())])


@pytest.fixture
def bad() -> RunSummary:
    reason = f"must-gates: {'; '.join(BLOCKING)}"
    return run_summary([lane_summary("2.9.1", bad_gates(), bad_shapes())], reason)


@pytest.fixture
def matrix() -> RunSummary:
    reason = f"must-gates: {'; '.join(BLOCKING)}"
    lanes = [
        lane_summary("2.9.1", good_gates(), good_shapes()),
        lane_summary("2.8.0", bad_gates(), bad_shapes()),
    ]
    return run_summary(lanes, reason)


@pytest.fixture
def config() -> RunConfig:
    return read_config(CONFIG)


@pytest.fixture
def summaries(good: RunSummary, bad: RunSummary, matrix: RunSummary) -> dict[str, RunSummary]:
    return {"good": good, "bad": bad, "matrix": matrix}


class FinishedRun:
    """A run on disk as the pipeline publishes it; `publish` makes one stage's folder."""

    def __init__(self, build: Path, config: RunConfig) -> None:
        self.config = config
        self.layout = RunLayout(build=build, run=config.name)

    def publish(self, stage: str, lane: str | None = None, **figures: float | int | str) -> Path:
        """Write the manifest over what lies in the stage's folder."""
        folder = self.layout.stage(stage, lane)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        packages = {"torch": lane, "coremltools": "9.0", "numpy": "2.3.5"} if lane else {"torch": "2.9.1"}
        manifest = StageManifest(
            stage=stage,
            run=self.config.name,
            lane=lane,
            fingerprint=Fingerprint(definition="", config="", sources="", lock="", interpreter="", inputs={}),
            config={},
            toolchain=toolchain("3.13.0" if lane is None else "3.11.7", **packages),
            outputs=measure_outputs(folder),
            figures=figures,
            started_at="2026-05-04T09:12:33+00:00",
            duration_s=1.5,
        )
        write_json(folder / MANIFEST, manifest)
        return folder

    def convert(self, lane: str) -> Path:
        folder = self.layout.stage("convert", lane)
        package = package_dir(folder, self.config.name)
        package.mkdir(parents=True)
        (package / "Manifest.json").write_text("{}" * 500)
        notices = (
            Notice(kind=NoticeKind.COMPATIBILITY, source="coremltools", text="torch has not been tested", count=1),
        )
        diagnostics = ConversionDiagnostics(
            package=package.name,
            package_digest="sha256:0",
            toolchain=toolchain(torch=lane, coremltools="9.0", numpy="2.3.5"),
            deployment_target="iOS18",
            compute_precision="float16",
            notices=notices,
            counts=count_notices(notices),
        )
        write_json(diagnostics_file(folder), diagnostics)
        return self.publish("convert", lane)

    def convert_fails(self, lane: str) -> Path:
        folder = self.layout.stage("convert", lane)
        folder.mkdir(parents=True)
        failure = ConversionFailure(
            package="magic_8_ball.mlpackage",
            graph_digest="sha256:0",
            contract_digest="sha256:0",
            error="ValueError: no",
            traceback_tail=("ValueError: no",),
            toolchain=toolchain(torch=lane, coremltools="9.0", numpy="2.3.5"),
            notices=(),
        )
        write_json(placeholder_file(folder), failure)
        return self.publish("convert", lane)

    def verify(self, lane: str, gates: tuple[Gate, ...], shapes: dict[str, ShapeReport]) -> Path:
        folder = self.layout.stage("verify", lane)
        report = VerificationReport(
            run=self.config.name,
            lane=lane,
            model_type=self.config.model_type,
            package_digest="sha256:0",
            contract_digest="sha256:0",
            primary="T128",
            shapes=shapes,
            heldout=heldout(),
            sampled_seed=8,
            sampled=answers(),
            gates=gates,
            gates_ok=gates_ok(gates),
        )
        write_json(verification_report(folder), report)
        return self.publish("verify", lane)


@pytest.fixture
def finished(tmp_path: Path, config: RunConfig) -> FinishedRun:
    """Both lanes, all right in the first, not in the second."""
    run = FinishedRun(tmp_path / "build", config)
    run.publish("dataset", rows=2048)
    run.publish("training", parameters=623_232, loss_last=0.3412)
    for lane, gates, shapes in (
        ("2.9.1", good_gates(), good_shapes()),
        ("2.8.0", bad_gates(), bad_shapes()),
    ):
        run.publish("export", lane)
        run.convert(lane)
        run.verify(lane, gates, shapes)
    return run


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with the file of that name; `REMAKE_GOLDEN=1 pytest tests/report` writes the files anew."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("REMAKE_GOLDEN"):
            path.write_text(text)
        assert text == path.read_text(), f"{name} differs; look at it, then REMAKE_GOLDEN=1"

    return compare
