"""The measurements that verification makes of a package; `checklist.py` decides what they are worth.

Legend: N positions, T sequence length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import torch

from coremill.conversion.agreement import Agreement, Comparison
from coremill.conversion.backends import Array, Runner
from coremill.conversion.graph import LOGITS, as_input
from coremill.conversion.scoring import ScoredAnswer, Scorer, answer_question, score_answer
from coremill.conversion.sequences import conversation, packed
from coremill.core.config import VerifyConfig
from coremill.core.errors import ContractMismatchError, CoremillError
from coremill.core.reports import Answer, HeldoutAnswers, ShapeError, ShapeMeasured, ShapeReport
from coremill.data.judge import judge
from coremill.data.rows import Row
from coremill.data.teacher import entropy, halt_labels, teacher_targets
from coremill.data.tokenizer import TOOL_CALL, Tokenizer
from coremill.mil.measures import log_softmax, max_abs_err, sqnr_db
from coremill.model.decoding import TemperatureSampler, greedy
from coremill.model.student import Student, output_names

PACKED_SEQUENCES = 4
CONVERSATIONS = 64
"""Conversations compared at each length, so that 2 % of their answer tokens are more than one or two."""


class Reference:
    """The checkpoint's model, eager and in float32."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self.names = output_names(student.config)

    def run(self, ids: Sequence[int]) -> dict[str, Array]:
        """The outputs by name for `ids` (T,), without the batch dimension: (T, V) and (T, 2) float32."""
        with torch.no_grad():
            outputs = self._student(as_input(ids))
        return {name: tensor[0].numpy() for name, tensor in zip(self.names, outputs, strict=True)}


def measure_shape(
    runner: Runner, reference: Reference, rows: Sequence[Row], tokenizer: Tokenizer, seq_len: int, *, margin: float
) -> ShapeReport:
    """Run the package at `seq_len` and compare it with the checkpoint's model, on real held-out conversations.

    Errors, SQNR and KL are over every position of sequences packed full, where each position up to the last
    has a real token, and over the conversations; the first two are of the worst output. Top-1 agreement is over
    the tokens of answers, in conversations padded as they are when the package answers: what a toy says within
    a question was never trained, and near-ties are frequent there.
    """
    by_output = {name: Comparison(margin=margin) for name in reference.names}
    answers = Comparison(margin=margin)
    scorer = Scorer(runner, [seq_len], tokenizer.pad_id)
    fitting = [row for row in rows if len(conversation(row, tokenizer)) <= seq_len][:CONVERSATIONS]
    try:
        for ids in packed(rows, tokenizer, seq_len, PACKED_SEQUENCES):
            _add(by_output, reference.run(ids), scorer.score(ids))
        for row in fitting:
            ids = conversation(row, tokenizer)
            expected, found = reference.run(ids), scorer.score(ids)
            _add(by_output, expected, found)
            start = len(ids) - len(tokenizer.encode_answer(row.teacher_text)) - 1
            answers.add(expected[LOGITS][start:-1], found[LOGITS][start:-1])
        return _measured(
            runner, {name: comparison.result() for name, comparison in by_output.items()}, answers.result()
        )
    except CoremillError as failure:
        return ShapeError(backend=runner.backend, error=failure.found)
    except (RuntimeError, ValueError) as failure:  # of the backend at this shape, or of logits that are not finite
        return ShapeError(backend=runner.backend, error=f"{type(failure).__name__}: {failure}")


