"""The contents that the terminal and STATUS.md share: the figures of a summary as rows of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from coremill.core.gates import Gate, Outcome, Severity, gates_ok
from coremill.core.machine import whole_megabytes
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
    """A table: its columns, and rows with one text per column."""

    columns: tuple[Column, ...]
    cells: Sequence[tuple[str, ...]]


class Note(NamedTuple):
    """A text below a table that is too long for a cell."""

    word: str
    """The outcome of the subject."""
    subject: str
    text: str


def stage_rows(summary: RunSummary) -> Rows:
    columns = (
        Column("stage"),
        Column("lane"),
        Column("python"),
        Column("torch"),
        Column("seconds", numeric=True),
        Column("peak memory", numeric=True),
        Column("outcome"),
    )
    cells: list[tuple[str, ...]] = [
        (
            row.stage,
            lane_name(row.lane) if row.lane else ABSENT,
            row.python or ABSENT,
            row.torch or ABSENT,
            ABSENT if row.duration_s is None else f"{row.duration_s:.1f}",
            ABSENT if row.peak_anonymous_bytes is None else whole_megabytes(row.peak_anonymous_bytes),
            row.outcome.value,
        )
        for row in summary.stages
    ]
    cells += [(name, *[ABSENT] * 5, "switched off") for name in summary.switched_off]
    return Rows(columns, cells)


def total_s(summary: RunSummary) -> float:
    """Return the duration of the stages' last runs, in seconds."""
    return sum(row.duration_s for row in summary.stages if row.duration_s is not None)


