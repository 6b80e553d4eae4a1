"""VerificationReport and RunSummary: the checks, measurements and results of a lane and of a run."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable

from coremill.core.contract import Toolchain
from coremill.core.documents import Document, Record
from coremill.core.gates import Gate, Outcome, Severity, failed, gates_ok


class Backend(str, enum.Enum):
    """What ran the package. Only `coreml` results are those of a device."""

    COREML = "coreml"
    MIL_REFERENCE = "mil-reference"


class Perplexity(Record):
    """The perplexity of one text: e to the power of the mean cross entropy in nats per token.

    Raises:
        ValueError: a figure is not finite and positive, or there was nothing to predict.
    """

    reference: float
    """Under the checkpoint, in float32."""
    measured: float
    """Under the package."""
    tokens: int
    """The number of predicted tokens."""

    @classmethod
    def of(cls, *, reference_nats: float, measured_nats: float, tokens: int) -> Perplexity:
        """From mean cross entropies in nats per token."""
        return cls(reference=_exp(reference_nats), measured=_exp(measured_nats), tokens=tokens)

    def __post_init__(self) -> None:
        for name in ("reference", "measured"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"the perplexity `{name}` is {getattr(self, name)}")
        if self.tokens < 1:
            raise ValueError(f"a perplexity of {self.tokens} tokens")

    @property
    def change(self) -> float:
        """The relative difference of the package's perplexity."""
        return abs(self.measured / self.reference - 1)


class ShapeMeasured(Record, tag_field="status", tag="ok"):
    """A shape that ran; agreement with the checkpoint's eager logits on real prompts.

    `max_abs_err`, `sqnr_db` and `kl_nats` cover every position, as does an imported model's `top1_agreement`. A
    student's covers the positions that predict a token of an answer: it is not trained to predict questions.

    Raises:
        ValueError: a figure is not finite; a shape with such logits is a :class:`ShapeError`.
    """

    backend: Backend
    max_abs_err: float
    """Largest absolute difference of logits."""
    sqnr_db: float
    """10·log10(Σ reference² / Σ difference²), at most 300."""
    kl_nats: float
    """Mean over positions of KL(reference ‖ package)."""
    top1_agreement: float
    """Share of the compared positions whose argmax agrees."""
    positions: int
    """The positions that `top1_agreement` considers, including the excluded ones."""
    excluded: int
    """Excluded from `top1_agreement`: the reference's top-1 − top-2 gap is below the margin."""
    perplexity: Perplexity | None = None
    """Of real text; None for a student, which is trained on questions and answers."""

    def __post_init__(self) -> None:
        for name in ("max_abs_err", "sqnr_db", "kl_nats", "top1_agreement"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}")


class ShapeError(Record, tag_field="status", tag="error"):
    """A shape that did not run, or whose logits are not finite."""

    backend: Backend
    error: str


ShapeReport = ShapeMeasured | ShapeError


class StatefulMeasured(Record, tag_field="status", tag="ok"):
    """The functions with a key/value cache, compared with `main` on the same tokens.

    Each SQNR covers all compared positions together, and is that of the worst output.

    Raises:
        ValueError: nothing was compared, or a figure is not finite.
    """

    backend: Backend
    cache_positions: int
    """The number of tokens that the cache can hold."""
    prefills: int
    """The number of prompts, of several lengths, at every shape."""
    prefill_sqnr_db: float
    """Of the outputs of `prefill` after a prompt."""
    decoded: int
    """The number of tokens decoded one by one, the first into an empty cache."""
    decode_sqnr_db: float
    continued: int
    """The number of tokens decoded right after the prompts."""
    continued_sqnr_db: float
    padding_err: float
    """Largest change of any output of `prefill`, or of `decode` after it, with other padding tokens."""
    emptied_sqnr_db: float
    """Of `decode` after a prompt with zeros as keys and values, against itself with the real ones; must be low."""
    end_problem: str | None = None
    """Why a full cache is not an error; None if it is."""

    def __post_init__(self) -> None:
        for name in ("prefills", "decoded", "continued"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}")
        for name in ("prefill_sqnr_db", "decode_sqnr_db", "continued_sqnr_db", "padding_err", "emptied_sqnr_db"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}")


class StatefulError(Record, tag_field="status", tag="error"):
    """Functions with a cache that did not run, or whose outputs are not finite."""

    backend: Backend
    error: str


