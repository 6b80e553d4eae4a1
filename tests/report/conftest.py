"""Summaries and finished runs: passing, failing, with two lanes, and with a lane that failed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from coremill.core.config import ImportedRun, RunConfig, read_config
from coremill.core.contract import Toolchain
from coremill.core.diagnostics import (
    ConversionDiagnostics,
    Notice,
    NoticeKind,
    count_notices,
)
from coremill.core.digest import digest, value_digest
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
    checkpoint_file,
    contract_file,
    conversion_log,
    dataset_file,
    diagnostics_file,
    package_dir,
    texts_file,
    verification_report,
)
from coremill.core.manifest import Fingerprint, StageManifest, measure_outputs
from coremill.core.reports import (
    Answer,
    Backend,
    HeldoutAnswers,
    LaneSummary,
    LaneVerified,
    Perplexity,
    RunSummary,
    ShapeError,
    ShapeMeasured,
    ShapeReport,
    StageSummary,
    StatefulMeasured,
    VerificationReport,
    lane_failed,
)
from coremill.pipeline.freshness import input_digests
from coremill.pipeline.stages import find_stage, stages_of

BLOCKING = (
    "SQNR at the primary shape",
    "Held-out answers have the right mood",
    "Every held-out answer is exact",
)
"""The must-gates that the bad run fails."""
CONVERT_FAILURE = (
    "coremltools could not convert the graph: NotImplementedError: PyTorch convert function for op 'erfinv' not "
    "implemented; see build/magic-8-ball/torch-2.9.1/convert.failed/conversion.log"
)
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = CONFIGS / "magic-8-ball.toml"
IMPORTED_CONFIG = CONFIGS / "smollm2-135m.toml"
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
    """The gates of a verification that passed."""
    return (
        passed(measured="export 3.11.7, conversion 3.11.7", threshold="3.10 or 3.11").gate(
            "Python 3.11 available for export and conversion", MUST
        ),
        passed(measured=f"sha256:{'9f2c1d7e' * 8}").gate("Checkpoint loads and validates", MUST),
        passed(measured="T128 ok").gate("Primary shape validation succeeds", MUST),
        passed(measured=0, threshold=0).gate("Core ML conversion completes", MUST),
        passed(measured="312 operations lowered by coremill.mil").gate("The Core ML model loads", MUST),
        passed().gate("Inputs, outputs and shapes match the contract", MUST),
        at_most(0.0, 0.0).gate("No position depends on a later token", MUST),
        at_least(62.84, 40.0, " dB").gate("SQNR at the primary shape", MUST),
        at_most(2.3e-7, 1e-3, " nats").gate("KL divergence at the primary shape", MUST),
        at_least(53 / 54, 0.95).gate("Held-out answers have the right mood", MUST),
        passed(measured="3 of 3").gate("All shape enumerations succeed", SHOULD),
        Gate(
            name="No compatibility warnings",
            severity=SHOULD,
            outcome=Outcome.PASSED,
            measured=1,
            threshold=0,
            reason="answered by the measured pass of cell torch-2.9.1 (python ==3.11.*, torch ==2.9.1, "
            "coremltools ==9.0, numpy ==2.3.5)",
        ),
        passed(measured="2 of 2").gate("Secondary shapes validate", SHOULD),
        not_run("Core ML runs on macOS only", PlatformReason.NEEDS_MACOS).gate(
            "Core ML loads and predicts", SHOULD
        ),
        failed(
            "the converter reported: torch 2.9.1 has not been tested with coremltools", measured=1, threshold=0
        ).gate("Zero warnings in conversion logs", NICE),
    )


def bad_gates() -> tuple[Gate, ...]:
    """The gates of a package with one fixed shape, too little precision and no held-out questions."""
    gates = {gate.name: gate for gate in good_gates()}
    error = "shape (1, 64) is not among the shapes that `input_ids` admits, which are [(1, 128)]"
    reason = "no dataset with held-out questions was given"
    for gate in (
        at_least(31.24, 40.0, " dB").gate("SQNR at the primary shape", MUST),
        not_run(reason).gate("Held-out answers have the right mood", MUST),
        not_run(reason).gate("Every held-out answer is exact", MUST),
        failed(f"T64: {error}; T256: {error.replace('64', '256')}", measured="0 of 2").gate(
            "Secondary shapes validate", SHOULD
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


def lane_summary(lane: str, gates: tuple[Gate, ...], shapes: dict[str, ShapeReport]) -> LaneVerified:
    return LaneVerified(
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
    torch = lane or ("2.9.1" if stage in ("training", "import", "hf", "gguf") else None)
    return StageSummary(
        stage=stage,
        lane=lane,
        python="3.13.0" if lane is None else "3.11.7",
        torch=torch,
        duration_s=duration_s,
        started_at="2026-05-04T09:12:33+00:00",
        peak_anonymous_bytes=1_204_500_000 if torch else 12_600_000,
        outcome=Outcome.PASSED if reason is None else Outcome.FAILED,
        reason=reason,
    )


def lane_stages(lane: LaneSummary, verify_reason: str | None) -> list[StageSummary]:
    export = stage_summary("export", lane.lane, 5.12)
    if isinstance(lane, LaneVerified):
        return [
            export,
            stage_summary("convert", lane.lane, 9.471),
            stage_summary("verify", lane.lane, 11.03, None if lane.gates_ok else verify_reason),
        ]
    never = "stage convert did not complete"
    return [
        export,
        stage_summary("convert", lane.lane, 2.214, CONVERT_FAILURE),
        StageSummary(stage="verify", lane=lane.lane, outcome=Outcome.NOT_RUN, reason=never),
    ]


def format_stages() -> list[StageSummary]:
    return [stage_summary("hf", None, 4.106), stage_summary("gguf", None, 8.25)]


def run_summary(lanes: Sequence[LaneSummary], verify_reason: str | None = None) -> RunSummary:
    stages = [stage_summary("dataset", None, 0.614), stage_summary("training", None, 17.96), *format_stages()]
    for lane in lanes:
        stages += lane_stages(lane, verify_reason)
    verified = any(isinstance(lane, LaneVerified) for lane in lanes)
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
        sampled_seed=8 if verified else None,
        sampled=answers() if verified else (),
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


def broken_lane(lane: str) -> LaneSummary:
    """A lane whose conversion failed."""
    packages = {"torch": lane, "coremltools": "9.0", "numpy": "2.3.5"}
    return lane_failed(lane, "convert", CONVERT_FAILURE, toolchain(**packages))


def imported_shapes() -> dict[str, ShapeReport]:
    shapes = list(good_shapes().values())
    figures = ((14.707, 14.704), (15.1695, 15.169), (16.6488, 16.6499), (16.8019, 16.8022))
    return {
        f"T{512 * 2**power}": msgspec.structs.replace(
            shapes[min(power, 2)],
            perplexity=Perplexity(reference=reference, measured=measured, tokens=512 * 2**power - 1),
        )
        for power, (reference, measured) in enumerate(figures)
    }


def stateful() -> StatefulMeasured:
    return StatefulMeasured(
        backend=Backend.MIL_REFERENCE,
        cache_positions=4096,
        prefills=7,
        prefill_sqnr_db=94.12,
        decoded=32,
        decode_sqnr_db=43.61,
        continued=13,
        continued_sqnr_db=48.55,
        padding_err=0.0,
        emptied_sqnr_db=3.27,
    )


def greedy_answers() -> tuple[Answer, ...]:
    return (
        Answer(prompt="What is the capital of Australia?", answer="Canberra.", mood=None, right=True),
        Answer(prompt="Why is the sky blue?", answer="It scatters.\n\nMostly.", mood=None, right=False),
    )


def imported_gates() -> tuple[Gate, ...]:
    """The gates of a model without held-out questions."""
    measured = {
        "Primary shape validation succeeds": "T1024 ok",
        "All shape enumerations succeed": "4 of 4",
        "Secondary shapes validate": "3 of 3",
    }
    gates = (gate for gate in good_gates() if "answer" not in gate.name)
    return tuple(msgspec.structs.replace(gate, measured=measured.get(gate.name, gate.measured)) for gate in gates)


@pytest.fixture
def imported() -> RunSummary:
    """The summary of a run that imported its model."""
    lane = msgspec.structs.replace(
        lane_summary("2.9.1", imported_gates(), good_shapes()),
        primary="T1024",
        shapes=imported_shapes(),
        stateful=stateful(),
        heldout=None,
        package_size_bytes=271_834_112,
    )
    stages = [
        stage_summary("texts", None, 0.121),
        stage_summary("import", None, 6.304),
        *format_stages(),
        *lane_stages(lane, None),
    ]
    return msgspec.structs.replace(
        run_summary([lane]),
        run="smollm2-135m",
        model_type="llama",
        stages=tuple(stages),
        figures={"texts.characters": 121_442, "import.parameters": 134_515_008},
        sampled_seed=None,
        sampled=greedy_answers(),
    )


@pytest.fixture
def failed_lane() -> RunSummary:
    return run_summary([broken_lane("2.9.1")])


@pytest.fixture
def failed_matrix() -> RunSummary:
    """The primary lane failed, the other one passed."""
    return run_summary([broken_lane("2.9.1"), lane_summary("2.8.0", good_gates(), good_shapes())])


@pytest.fixture
def config() -> RunConfig:
    return read_config(CONFIG)


@pytest.fixture
def summaries(
    good: RunSummary,
    bad: RunSummary,
    matrix: RunSummary,
    failed_lane: RunSummary,
    failed_matrix: RunSummary,
    imported: RunSummary,
) -> dict[str, RunSummary]:
    return {
        "good": good,
        "bad": bad,
        "matrix": matrix,
        "failed": failed_lane,
        "failed-matrix": failed_matrix,
        "imported": imported,
    }


class FinishedRun:
    """A run on disk, as the pipeline publishes it."""

    def __init__(self, build: Path, config: RunConfig) -> None:
        self.config = config
        self.stages = stages_of(config)
        self.layout = RunLayout(build=build, run=config.name)

    def publish(self, stage: str, lane: str | None = None, **figures: float | int | str) -> Path:
        """Write the manifest of the stage's directory, and remove an earlier failure."""
        folder = self.layout.stage(stage, lane)
        folder.mkdir(parents=True, exist_ok=True)
        self._record(folder, stage, lane, None, figures)
        shutil.rmtree(self.layout.failed_stage(stage, lane), ignore_errors=True)
        return folder

    def fail(self, stage: str, lane: str | None, error: str, *, log: bool = False) -> Path:
        """Record a failure of the stage; an older success is kept."""
        folder = self.layout.failed_stage(stage, lane)
        folder.mkdir(parents=True)
        if log:
            conversion_log(folder).write_text("converting\n")
        self._record(folder, stage, lane, error, {})
        return folder

    def _record(
        self, folder: Path, stage: str, lane: str | None, error: str | None, figures: dict[str, float | int | str]
    ) -> None:
        (folder / MANIFEST).unlink(missing_ok=True)
        packages = {"torch": lane, "coremltools": "9.0", "numpy": "2.3.5"} if lane else {"torch": "2.9.1"}
        inputs = input_digests(self.layout, find_stage(stage, self.stages), lane, self.stages)
        config = find_stage(stage, self.stages).config_slice(self.config)
        manifest = StageManifest(
            outcome="succeeded" if error is None else "failed",
            error=error,
            stage=stage,
            run=self.config.name,
            lane=lane,
            fingerprint=Fingerprint(
                definition="", config=value_digest(config), sources="", lock="", interpreter="", inputs=inputs
            ),
            config=config,
            toolchain=toolchain("3.13.0" if lane is None else "3.11.7", **packages),
            outputs=measure_outputs(folder),
            figures=figures,
            started_at="2026-05-04T09:12:33+00:00",
            duration_s=1.5,
        )
        write_json(folder / MANIFEST, manifest)

    def shared(self) -> None:
        """Publish the dataset and the training, or the texts and the import."""
        if isinstance(self.config, ImportedRun):
            return self._shared_imported()
        for stage in ("dataset", "training"):
            self.layout.stage(stage).mkdir(parents=True)
        dataset_file(self.layout.stage("dataset")).write_text("{}\n")
        self.publish("dataset", rows=2048)
        checkpoint_file(self.layout.stage("training"), self.config.name).write_text("weights")
        self.publish("training", parameters=623_232, loss_last=0.3412)

    def formats(self) -> None:
        """Publish the exported formats, which lanes share."""
        self.publish("hf", max_abs_err=7e-6)
        self.publish("gguf", f32_max_abs_err=2e-5)

    def _shared_imported(self) -> None:
        for stage in ("texts", "import"):
            self.layout.stage(stage).mkdir(parents=True)
        texts_file(self.layout.stage("texts")).write_text("{}\n")
        self.publish("texts", characters=121_442)
        checkpoint_file(self.layout.stage("import"), self.config.name).write_text("weights")
        self.publish("import", parameters=134_515_008)

    def export(self, lane: str) -> Path:
        folder = self.layout.stage("export", lane)
        folder.mkdir(parents=True)
        contract_file(folder, self.config.name).write_text("{}")
        return self.publish("export", lane)

    def lane(self, lane: str, gates: tuple[Gate, ...], shapes: dict[str, ShapeReport]) -> None:
        """Publish all stages of a lane."""
        self.export(lane)
        self.convert(lane)
        self.verify(lane, gates, shapes)

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
            package_digest=digest(package),
            toolchain=toolchain(torch=lane, coremltools="9.0", numpy="2.3.5"),
            deployment_target="iOS18",
            compute_precision="float16",
            notices=notices,
            counts=count_notices(notices),
        )
        write_json(diagnostics_file(folder), diagnostics)
        return self.publish("convert", lane)

    def verify(self, lane: str, gates: tuple[Gate, ...], shapes: dict[str, ShapeReport], **digests: str) -> Path:
        """Args: digests: other digests of the package or the contract than those of this run."""
        folder = self.layout.stage("verify", lane)
        subjects = {
            "package_digest": digest(package_dir(self.layout.stage("convert", lane), self.config.name)),
            "contract_digest": digest(contract_file(self.layout.stage("export", lane), self.config.name)),
        }
        is_imported = isinstance(self.config, ImportedRun)
        report = VerificationReport(
            run=self.config.name,
            lane=lane,
            model_type=self.config.model_type,
            **{**subjects, **digests},
            primary=f"T{self.config.shapes.primary}",
            shapes=shapes,
            stateful=stateful() if is_imported else None,
            heldout=None if is_imported else heldout(),
            sampled_seed=None if is_imported else 8,
            sampled=greedy_answers() if is_imported else answers(),
            gates=gates,
            gates_ok=gates_ok(gates),
        )
        write_json(verification_report(folder), report)
        return self.publish("verify", lane)


@pytest.fixture
def finished(tmp_path: Path, config: RunConfig) -> FinishedRun:
    """Two lanes: the first passed, the second failed."""
    run = FinishedRun(tmp_path / "build", config)
    run.shared()
    run.lane("2.9.1", good_gates(), good_shapes())
    run.lane("2.8.0", bad_gates(), bad_shapes())
    run.formats()
    return run


@pytest.fixture
def finished_import(tmp_path: Path) -> FinishedRun:
    """A run that imported its model, with one lane that passed."""
    run = FinishedRun(tmp_path / "build", read_config(IMPORTED_CONFIG))
    run.shared()
    run.lane("2.9.1", imported_gates(), imported_shapes())
    run.formats()
    return run


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with the file of that name; `REMAKE_GOLDEN=1 pytest tests/report` rewrites the files."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("REMAKE_GOLDEN"):
            path.write_text(text)
        assert text == path.read_text(), f"{name} differs; look at it, then REMAKE_GOLDEN=1"

    return compare
