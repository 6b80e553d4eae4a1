"""What the terminal's tables and the status page both show: the figures of a summary as rows of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from coremill.core.gates import Gate, Outcome, Severity, gates_ok
from coremill.core.reports import (
    Answer,
    HeldoutAnswers,
    LaneFailed,
    LaneSummary,
    LaneVerified,
    RunSummary,
    ShapeError,
    ShapeMeasured,
    ShapeReport,
    StatefulError,
    StatefulReport,
)

ABSENT = "–"
_DIGEST = "sha256:"
_SHORT_DIGEST = 8


class Column(NamedTuple):
    name: str
    numeric: bool = False


class Rows(NamedTuple):
    """A table: its columns, and a text for each in every row."""

    columns: tuple[Column, ...]
    cells: Sequence[tuple[str, ...]]


class Note(NamedTuple):
    """A text too long for a cell, below its table."""

    word: str
    """How its subject came out."""
    subject: str
    text: str


def stage_rows(summary: RunSummary) -> Rows:
    columns = (
        Column("stage"),
        Column("lane"),
        Column("python"),
        Column("torch"),
        Column("seconds", numeric=True),
        Column("outcome"),
    )
    cells = [
        (
            row.stage,
            lane_name(row.lane) if row.lane else ABSENT,
            row.python or ABSENT,
            row.torch or ABSENT,
            ABSENT if row.duration_s is None else f"{row.duration_s:.1f}",
            row.outcome.value,
        )
        for row in summary.stages
    ]
    return Rows(columns, cells)


def total_s(summary: RunSummary) -> float:
    """Seconds of the stages that ran, each as it last did."""
    return sum(row.duration_s for row in summary.stages if row.duration_s is not None)


def shape_rows(lane: LaneVerified) -> Rows:
    columns = (
        Column("shape"),
        Column("status"),
        Column("max error", numeric=True),
        Column("SQNR", numeric=True),
        Column("KL, nats", numeric=True),
        Column("argmax", numeric=True),
        Column("positions", numeric=True),
        Column("left out", numeric=True),
    )
    return Rows(columns, [_shape_row(lane, name, report) for name, report in lane.shapes.items()])


def _shape_row(lane: LaneVerified, name: str, report: ShapeReport) -> tuple[str, ...]:
    role = ", primary" if name == lane.primary else ""
    if isinstance(report, ShapeError):
        return (name, f"error{role}", *[ABSENT] * 6)
    return (
        name,
        f"ok{role}",
        f"{report.max_abs_err:.1e}",
        f"{report.sqnr_db:.1f} dB",
        f"{report.kl_nats:.1e}",
        percent(report.top1_agreement),
        str(report.positions),
        str(report.excluded),
    )


def perplexity_text(lane: LaneVerified) -> str | None:
    """The perplexities in one sentence; None where no text was read."""
    texts = [
        f"{name} {report.perplexity.measured:.3f} ({report.perplexity.reference:.3f})"
        for name, report in lane.shapes.items()
        if isinstance(report, ShapeMeasured) and report.perplexity is not None
    ]
    if not texts:
        return None
    return f"perplexity of a text (the checkpoint's): {', '.join(texts)}"


def stateful_text(report: StatefulReport | None) -> str | None:
    """What the functions with a cache showed, in one sentence; None where there are none."""
    if report is None:
        return None
    if isinstance(report, StatefulError):
        return f"prefill and decode: error: {report.error}"
    return (
        f"a cache of {report.cache_positions} tokens, SQNR against main: prefill "
        f"{report.prefill_sqnr_db:.1f} dB of {report.prefills} prompts, decode {report.continued_sqnr_db:.1f} dB "
        f"of {report.continued} tokens after them and {report.decode_sqnr_db:.1f} dB of {report.decoded} one by "
        f"one; {report.emptied_sqnr_db:.1f} dB with an emptied cache"
    )


def stage_notes(summary: RunSummary) -> list[Note]:
    return [
        Note(row.outcome.value, f"{row.stage} {lane_name(row.lane)}" if row.lane else row.stage, row.reason)
        for row in summary.stages
        if row.reason
    ]


def shape_notes(lane: LaneSummary) -> list[Note]:
    """The shapes that did not run, of those that were tried."""
    shapes = {} if isinstance(lane, LaneFailed) else lane.shapes
    return [Note("error", name, report.error) for name, report in shapes.items() if isinstance(report, ShapeError)]


def gate_notes(lane: LaneSummary, *, longest: int | None = None) -> list[Note]:
    """The gates that give a reason, by reason: those that did not pass, then those whose pass cites something.

    Args:
        longest: what was measured is given too, where it is a text of more characters.
    """
    sharing: dict[tuple[Outcome, str], list[str]] = {}
    for gate in ordered(lane.gates):
        measured = figure(gate.measured) if _is_long(gate, longest) else None
        if text := "; measured: ".join(part for part in (gate.reason, measured) if part):
            sharing.setdefault((gate.outcome, text), []).append(gate.name)
    notes = [Note(outcome.value, "; ".join(names), text) for (outcome, text), names in sharing.items()]
    return sorted(notes, key=lambda note: note.word == Outcome.PASSED.value)


def backends(lane: LaneVerified) -> str:
    """What ran the package."""
    return ", ".join(sorted({report.backend.value for report in lane.shapes.values()})) or "nothing"


def gate_rows(lane: LaneSummary, *, longest: int | None = None) -> Rows:
    """Args: longest: texts of more characters are left to :func:`gate_notes`."""
    columns = (
        Column("severity"),
        Column("outcome"),
        Column("gate"),
        Column("measured", numeric=True),
        Column("threshold", numeric=True),
    )
    cells = [
        (
            gate.severity.value,
            gate.outcome.value,
            gate.name,
            "see below" if _is_long(gate, longest) else figure(gate.measured),
            figure(gate.threshold),
        )
        for gate in ordered(lane.gates)
    ]
    return Rows(columns, cells)


def _is_long(gate: Gate, longest: int | None) -> bool:
    return longest is not None and len(figure(gate.measured)) > longest


def ordered(gates: tuple[Gate, ...]) -> list[Gate]:
    """Must before should before nice; in a severity, as the verification gave them."""
    return sorted(gates, key=lambda gate: list(Severity).index(gate.severity))


def in_lanes(summary: RunSummary, notes: Callable[[LaneSummary], list[Note]]) -> list[Note]:
    """The notes of all lanes; their subjects name the lane, and one that lanes share is given once."""
    sharing: dict[Note, list[str]] = {}
    for lane in summary.lanes:
        for note in notes(lane):
            sharing.setdefault(note, []).append(lane_name(lane.lane))
    merged = [note._replace(subject=f"{', '.join(lanes)}: {note.subject}") for note, lanes in sharing.items()]
    return sorted(merged, key=lambda note: note.word == Outcome.PASSED.value)


def lane_rows(summary: RunSummary) -> Rows:
    """The lanes side by side: what they ran with, and what their packages compute."""
    lanes = summary.lanes
    shapes = dict.fromkeys(name for lane in summary.verified for name in lane.shapes)
    packages = ("torch", "coremltools", "numpy")
    cells = [
        ("python", *(lane.toolchain.python if lane.toolchain else ABSENT for lane in lanes)),
        *((name, *(_package_version(lane, name) for lane in lanes)) for name in packages),
        *((name, *(_if_verified(lane, _shape_in_short, name) for lane in lanes)) for name in shapes),
        *_optional_row("perplexity", lanes, _primary_perplexity),
        *_optional_row("decode", lanes, _decode_in_short),
        ("package", *(_if_verified(lane, lambda it: megabytes(it.package_size_bytes)) for lane in lanes)),
        ("conversion", *(_if_verified(lane, lambda it: f"{it.convert_duration_s:.1f} s") for lane in lanes)),
        ("converter notices", *(_if_verified(lane, lambda it: notices(it.converter_notices)) for lane in lanes)),
    ]
    return Rows((Column("lane"), *_lane_columns(summary)), cells)


def _optional_row(
    name: str, lanes: Sequence[LaneSummary], text: Callable[[LaneVerified], str | None]
) -> list[tuple[str, ...]]:
    """A row of what some lanes have; none where none has it."""
    texts = [text(lane) if isinstance(lane, LaneVerified) else None for lane in lanes]
    return [(name, *(each or ABSENT for each in texts))] if any(texts) else []


def _primary_perplexity(lane: LaneVerified) -> str | None:
    report = lane.shapes[lane.primary]
    if isinstance(report, ShapeError) or report.perplexity is None:
        return None
    return f"{report.perplexity.measured:.3f} ({report.perplexity.reference:.3f})"


def _decode_in_short(lane: LaneVerified) -> str | None:
    if lane.stateful is None:
        return None
    if isinstance(lane.stateful, StatefulError):
        return "error"
    return f"ok, {min(lane.stateful.continued_sqnr_db, lane.stateful.decode_sqnr_db):.1f} dB"


def _package_version(lane: LaneSummary, name: str) -> str:
    return lane.toolchain.packages.get(name, ABSENT) if lane.toolchain else ABSENT


def _if_verified(lane: LaneSummary, text: Callable[..., str], *arguments: str) -> str:
    return ABSENT if isinstance(lane, LaneFailed) else text(lane, *arguments)


def lane_gate_rows(summary: RunSummary) -> Rows:
    """Every gate, in each lane; those of the stages themselves, too, where one did not complete."""
    lanes = summary.lanes
    gates = {gate.name: gate for lane in lanes for gate in lane.gates}
    completion = {gate.name: lane.stage for lane in lanes if isinstance(lane, LaneFailed) for gate in lane.gates}

    def in_short(lane: LaneSummary, name: str) -> str:
        stage = completion.get(name)
        if stage is None or (isinstance(lane, LaneFailed) and lane.stage == stage):
            return _gate_in_short(lane, name)
        return _completion(summary, lane, stage)

    cells = [
        (gate.severity.value, gate.name, *(in_short(lane, gate.name) for lane in lanes))
        for gate in ordered(tuple(gates.values()))
    ]
    verdict = ("", "gates_ok", *(str(lane.gates_ok).lower() for lane in lanes))
    return Rows((Column("severity"), Column("gate"), *_lane_columns(summary)), [*cells, verdict])


LANE_SHAPES = "of each shape: max error, SQNR, argmax agreement"
"""What :func:`lane_rows` says of a shape."""


def _lane_columns(summary: RunSummary) -> list[Column]:
    return [Column(lane_name(lane.lane)) for lane in summary.lanes]


def _shape_in_short(lane: LaneVerified, name: str) -> str:
    report = lane.shapes.get(name)
    if report is None:
        return "no such shape"
    if isinstance(report, ShapeError):
        return "error"
    return f"ok, {report.max_abs_err:.1e}, {report.sqnr_db:.1f} dB, {percent(report.top1_agreement)}"


def _completion(summary: RunSummary, lane: LaneSummary, stage: str) -> str:
    """Whether the stage completed in a lane that did not stop at it; a verified lane has all of them behind it."""
    if isinstance(lane, LaneVerified):
        return Outcome.PASSED.value
    return next(row.outcome.value for row in summary.stages if row.stage == stage and row.lane in (None, lane.lane))


def _gate_in_short(lane: LaneSummary, name: str) -> str:
    for gate in lane.gates:
        if gate.name == name:
            figures = isinstance(gate.measured, int | float)
            return f"{gate.outcome.value}, {figure(gate.measured)}" if figures else gate.outcome.value
    return Outcome.NOT_RUN.value if isinstance(lane, LaneFailed) else "no such gate"


def notices(counts: dict[str, int]) -> str:
    """`3 harmless, 1 compatibility`: the kinds of notices that there are."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"