def _add(comparisons: Mapping[str, Comparison], expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
    for name, comparison in comparisons.items():
        comparison.add(expected[name], found[name])


def _measured(runner: Runner, by_output: Mapping[str, Agreement], answered: Agreement) -> ShapeMeasured:
    return ShapeMeasured(
        backend=runner.backend,
        max_abs_err=max(agreement.max_abs_err for agreement in by_output.values()),
        sqnr_db=min(agreement.sqnr_db for agreement in by_output.values()),
        kl_nats=by_output[LOGITS].kl_nats,
        top1_agreement=answered.top1_agreement,
        positions=answered.positions,
        excluded=answered.excluded,
    )


def causality_leak(runner: Runner, sequences: Sequence[Sequence[int]], tokenizer: Tokenizer) -> float | None:
    """The largest change of any output before position t when token t changes.

    t goes through the quarters of each sequence and its last position, and the token through one that a
    conversation holds anywhere, an end, and one from elsewhere in the sequence. None where nothing was compared.
    """
    leaks = []
    for ids in sequences:
        before = runner.run(ids)
        for place in sorted({len(ids) // 4, len(ids) // 2, 3 * len(ids) // 4, len(ids) - 1}):
            # Before the first position there is nothing to compare.
            for token in {tokenizer.end_id, ids[place // 2]} - {ids[place]} if place else set():
                changed = [*ids[:place], token, *ids[place + 1 :]]
                after = runner.run(changed)
                leaks += [max_abs_err(before[name][:place], after[name][:place]) for name in before]
    return float(np.max(leaks)) if leaks else None  # unlike Python's max, NaN where there is one


def padding_sqnr_db(
    runner: Runner, reference: Reference, rows: Sequence[Row], tokenizer: Tokenizer, lengths: Sequence[int]
) -> float | None:
    """The worst SQNR of the valid positions of padded conversations, at any length and of any output.

    Against the checkpoint's model on the conversation without padding; in dB. None where nothing was compared.
    """
    ratios = []
    for row in rows:
        ids = conversation(row, tokenizer)
        expected = reference.run(ids)
        for seq_len in (length for length in lengths if length > len(ids)):
            found = Scorer(runner, [seq_len], tokenizer.pad_id).score_at(ids, seq_len)
            ratios += [sqnr_db(expected[name], found[name][: len(ids)]) for name in expected]
    return float(np.min(ratios)) if ratios else None


class Heldout(msgspec.Struct, frozen=True, kw_only=True):
    """What held-out questions show, asked greedily."""

    answers: HeldoutAnswers
    halt_agreement: float | None
    """Share of halt decisions, from the prompt's last token on, that are the label; None without a halt head."""


def ask_heldout(scorer: Scorer, rows: Sequence[Row], tokenizer: Tokenizer) -> Heldout | None:
    """Answer each question greedily through the package, and score the teacher's answer to it.

    An id is beyond the vocabulary where the package's logits have no entry for it, or the tokenizer no token. It is
    counted, never clamped: a row that has one is not asked, and an answer that has one is not exact. None where no
    row could be asked.

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
        verdict = judge(row, _text(ids, tokenizer))
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
        halt_agreement=float(np.mean(halts)) if halts else None,
    )


def _kind(row: Row) -> Literal["mood", "tool_call"] | None:
    """What a right answer to the row is judged by, if not by the letter alone."""
    if row.mood is not None:
        return "mood"
    return "tool_call" if row.teacher_text.startswith(TOOL_CALL) else None


def _beyond(ids: Sequence[int], limit: int) -> int:
    """How many of `ids` are at or beyond `limit`."""
    return sum(token >= limit for token in ids)


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of an answer; of ids that the tokenizer does not know there is none."""
    return tokenizer.decode_answer([token for token in ids if token < tokenizer.vocab_size])


def _teacher_figures(scored: ScoredAnswer, row: Row, tokenizer: Tokenizer) -> list[tuple[float, float]]:
    """Cross entropy with the teacher, and the teacher's entropy, at each answer token; in nats.

    KL(teacher ‖ package) is their difference: Σ p·log p − Σ p·log q.
    """
    log_q = log_softmax(scored.logits)
    targets = teacher_targets(row, tokenizer)
    return [
        (-math.fsum(share * float(scores[token]) for token, share in target.items()), entropy(target))
        for target, scores in zip(targets, log_q, strict=True)
    ]


def _halt_decisions(scored: ScoredAnswer) -> list[bool]:
    """Whether each decision is the label."""
    if scored.halt_logits is None:
        return []
    decisions = scored.halt_logits.argmax(-1)  # (A + 1,): the prompt's last token, then the answer's
    return [bool(same) for same in decisions == np.array(halt_labels(len(decisions) - 1))]


def ask_sampled(
    scorer: Scorer, rows: Sequence[Row], tokenizer: Tokenizer, config: VerifyConfig
) -> tuple[Answer, ...]:
    """Answer each question through the package, sampled at temperature 1 with the configuration's seed."""
    sampler = TemperatureSampler(1.0, config.sampling_seed)
    answers = []
    for row in rows:
        ids = answer_question(scorer, row.prompt, tokenizer, sampler)
        text = _text(ids, tokenizer)
        right = judge(row, text).right and not _beyond(ids, tokenizer.vocab_size)
        answers.append(Answer(prompt=row.prompt, answer=text, mood=row.mood, right=right))
    return tuple(answers)