StatefulReport = StatefulMeasured | StatefulError


class Answer(Record):
    """One question answered through the package."""

    prompt: str
    answer: str
    mood: str | None
    """The mood of the question; None for a question of fact."""
    right: bool
    """Whether the answer has the question's mood or is the expected tool call. For an imported model: whether every
    token is the checkpoint's choice after the same tokens, or within the margin of it."""


class HeldoutAnswers(Record):
    """Held-out questions answered greedily through the package.

    Raises:
        ValueError: a count is negative or exceeds its total, or a figure is not finite.
    """

    asked: int
    exact: int
    """Answers that equal an answer in the dataset's answer key, or are a valid tool call."""
    right_mood: int
    """Of the questions with a mood, answers in that mood."""
    with_mood: int
    right_tool_call: int
    """Of the questions of fact, answers that are the expected tool call."""
    with_tool_call: int
    out_of_vocabulary: int
    """Token ids of prompts and answers outside the model's vocabulary; they are counted, never clamped."""
    teacher_kl_nats: float
    """Mean KL(teacher ‖ package) per answer token."""
    teacher_entropy_nats: float
    """Mean entropy of the teacher per answer token: the floor of the cross entropy."""
    cross_entropy_nats: float
    """Mean cross entropy of the package with the teacher's distribution, per answer token."""

    def __post_init__(self) -> None:
        parts = (
            ("exact", "asked"),
            ("right_mood", "with_mood"),
            ("with_mood", "asked"),
            ("right_tool_call", "with_tool_call"),
            ("with_tool_call", "asked"),
        )
        for part, whole in parts:
            if not 0 <= getattr(self, part) <= getattr(self, whole):
                raise ValueError(
                    f"`{part}` is {getattr(self, part)}, more than `{whole}` {getattr(self, whole)} or negative"
                )
        if self.with_mood + self.with_tool_call > self.asked:
            raise ValueError(
                f"`with_mood` {self.with_mood} and `with_tool_call` {self.with_tool_call} are more than "
                f"`asked` {self.asked}"
            )
        if self.out_of_vocabulary < 0:
            raise ValueError(f"`out_of_vocabulary` is {self.out_of_vocabulary}")
        for name in ("teacher_kl_nats", "teacher_entropy_nats", "cross_entropy_nats"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}")


class VerificationReport(Document):
    """`verification_report.json`.

    Raises:
        ValueError: `gates_ok` contradicts the gates, or a listed shape has no report.
    """

    run: str
    lane: str
    model_type: str
    package_digest: str
    contract_digest: str
    primary: str
    shapes: dict[str, ShapeReport]
    stateful: StatefulReport | None = None
    """None if the run exports no cache, or the package does not load."""
    heldout: HeldoutAnswers | None
    """None for an imported model, and if no question could be answered."""
    sampled_seed: int | None
    """None if the answers are greedy, as those of an imported model are."""
    sampled: tuple[Answer, ...]
    gates: tuple[Gate, ...]
    gates_ok: bool

    def __post_init__(self) -> None:
        if self.gates_ok != gates_ok(self.gates):
            raise ValueError(f"`gates_ok` is {self.gates_ok}, but the gates give {gates_ok(self.gates)}")
        if self.primary not in self.shapes:
            raise ValueError(f"the primary shape {self.primary} has no report")


class StageSummary(Record):
    """One row of the table of stages.

    Raises:
        ValueError: a stage that did not pass has no reason, or its interpreter and times contradict its outcome.
    """

    stage: str
    lane: str | None
    outcome: Outcome
    """Failed for a stage that raised an error, and for a verification with a must gate that did not pass."""
    reason: str | None = None
    python: str | None = None
    """Like `started_at` and `duration_s`: None exactly if the stage did not run."""
    torch: str | None = None
    """None if the stage's environment has no torch."""
    duration_s: float | None = None
    started_at: str | None = None
    peak_anonymous_bytes: int | None = None
    """The peak of the memory of its processes that no file backs; None if it did not run, or on macOS."""

    def __post_init__(self) -> None:
        if self.outcome is not Outcome.PASSED and not self.reason:
            raise ValueError(f"stage {self.stage!r} is {self.outcome.value} without a reason")
        ran = [part is not None for part in (self.python, self.duration_s, self.started_at)]
        if ran != [self.outcome is not Outcome.NOT_RUN] * 3 or (self.torch is not None and not all(ran)):
            raise ValueError(
                f"stage {self.stage!r} is {self.outcome.value}, which its interpreter and times contradict"
            )


