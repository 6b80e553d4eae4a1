"""VerificationReport and RunSummary: what was checked, what was measured, and how it came out."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable

from coremill.core.contract import Toolchain, shape_key
from coremill.core.documents import Document, Record
from coremill.core.gates import Gate, Outcome, Severity, failed, gates_ok


class Backend(str, enum.Enum):
    """What ran the package. Only `coreml` says anything about a device."""

    COREML = "coreml"
    MIL_REFERENCE = "mil-reference"


class Perplexity(Record):
    """How likely one text is: e to the power of the mean cross entropy, in nats a token.

    Raises:
        ValueError: a figure is not finite and positive, or there was nothing to predict.
    """

    reference: float
    """To the checkpoint, in float32."""
    measured: float
    """To the package."""
    tokens: int
    """Tokens that were predicted."""

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
        """The share by which the package's differs."""
        return abs(self.measured / self.reference - 1)


class ShapeMeasured(Record, tag_field="status", tag="ok"):
    """A shape that ran; agreement with the checkpoint's eager logits on real prompts.

    `max_abs_err`, `sqnr_db` and `kl_nats` are over every position, and so is the `top1_agreement` of a model that
    was imported; that of a student is over the positions that predict a token of an answer, because nothing was
    trained to predict a question.

    Raises:
        ValueError: a figure is not finite; a shape whose logits are not is a :class:`ShapeError`.
    """

    backend: Backend
    max_abs_err: float
    """Largest absolute difference of logits."""
    sqnr_db: float
    """10·log10(Σ reference² / Σ difference²), at most 300."""
    kl_nats: float
    """Mean over positions of KL(reference ‖ package)."""
    top1_agreement: float
    """Share of the positions compared whose argmax agrees."""
    positions: int
    """Positions that `top1_agreement` is about, the excluded ones among them."""
    excluded: int
    """Positions left out of `top1_agreement` because the reference's top-1 − top-2 gap is below the margin."""
    perplexity: Perplexity | None = None
    """Of real text; None for a student, which learned to answer questions."""

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
    """What the functions with a key/value cache showed, compared with `main` on the same tokens.

    An SQNR is that of all positions that were compared together, and of the worst output.

    Raises:
        ValueError: nothing was compared, or a figure is not finite.
    """

    backend: Backend
    cache_positions: int
    """Tokens that the cache holds."""
    prefills: int
    """Prompts that were read, of several lengths, at every shape."""
    prefill_sqnr_db: float
    """Of what `prefill` says after a prompt."""
    decoded: int
    """Tokens decoded one by one, the first into an empty cache."""
    decode_sqnr_db: float
    continued: int
    """Tokens decoded right after the prompts."""
    continued_sqnr_db: float
    padding_err: float
    """Largest change of any output, of `prefill` or of `decode` after it, when other tokens pad the same prompt."""
    emptied_sqnr_db: float
    """Of `decode` right after a prompt whose keys and values became zeros, against itself with them: low."""
    end_problem: str | None = None
    """Why the end of the cache is not an error; None where it is."""

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
    """The mood that the question asked for; None for a question of fact."""
    right: bool
    """A classic answer of the question's mood, or the tool call that it asks for; of an imported model, one whose
    every token is the checkpoint's choice after the same tokens, or within the margin of it."""


class HeldoutAnswers(Record):
    """Held-out questions answered greedily through the package.

    Raises:
        ValueError: a count is negative or more than what it is a part of, or a figure is not finite.
    """

    asked: int
    exact: int
    """Answers that are, to the letter, one of the classic ones or a valid tool call."""
    right_mood: int
    """Of the questions with a mood, answers in that mood."""
    with_mood: int
    right_tool_call: int
    """Of the questions of fact, answers that are the tool call asked for."""
    with_tool_call: int
    out_of_vocabulary: int
    """Token ids, of prompts and answers, at or beyond the model's vocabulary; they are counted, never clamped."""
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
                    f"`{part}` is {getattr(self, part)}, which is no part of `{whole}` {getattr(self, whole)}"
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
    """None where the run exports no cache, or the package does not load."""
    heldout: HeldoutAnswers | None
    """None for a model that was imported, and where no question could be asked."""
    sampled_seed: int | None
    """None where the answers are greedy: those of a model that was imported, through its cache."""
    sampled: tuple[Answer, ...]
    gates: tuple[Gate, ...]
    gates_ok: bool

    def __post_init__(self) -> None:
        if self.gates_ok != gates_ok(self.gates):
            raise ValueError(f"`gates_ok` is {self.gates_ok}, the gates say {gates_ok(self.gates)}")
        if self.primary not in self.shapes:
            raise ValueError(f"the primary shape {self.primary} has no report")

    def shape(self, seq_len: int) -> ShapeReport:
        return self.shapes[shape_key(seq_len)]