def count_outcomes(lane: LaneSummary) -> str:
    """`14 passed, 1 failed, 2 not_run`: the outcomes that there are."""
    counts = {outcome: sum(gate.outcome is outcome for gate in lane.gates) for outcome in Outcome}
    return ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count) or "no gates"


def stopped_text(lane: LaneFailed) -> str:
    """Why there is nothing to show of a lane."""
    return f"stage {lane.stage} did not complete"


def heldout_text(heldout: HeldoutAnswers | None) -> str:
    """The held-out answers in one sentence."""
    if heldout is None:
        return "no held-out questions: the model does not answer any"
    return (
        f"{heldout.asked} held-out questions, answered greedily by the package: {heldout.exact} to the letter, "
        f"{heldout.right_mood} of {heldout.with_mood} in the right mood, "
        f"{heldout.right_tool_call} of {heldout.with_tool_call} the right tool call, "
        f"{heldout.out_of_vocabulary} ids beyond the vocabulary; KL(teacher ‖ package) "
        f"{heldout.teacher_kl_nats:.4f} nats an answer token, cross entropy {heldout.cross_entropy_nats:.4f} "
        f"(the teacher's entropy: {heldout.teacher_entropy_nats:.4f})"
    )


def answers_questions(summary: RunSummary) -> bool:
    """Whether the run's model is asked questions."""
    return learned_to_answer(summary) or bool(summary.sampled)