class LaneVerified(Record, tag_field="status", tag="verified"):
    """A lane whose stages all ran, with the results of its verification.

    Raises:
        ValueError: `gates_ok` contradicts the gates, or the primary shape has no report.
    """

    lane: str
    toolchain: Toolchain
    """The toolchain of the conversion."""
    primary: str
    gates_ok: bool
    gates: tuple[Gate, ...]
    shapes: dict[str, ShapeReport]
    stateful: StatefulReport | None = None
    heldout: HeldoutAnswers | None
    package_size_bytes: int
    convert_duration_s: float
    converter_notices: dict[str, int]
    """Converter messages by kind."""

    def __post_init__(self) -> None:
        if self.gates_ok != gates_ok(self.gates):
            raise ValueError(f"`gates_ok` is {self.gates_ok}, but the gates give {gates_ok(self.gates)}")
        if self.primary not in self.shapes:
            raise ValueError(f"the primary shape {self.primary} has no report")


class LaneFailed(Record, tag_field="status", tag="failed"):
    """A lane that was not verified: a stage that it needs failed, or never ran.

    Raises:
        ValueError: its gates are not exactly that stage's failed gate.
    """

    lane: str
    stage: str
    """The first stage that did not complete."""
    toolchain: Toolchain | None
    """The toolchain of that stage; None if it never ran."""
    gates_ok: bool = False
    gates: tuple[Gate, ...]

    def __post_init__(self) -> None:
        expected = completion_gate_name(self.stage)
        found = [(gate.name, gate.severity, gate.outcome) for gate in self.gates]
        if self.gates_ok or found != [(expected, Severity.MUST, Outcome.FAILED)]:
            raise ValueError(f"lane {self.lane} failed, but its gates are not exactly {expected!r}, failed")


LaneSummary = LaneVerified | LaneFailed


def completion_gate_name(stage: str) -> str:
    """Return the name of the must gate that tells whether `stage` completed."""
    return f"Stage {stage} completes"


def lane_failed(lane: str, stage: str, reason: str, toolchain: Toolchain | None) -> LaneFailed:
    """Return the summary of a lane that stopped at `stage` because of `reason`."""
    gate = failed(reason).gate(completion_gate_name(stage), Severity.MUST)
    return LaneFailed(lane=lane, stage=stage, toolchain=toolchain, gates=(gate,))


def shared_stages_ok(stages: Iterable[StageSummary]) -> bool:
    """Return whether every stage that the lanes share passed."""
    return all(stage.outcome is Outcome.PASSED for stage in stages if stage.lane is None)


class RunSummary(Document):
    """`summary.json`: one run in one page of figures.

    Raises:
        ValueError: `gates_ok` contradicts the lanes or their shared stages, or there are answers without a verified
            lane.
    """

    run: str
    model_type: str
    created_at: str
    """UTC, ISO 8601."""
    stages: tuple[StageSummary, ...]
    lanes: tuple[LaneSummary, ...]
    figures: dict[str, float | int | str]
    """Figures of the stages that the lanes share: `training.parameters`, …"""
    sampled_seed: int | None
    """The seed of `sampled`, the answers of the first verified lane; None if they are greedy or absent."""
    sampled: tuple[Answer, ...]
    switched_off: tuple[str, ...] = ()
    """The stages that the configuration switches off."""
    fell_back_from: str | None = None
    """The requested lane, if its conversion failed and `--fallback` built another one."""
    gates_ok: bool

    def __post_init__(self) -> None:
        lanes_ok = bool(self.lanes) and all(lane.gates_ok for lane in self.lanes)
        if self.gates_ok != (lanes_ok and shared_stages_ok(self.stages)):
            raise ValueError(f"`gates_ok` is {self.gates_ok}, which the lanes or their shared stages contradict")
        if not self.verified and (self.sampled or self.sampled_seed is not None):
            raise ValueError(
                f"no lane was verified, but there are {len(self.sampled)} answers, of seed {self.sampled_seed}"
            )

    @property
    def verified(self) -> tuple[LaneVerified, ...]:
        """The verified lanes."""
        return tuple(lane for lane in self.lanes if isinstance(lane, LaneVerified))


def _exp(nats: float) -> float:
    """Return e^x; infinity if a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
