"""The measurements that verification makes of a package; `checklist.py` decides what they are worth.

Legend: N positions, T sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from coremill.core.answer_key import AnswerKey
from coremill.core.errors import ContractMismatchError, CoremillError
from coremill.core.reports import Answer, HeldoutAnswers, Perplexity, ShapeError, ShapeMeasured, ShapeReport
from coremill.data.judge import judge
from coremill.data.prompts import Probe, Prompts, conversation
from coremill.data.rows import Row
from coremill.data.teacher import entropy, halt_labels, teacher_targets
from coremill.measures import Agreement, Comparison, Floats, log_softmax, max_abs_err, sqnr_db
from coremill.model.decoding import Sampler, greedy
from coremill.model.reference import Reference
from coremill.model.student import LOGITS
from coremill.text.student_tokenizer import TOOL_CALL, Tokenizer
from coremill.verification.backends import Runner
from coremill.verification.scoring import ScoredAnswer, Scorer, answer_question, score_answer

Outputs = Mapping[str, Floats]
"""Outputs by name, each (T, …) without the batch dimension."""


class ShapeRun(NamedTuple):
    """The result at one shape."""

    report: ShapeReport
    ids: list[int]
    """The first compared sequence, T tokens."""
    outputs: Outputs
    """The package's outputs for `ids`, as :func:`compact` returns them; empty if the shape did not run."""


def measure_shape(
    runner: Runner, reference: Reference, prompts: Prompts, seq_len: int, *, margin: float
) -> ShapeRun:
    """Run the package at `seq_len` and compare it with the checkpoint's model, on real token ids.

    Errors, SQNR and KL cover every position; the first two are those of the worst output. See
    :meth:`Prompts.compared` for what top-1 agreement is about.
    """
    by_output = {name: Comparison(margin=margin) for name in reference.names}
    scorer = Scorer(runner, [seq_len], prompts.pad_id)
    first: list[int] = []
    outputs: Outputs = {}
    try:
        for ids, judged, is_scored in prompts.compared(seq_len):
            found = scorer.score(ids)
            reference.score(ids).compare(found, by_output, judged=judged, tokens=ids if is_scored else None)
            if not first:
                first, outputs = ids, compact(found)
            del found  # it may take 800 MB; free it before the next one is computed
        report = _measured(runner, {name: comparison.result() for name, comparison in by_output.items()})
        return ShapeRun(report, first, outputs)
    except CoremillError as failure:
        error = failure.found
    except (
        RuntimeError,
        ValueError,
    ) as failure:  # from the backend at this shape, or because logits are not finite
        error = f"{type(failure).__name__}: {failure}"
    return ShapeRun(ShapeError(backend=runner.backend, error=error), [], {})


def compact(outputs: Outputs) -> dict[str, Floats]:
    """Return the same values: in float16 where that holds each of them exactly, as a float16 package's outputs."""
    return {name: _halved(array) for name, array in outputs.items()}


def _halved(array: Floats) -> Floats:
    half = np.empty(array.shape, np.float16)
    with np.errstate(over="ignore"):  # infinity then, which differs
        for found, row in zip(half, array, strict=True):
            found[...] = row
            if not np.array_equal(found, row):
                return array
    return half


def perplexity_of(agreement: Agreement) -> Perplexity | None:
    """The perplexities of a text under both sets of logits; None if no tokens were given.

    Raises:
        ValueError: a perplexity is not finite.
    """
    found = agreement.cross_entropies
    return None if found is None else Perplexity.of(**found._asdict())


def _measured(runner: Runner, by_output: Mapping[str, Agreement]) -> ShapeMeasured:
    logits = by_output[LOGITS]
    return ShapeMeasured(
        backend=runner.backend,
        max_abs_err=max(agreement.max_abs_err for agreement in by_output.values()),
        sqnr_db=min(agreement.sqnr_db for agreement in by_output.values()),
        kl_nats=logits.kl_nats,
        top1_agreement=logits.top1_agreement,
        positions=logits.judged,
        excluded=logits.excluded,
        perplexity=perplexity_of(logits),
    )


def causality_leak(
    runner: Runner, probes: Sequence[Probe], known: ShapeRun, shorter: ShapeRun | None = None
) -> float | None:
    """Return the largest change of any output before the position of a token that changes.

    Compared with `shorter`, `known` has other tokens from the end of `shorter` on. If none of its outputs before
    that differs in a bit, changes before the end of `shorter`, each of which would take a run, are not made.

    Args:
        known: the package's outputs for a sequence, which is not run again.
        shorter: its outputs at a smaller length.

    Returns:
        None if nothing was compared; NaN if an output is NaN.
    """
    unchanged = 0 if shorter is None else _unchanged(shorter, known)
    leaks = [0.0] if unchanged else []
    for ids, changes in probes:
        left = [change for change in changes if ids != known.ids or change[0] > unchanged]
        if not left:
            continue
        before = known.outputs if ids == known.ids else compact(runner.run(ids))
        for place, token in left:
            after = runner.run([*ids[:place], token, *ids[place + 1 :]])
            leaks += [_largest_change(before[name][:place], after[name][:place]) for name in before]
            del after  # before the next one is computed
    return float(np.max(leaks)) if leaks else None  # unlike Python's max, NaN if there is one


def _unchanged(shorter: ShapeRun, longer: ShapeRun) -> int:
    """Return the length of `shorter` if `longer` begins with its ids and has the same outputs for them; else 0."""
    n = len(shorter.ids)
    same = longer.ids[:n] == shorter.ids and all(
        np.array_equal(found, longer.outputs[name][:n]) for name, found in shorter.outputs.items()
    )
    return n if same else 0