def learned_to_answer(summary: RunSummary) -> bool:
    """Whether the run's model was taught to answer the questions of a dataset."""
    return any(row.stage == "dataset" for row in summary.stages)


def answers_title(summary: RunSummary) -> str:
    distinct = len({answer.answer for answer in summary.sampled})
    if not summary.verified:
        return "no question was answered: there is no verified package"
    which = f" of {lane_name(summary.verified[0].lane)}" if len(summary.lanes) > 1 else ""
    if not learned_to_answer(summary):
        right = sum(answer.right for answer in summary.sampled)
        return (
            f"{len(summary.sampled)} questions answered by the package{which}, greedily and through its cache: "
            f"{right} as by the checkpoint"
        )
    return (
        f"{len(summary.sampled)} questions answered by the package{which}, "
        f"sampled with seed {summary.sampled_seed}: {distinct} different answers"
    )


def answer_text(answer: Answer) -> str:
    """The answer, or a word for one that ended before it began."""
    return answer.answer.strip() or "(empty)"


def rightness(answer: Answer) -> str:
    return "right" if answer.right else "wrong"


def answer_verdict(summary: RunSummary, answer: Answer) -> tuple[str, str]:
    """What kind of question it was, if there are kinds, and how the answer is."""
    if learned_to_answer(summary):
        return f"{answer.mood or 'fact'}, ", rightness(answer)
    return "", "as the checkpoint" if answer.right else "not as the checkpoint"