def shape_rows(lane: LaneVerified) -> Rows:
    columns = (
        Column("shape"),
        Column("status"),
        Column("max error", numeric=True),
        Column("SQNR", numeric=True),
        Column("KL, nats", numeric=True),
        Column("top-1", numeric=True),
        Column("positions", numeric=True),
        Column("excluded", numeric=True),
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
    """Return the perplexities in one sentence; None if none was measured."""
    texts = [
        f"{name} {report.perplexity.measured:.3f} ({report.perplexity.reference:.3f})"
        for name, report in lane.shapes.items()
        if isinstance(report, ShapeMeasured) and report.perplexity is not None
    ]
    if not texts:
        return None
    return f"perplexity of the package (of the checkpoint): {', '.join(texts)}"


def stateful_text(report: StatefulReport | None) -> str | None:
    """Return the results of the functions with a cache, in one sentence; None if there are none."""
    if report is None:
        return None
    if isinstance(report, StatefulError):
        return f"prefill and decode: error: {report.error}"
    return (
        f"with a cache of {report.cache_positions} tokens, SQNR relative to main: prefill "
        f"{report.prefill_sqnr_db:.1f} dB ({report.prefills} prompts), decode {report.continued_sqnr_db:.1f} dB "
        f"({report.continued} tokens after a prefill) and {report.decode_sqnr_db:.1f} dB ({report.decoded} tokens "
        f"from an empty cache); {report.emptied_sqnr_db:.1f} dB in a control with a zeroed cache"
    )


def stage_notes(summary: RunSummary) -> list[Note]:
    return [
        Note(row.outcome.value, f"{row.stage} {lane_name(row.lane)}" if row.lane else row.stage, row.reason)
        for row in summary.stages
        if row.reason
    ]


def shape_notes(lane: LaneSummary) -> list[Note]:
    """Return a note on each shape that failed to run."""
    shapes = {} if isinstance(lane, LaneFailed) else lane.shapes
    return [Note("error", name, report.error) for name, report in shapes.items() if isinstance(report, ShapeError)]


def gate_notes(lane: LaneSummary, *, longest: int | None = None) -> list[Note]:
    """Return the reasons of gates, one note per reason; those of gates that passed are last.

    Args:
        longest: measured values with more characters are included.
    """
    sharing: dict[tuple[Outcome, str], list[str]] = {}
    for gate in ordered(lane.gates):
        measured = figure(gate.measured) if _is_long(gate, longest) else None
        if text := "; measured: ".join(part for part in (gate.reason, measured) if part):
            sharing.setdefault((gate.outcome, text), []).append(gate.name)
    notes = [Note(outcome.value, "; ".join(names), text) for (outcome, text), names in sharing.items()]
    return sorted(notes, key=lambda note: note.word == Outcome.PASSED.value)


def backends(lane: LaneVerified) -> str:
    """Return the names of the backends that ran the package."""
    return ", ".join(sorted({report.backend.value for report in lane.shapes.values()})) or "no backend"


def gate_rows(lane: LaneSummary, *, longest: int | None = None) -> Rows:
    """Args: longest: measured values with more characters are left to :func:`gate_notes`."""
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
    """Return the gates in the order must, should, nice; within a severity the order is kept."""
    return sorted(gates, key=lambda gate: list(Severity).index(gate.severity))


def in_lanes(summary: RunSummary, notes: Callable[[LaneSummary], list[Note]]) -> list[Note]:
    """Return the notes of all lanes with the lanes' names; notes that lanes share are merged."""
    sharing: dict[Note, list[str]] = {}
    for lane in summary.lanes:
        for note in notes(lane):
            sharing.setdefault(note, []).append(lane_name(lane.lane))
    merged = [note._replace(subject=f"{', '.join(lanes)}: {note.subject}") for note, lanes in sharing.items()]
    return sorted(merged, key=lambda note: note.word == Outcome.PASSED.value)


def lane_rows(summary: RunSummary) -> Rows:
    """Return the lanes side by side: their packages' versions and the results of their shapes."""
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
    """Return a row, or none if no lane has a text for it."""
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
    """Return every gate in each lane, including the gate on a stage that did not complete."""
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
    result = ("", "gates_ok", *(str(lane.gates_ok).lower() for lane in lanes))
    return Rows((Column("severity"), Column("gate"), *_lane_columns(summary)), [*cells, result])


LANE_SHAPES = "for each shape: max error, SQNR, top-1 agreement"
"""What the cells of :func:`lane_rows` contain for a shape."""


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
    """Return the outcome of the stage in a lane that did not stop at it; a verified lane completed every stage."""
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
    """Return the number of notices of each kind, such as `3 harmless, 1 compatibility`."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"


def count_outcomes(lane: LaneSummary) -> str:
    """Return the number of gates with each outcome, such as `14 passed, 1 failed, 2 not_run`."""
    counts = {outcome: sum(gate.outcome is outcome for gate in lane.gates) for outcome in Outcome}
    return ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count) or "no gates"


def stopped_text(lane: LaneFailed) -> str:
    """Return the reason why a lane has no results."""
    return f"stage {lane.stage} did not complete"


def heldout_text(heldout: HeldoutAnswers | None) -> str:
    """Return the results of held-out questions in one sentence."""
    if heldout is None:
        return "no held-out questions: the model was not trained on a dataset"
    return (
        f"{heldout.asked} held-out questions, answered greedily by the package: {heldout.exact} answers are exact, "
        f"{heldout.right_mood} of {heldout.with_mood} have the right mood, "
        f"{heldout.right_tool_call} of {heldout.with_tool_call} tool calls are right, "
        f"{heldout.out_of_vocabulary} ids are outside the vocabulary; per answer token, KL(teacher ‖ package) is "
        f"{heldout.teacher_kl_nats:.4f} nats and the cross entropy {heldout.cross_entropy_nats:.4f} nats "
        f"(entropy of the teacher: {heldout.teacher_entropy_nats:.4f})"
    )


def answers_questions(summary: RunSummary) -> bool:
    """Return whether the summary has a section on answers."""
    return learned_to_answer(summary) or bool(summary.sampled)


def learned_to_answer(summary: RunSummary) -> bool:
    """Return whether the model was trained to answer the questions of a dataset."""
    return any(row.stage == "dataset" for row in summary.stages)


def answers_title(summary: RunSummary) -> str:
    distinct = len({answer.answer for answer in summary.sampled})
    if not summary.verified:
        return "no question was answered: there is no verified package"
    which = f" of {lane_name(summary.verified[0].lane)}" if len(summary.lanes) > 1 else ""
    if not learned_to_answer(summary):
        right = sum(answer.right for answer in summary.sampled)
        return (
            f"{len(summary.sampled)} questions answered by the package{which}, greedily with its cache: "
            f"{right} of {len(summary.sampled)} answers equal the checkpoint's"
        )
    return (
        f"{len(summary.sampled)} questions answered by the package{which}, "
        f"sampled with seed {summary.sampled_seed}: {distinct} different answers"
    )


def answer_text(answer: Answer) -> str:
    """Return the answer, or `(empty)`."""
    return answer.answer.strip() or "(empty)"


def rightness(answer: Answer) -> str:
    return "right" if answer.right else "wrong"


def answer_verdict(summary: RunSummary, answer: Answer) -> tuple[str, str]:
    """Return the kind of the question, if there are kinds, and whether the answer is right."""
    if learned_to_answer(summary):
        return f"{answer.mood or 'fact'}, ", rightness(answer)
    return "", "same as the checkpoint" if answer.right else "differs from the checkpoint"


def final_line(summary: RunSummary) -> str:
    """Return `gates_ok: true`, or the gates that prevent it: `gates_ok: false; must: A (failed); should: …`."""
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
    """Return whether the gate makes `gates_ok` false, by the rule of `coremill.core.gates.gates_ok`."""
    return not gates_ok((gate,)) and gate.severity is not Severity.NICE


def fallback_text(summary: RunSummary) -> str | None:
    """Return a sentence if another lane than the requested one was built, or None."""
    if summary.fell_back_from is None:
        return None
    built = ", ".join(lane_name(lane.lane) for lane in summary.lanes)
    return f"fell back to {built}, because the conversion in {lane_name(summary.fell_back_from)} failed"


def lane_name(lane: str) -> str:
    return f"torch-{lane}"


def figure(value: float | int | str | None) -> str:
    """Return a gate's figure as text: numbers with six digits, as in its reason; digests shortened."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return f"{text.removeprefix(_DIGEST)[:_SHORT_DIGEST]}…" if text.startswith(_DIGEST) else text


def percent(share: float) -> str:
    """Return the share in percent, rounded down, so that only 1 is 100 %."""
    return "100 %" if share == 1 else f"{math.floor(share * 1e4) / 100:.2f} %"


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"