def _largest_change(before: Floats, after: Floats) -> float:
    """Return the largest difference, row by row: a float64 copy of all logits may take 1.6 GB."""
    return float(np.max([max_abs_err(*rows) for rows in zip(before, after, strict=True)], initial=0.0))


def padding_sqnr_db(runner: Runner, reference: Reference, prompts: Prompts, lengths: Sequence[int]) -> float | None:
    """Return the worst SQNR in dB of the valid positions of padded conversations, over all lengths and outputs.

    The reference is the checkpoint's model on the conversation without padding. None if nothing was compared.
    """
    ratios = []
    for ids, padded_to in prompts.padded(lengths).items():
        expected = reference.run(list(ids))
        for seq_len in padded_to:
            found = Scorer(runner, [seq_len], prompts.pad_id).score_at(ids, seq_len)
            ratios += [sqnr_db(expected[name], found[name][: len(ids)]) for name in expected]
    return float(np.min(ratios)) if ratios else None


class Heldout(msgspec.Struct, frozen=True, kw_only=True):
    """The results of held-out questions, answered greedily."""

    answers: HeldoutAnswers
    halt_decisions: int
    """The halt decisions, from the prompt's last token on; 0 without a halt head."""
    right_halts: int
    """Those that equal the label."""


def ask_heldout(scorer: Scorer, rows: Sequence[Row], tokenizer: Tokenizer, key: AnswerKey) -> Heldout | None:
    """Answer each question greedily through the package, and score the teacher's answer to it.

    An id is outside the vocabulary if the package's logits have no entry for it, or the tokenizer has no token.
    Such ids are counted, never clamped: a row with one is not run, and an answer with one is not exact. None if no
    row could be run.

    Raises:
        ContractMismatchError: a conversation is longer than the package's longest length.
    """
    limit = min(scorer.vocab_size, tokenizer.vocab_size)
    tally = dict.fromkeys(("exact", "right_mood", "with_mood", "right_tool_call", "with_tool_call", "beyond"), 0)
    figures: list[tuple[float, float]] = []
    halts: list[bool] = []
    for row in rows:
        kind = _kind(row)
        if kind is not None:
            tally[f"with_{kind}"] += 1
        if unknown := _beyond(conversation(row, tokenizer), limit):
            tally["beyond"] += unknown
            continue
        ids = answer_question(scorer, row.prompt, tokenizer, greedy)
        unknown = _beyond(ids, limit)
        tally["beyond"] += unknown
        verdict = judge(row, _text(ids, tokenizer), key)
        is_whole = ids[-1:] == [tokenizer.end_id] and not unknown
        tally["exact"] += verdict.exact and is_whole
        if kind is not None:
            tally[f"right_{kind}"] += verdict.right and is_whole
        if (scored := score_answer(scorer, row, tokenizer)) is None:
            raise ContractMismatchError(
                f"the conversation of row {row.id} is longer than the package's longest length {scorer.longest}",
                expected="held-out questions and answers that fit",
            )
        figures += _teacher_figures(scored, row, tokenizer)
        halts += _halt_decisions(scored)
    if not figures:
        return None
    cross_entropy, floor = np.mean(figures, axis=0)
    return Heldout(
        answers=HeldoutAnswers(
            asked=len(rows),
            exact=tally["exact"],
            right_mood=tally["right_mood"],
            with_mood=tally["with_mood"],
            right_tool_call=tally["right_tool_call"],
            with_tool_call=tally["with_tool_call"],
            out_of_vocabulary=tally["beyond"],
            teacher_kl_nats=float(cross_entropy - floor),
            teacher_entropy_nats=float(floor),
            cross_entropy_nats=float(cross_entropy),
        ),
        halt_decisions=len(halts),
        right_halts=sum(halts),
    )


def _kind(row: Row) -> Literal["mood", "tool_call"] | None:
    """What makes an answer to the row right, besides an exact match."""
    if row.mood is not None:
        return "mood"
    return "tool_call" if row.teacher_text.startswith(TOOL_CALL) else None


def _beyond(ids: Sequence[int], limit: int) -> int:
    """Return how many of `ids` are at least `limit`."""
    return sum(token >= limit for token in ids)


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of an answer, without ids that the tokenizer does not know."""
    return tokenizer.decode_answer([token for token in ids if token < tokenizer.vocab_size])


def _teacher_figures(scored: ScoredAnswer, row: Row, tokenizer: Tokenizer) -> list[tuple[float, float]]:
    """Return the cross entropy with the teacher and the teacher's entropy at each answer token, in nats.

    KL(teacher ‖ package) is their difference: Σ p·log p − Σ p·log q.
    """
    log_q = log_softmax(scored.logits)
    targets = teacher_targets(row, tokenizer)
    return [
        (-math.fsum(share * float(scores[token]) for token, share in target.items()), entropy(target))
        for target, scores in zip(targets, log_q, strict=True)
    ]


def _halt_decisions(scored: ScoredAnswer) -> list[bool]:
    """Return whether each decision equals the label."""
    if scored.halt_logits is None:
        return []
    decisions = scored.halt_logits.argmax(-1)  # (A + 1,): the prompt's last token, then the answer's
    return [bool(same) for same in decisions == np.array(halt_labels(len(decisions) - 1))]


def ask_sampled(
    scorer: Scorer, rows: Sequence[Row], tokenizer: Tokenizer, key: AnswerKey, sampler: Sampler
) -> tuple[Answer, ...]:
    """Answer each question through the package with `sampler`."""
    answers = []
    for row in rows:
        ids = answer_question(scorer, row.prompt, tokenizer, sampler)
        text = _text(ids, tokenizer)
        right = judge(row, text, key).right and not _beyond(ids, tokenizer.vocab_size)
        answers.append(Answer(prompt=row.prompt, answer=text, mood=row.mood, right=right))
    return tuple(answers)