def final_line(summary: RunSummary) -> str:
    """`gates_ok: true`, or false and the gates that are why: `gates_ok: false; must: A (failed); should: …`."""
    if summary.gates_ok:
        return "gates_ok: true"
    parts = ["gates_ok: false"]
    shared = [row for row in summary.stages if row.lane is None and row.outcome is not Outcome.PASSED]
    if shared:
        parts.append(f"stages: {', '.join(f'{row.stage} ({row.outcome.value})' for row in shared)}")
    for severity in (Severity.MUST, Severity.SHOULD):
        blamed = []
        for lane in summary.lanes:
            where = f"{lane_name(lane.lane)} " if len(summary.lanes) > 1 else ""
            gates = [gate for gate in lane.gates if gate.severity is severity and is_blamed(gate)]
            blamed += [f"{where}{gate.name} ({gate.outcome.value})" for gate in gates]
        if blamed:
            parts.append(f"{severity.value}: {', '.join(blamed)}")
    return "; ".join(parts) if len(parts) > 1 else "gates_ok: false; no gate was checked"


def is_blamed(gate: Gate) -> bool:
    """Whether the gate keeps `gates_ok` from being true, by the rule of `coremill.core.gates.gates_ok`."""
    return not gates_ok((gate,)) and gate.severity is not Severity.NICE


def fallback_text(summary: RunSummary) -> str | None:
    """That another lane was built than the one asked for, or None."""
    if summary.fell_back_from is None:
        return None
    built = ", ".join(lane_name(lane.lane) for lane in summary.lanes)
    return f"fell back: the conversion in {lane_name(summary.fell_back_from)} failed; this is {built}"


def lane_name(lane: str) -> str:
    return f"torch-{lane}"


def figure(value: float | int | str | None) -> str:
    """A gate's figure: numbers to six digits, as its reason gives them; of a digest, what tells it apart."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return f"{text.removeprefix(_DIGEST)[:_SHORT_DIGEST]}…" if text.startswith(_DIGEST) else text


def percent(share: float) -> str:
    """Rounded down, so that only all of them are 100 %."""
    return "100 %" if share == 1 else f"{math.floor(share * 1e4) / 100:.2f} %"


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"