class StageSummary(Record):
    """One row of the table of stages.

    Raises:
        ValueError: the stage did not pass and no reason is given, or what it ran with contradicts whether it ran.
    """

    stage: str
    lane: str | None
    outcome: Outcome
    """Failed for a stage that ended in an error, and for a verification whose must-gates did not all pass."""
    reason: str | None = None
    python: str | None = None
    """This, the time and the duration: None for a stage that did not run, and for no other."""
    torch: str | None = None
    """None where the stage's environment holds no torch."""
    duration_s: float | None = None
    started_at: str | None = None

    def __post_init__(self) -> None:
        if self.outcome is not Outcome.PASSED and not self.reason:
            raise ValueError(f"stage {self.stage!r} is {self.outcome.value} without a reason")
        ran = [part is not None for part in (self.python, self.duration_s, self.started_at)]
        if ran != [self.outcome is not Outcome.NOT_RUN] * 3 or (self.torch is not None and not all(ran)):
            raise ValueError(f"stage {self.stage!r} is {self.outcome.value}, and what it ran with says otherwise")


class LaneVerified(Record, tag_field="status", tag="verified"):
    """A lane all of whose stages ran, with what its verification found.

    Raises:
        ValueError: `gates_ok` contradicts the gates, or the primary shape has no report.
    """

    lane: str
    toolchain: Toolchain
    """What the package was converted with."""
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
            raise ValueError(f"`gates_ok` is {self.gates_ok}, the gates say {gates_ok(self.gates)}")
        if self.primary not in self.shapes:
            raise ValueError(f"the primary shape {self.primary} has no report")


class LaneFailed(Record, tag_field="status", tag="failed"):
    """A lane that was not verified: one of the stages that it rests on failed, or never ran.

    Raises:
        ValueError: it holds anything but that stage's one failed gate.
    """

    lane: str
    stage: str
    """The first stage that did not complete."""
    toolchain: Toolchain | None
    """What that stage ran with; None where it never ran."""
    gates_ok: bool = False
    gates: tuple[Gate, ...]

    def __post_init__(self) -> None:
        expected = completion_gate_name(self.stage)
        found = [(gate.name, gate.severity, gate.outcome) for gate in self.gates]
        if self.gates_ok or found != [(expected, Severity.MUST, Outcome.FAILED)]:
            raise ValueError(f"lane {self.lane} failed, and its gates are not {expected!r} alone, failed")


LaneSummary = LaneVerified | LaneFailed


def completion_gate_name(stage: str) -> str:
    """The must-gate of a lane that says whether `stage` came to its end."""
    return f"Stage {stage} completes"


def lane_failed(lane: str, stage: str, reason: str, toolchain: Toolchain | None) -> LaneFailed:
    """The lane `lane`, which stopped at `stage` because of `reason`."""
    gate = failed(reason).gate(completion_gate_name(stage), Severity.MUST)
    return LaneFailed(lane=lane, stage=stage, toolchain=toolchain, gates=(gate,))


def shared_stages_ok(stages: Iterable[StageSummary]) -> bool:
    """Whether each stage that lanes share passed; a failed lane is that lane's."""
    return all(stage.outcome is Outcome.PASSED for stage in stages if stage.lane is None)


class RunSummary(Document):
    """`summary.json`: one run in one page of figures.

    Raises:
        ValueError: `gates_ok` contradicts the lanes or the stages that they share, or there are answers and no lane
            that could have given them.
    """

    run: str
    model_type: str
    created_at: str
    """UTC, ISO 8601."""
    stages: tuple[StageSummary, ...]
    lanes: tuple[LaneSummary, ...]
    figures: dict[str, float | int | str]
    """What the stages that lanes share measured: `training.parameters`, …"""
    sampled_seed: int | None
    """Of the first lane that was verified, as are the answers; None where they are greedy, or there are none."""
    sampled: tuple[Answer, ...]
    fell_back_from: str | None = None
    """The lane that was asked for, where its conversion failed and `--fallback` built another one."""
    gates_ok: bool

    def __post_init__(self) -> None:
        lanes_ok = bool(self.lanes) and all(lane.gates_ok for lane in self.lanes)
        if self.gates_ok != (lanes_ok and shared_stages_ok(self.stages)):
            raise ValueError(f"`gates_ok` is {self.gates_ok}, the lanes and what they share say otherwise")
        if not self.verified and (self.sampled or self.sampled_seed is not None):
            raise ValueError(
                f"no lane was verified, and there are {len(self.sampled)} answers, of seed {self.sampled_seed}"
            )

    @property
    def verified(self) -> tuple[LaneVerified, ...]:
        """The lanes whose package was run."""
        return tuple(lane for lane in self.lanes if isinstance(lane, LaneVerified))


def _exp(nats: float) -> float:
    """Return e^x; infinity if a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
