"""Whether GGUF files compute what their checkpoint computes: llama.cpp itself beside torch, on real prompts.

A file is asked for log probabilities at some positions, for greedy tokens, for the ids of texts and, of a model
that was distilled, for answers to held-out questions. What is stored in float32 has to agree to rounding; what is
quantised has to say nearly the same, and how nearly is reported.

Legend: N tokens, P positions, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coremill.conversion.prompts import Prompts, RowPrompts, TextPrompts, conversation
from coremill.core.config import GgufType
from coremill.core.errors import GgufError, ParityError
from coremill.core.parity import (
    FileParity,
    GgufParity,
    Measure,
    ParityFigure,
    TokenDifference,
    TokenizerMismatch,
    figure_outcome,
)
from coremill.data.judge import judge
from coremill.data.rows import Row
from coremill.data.text_tokenizer import TextTokenizer
from coremill.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from coremill.model.checkpoint import Checkpoint, build_student
from coremill.model.decoding import generate, greedy
from coremill.model.llamacpp import LOG_PROB_FLOOR, LlamaCpp
from coremill.model.weights import open_weights

log = logging.getLogger(__name__)

NEAR_TIE_NATS = 1e-3
"""Two tokens whose log probabilities are no further apart in torch may change places by rounding."""

TEXTS = 1000
"""Texts that are tokenized both ways: half of them real, half of random Unicode."""
LISTED = 8
"""Mismatches of a tokenizer that are listed."""
MAX_NEW_TOKENS = 96
"""No answer of a toy's teacher is longer; one that does not end by then is not exact."""

_REMAKE = "python -m coremill.conversion.export_gguf --help"


def require_parity(report: GgufParity, *, run: str | None = None) -> None:
    """Check that every figure is within its bound.

    Raises:
        ParityError: names each that is not.
    """
    if failures := list(report.failures()):
        expected = "llama.cpp to compute what the checkpoint computes, within the bounds of coremill.conversion."
        raise ParityError("; ".join(failures), expected=f"{expected}gguf_parity", run=run)


# --- what is allowed --------------------------------------------------------------------------------


class _Bound(NamedTuple):
    limit: float
    source: str


_CONTRACT = "what is promised of the format"
_ACTIVATIONS = "llama.cpp rounds activations to 8 bits there: measured 8e-4 on the toy, 2.7e-3 on SmolLM2-135M"
_GAIN = "no quantisation scales a matrix: measured 5e-3 with 4 bits"
_RUINED = "generous, few bits cost what they cost: a file with Q and K in the wrong order has 1.8 or more"
_QUANTISED: tuple[GgufType, ...] = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
BOUNDS: Mapping[tuple[GgufType, Measure], _Bound] = {
    ("f32", "max_abs_err"): _Bound(1e-4, _CONTRACT),
    ("f16", "max_abs_err"): _Bound(5e-2, _CONTRACT),
    **{(kind, "kl_nats"): _Bound(1.0, _RUINED) for kind in _QUANTISED},
    ("q8_0", "kl_nats"): _Bound(5e-3, _CONTRACT),
    **{(kind, "arithmetic_kl_nats"): _Bound(1e-2, _ACTIVATIONS) for kind in _QUANTISED},
    **{(kind, "weights_gain_err"): _Bound(2e-2, _GAIN) for kind in _QUANTISED},
}
_EXACT: frozenset[GgufType] = frozenset({"f32", "f16"})
"""The types whose answers are to be the checkpoint's."""
_AT_LEAST: frozenset[Measure] = frozenset({"top1_agreement", "heldout_exact"})


def _figure(name: Measure, measured: float, bound: _Bound | None) -> ParityFigure:
    limit, source = bound if bound is not None else (None, None)
    at_least = name in _AT_LEAST
    return ParityFigure(
        name=name,
        measured=float(measured),
        bound=limit,
        at_least=at_least,
        source=source,
        outcome=figure_outcome(measured, limit, at_least=at_least),
    )


# --- what is asked ----------------------------------------------------------------------------------


class _Scope(NamedTuple):
    """How much is asked of each file."""

    sequences: int
    length: int
    """Of a sequence, at most."""
    values: int
    """Log probabilities that are compared, P·V: a vocabulary of 50,000 takes 0.3 s a position."""
    fewest: int
    """Positions, however large the vocabulary."""
    greedy_prompts: int
    greedy_tokens: int
    questions: int


_QUICK = _Scope(2, 256, 1 << 16, 64, 4, 64, 64)
_FULL = _Scope(4, 256, 1 << 19, 128, 20, 256, 1024)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What every file is asked, with what the checkpoint says to it."""

    sequences: list[tuple[list[int], list[int]]]
    """Ids, and the positions after which log probabilities are compared."""
    log_probs: list[Any]
    """The checkpoint's: (P, V) float32 for each sequence."""
    prompts: list[list[int]]
    greedy_tokens: int
    texts: list[str]
    tokenizer: TextTokenizer
    rows: Sequence[Row]
    student_tokenizer: Tokenizer | None
    context: int


def measure_gguf(
    files: Mapping[GgufType, Path], checkpoint: Checkpoint, prompts: Prompts, *, quick: bool
) -> GgufParity:
    """Run each file in llama.cpp and compare it with the checkpoint's model in torch's float32.

    Args:
        files: by the type that their matrices are stored as.
        prompts: of the checkpoint's own tokenizer.
        quick: a few prompts, as a build can afford, and not the 20 of 256 tokens.

    Raises:
        GgufError: llama.cpp does not load a file, or it is of another vocabulary.
        DatasetError: the texts are too short.
    """
    scope = _QUICK if quick else _FULL
    reference = _Reference(checkpoint)
    plan = _plan(scope, reference, prompts)
    measured: dict[str, FileParity] = {}
    # Each file has a process of llama.cpp of its own, which computes with one thread.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = pool.map(lambda file: _measure_file(file[0], Path(file[1]), reference, plan), files.items())
        for (kind, path), file in zip(files.items(), found, strict=True):
            measured[kind] = file
            said = ", ".join(f"{figure.name} {figure.measured:.3g}" for figure in file.figures)
            log.info("%s: %s", path.name, said)
    return GgufParity(
        model_type=checkpoint.model_type,
        xllamacpp=importlib.metadata.version("xllamacpp"),
        quick=quick,
        files=measured,
        passed=all(figure.outcome != "failed" for file in measured.values() for figure in file.figures),
    )


class _Reference:
    """The checkpoint's model in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self._student = build_student(checkpoint)

    def log_probs(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """(N, V) float32, no lower than llama.cpp's can be."""
        with torch.no_grad():
            logits = self._student(torch.tensor([list(ids)]))[0][0]
        # The sum alone in float64: what rounds is to be the model.
        values = torch.log_softmax(logits, -1, dtype=torch.float64).clamp_(min=LOG_PROB_FLOOR)
        log_probs: np.ndarray[Any, Any] = values.to(torch.float32).numpy()
        return log_probs

    def next_log_probs(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """(V,): of the token after `ids`."""
        row: np.ndarray[Any, Any] = self.log_probs(ids)[-1]
        return row


def _plan(scope: _Scope, reference: _Reference, prompts: Prompts) -> _Plan:
    longest = reference.config.max_seq_len
    length = min(scope.length, longest - 1)  # llama.cpp keeps a position for the token that it says
    n_positions = max(scope.fewest, scope.values // reference.config.vocab_size)
    sequences = list(_sequences(prompts, length, n_positions, scope.sequences))
    asked = _questions(prompts, scope.greedy_prompts)
    own = prompts.tokenizer
    return _Plan(
        sequences=sequences,
        log_probs=[reference.log_probs(ids)[positions] for ids, positions in sequences],
        prompts=asked,
        greedy_tokens=scope.greedy_tokens,
        texts=list(_texts(prompts)),
        tokenizer=prompts.text_tokenizer,
        rows=prompts.rows[: scope.questions] if isinstance(prompts, RowPrompts) else (),
        student_tokenizer=own if isinstance(own, Tokenizer) else None,
        context=min(longest, max(length + 1, *(len(ids) + scope.greedy_tokens for ids in asked))),
    )


def _sequences(
    prompts: Prompts, length: int, n_positions: int, count: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids with the positions that are compared, about `n_positions` in all: what the model reads in use.

    A student's conversations, whole: it never saw one behind another. Of running text `count` parts of `length`,
    with positions all over them.
    """
    if isinstance(prompts, RowPrompts):
        taken = 0
        for row in prompts.rows:
            ids = conversation(row, prompts.tokenizer)[:length]
            yield ids, list(range(len(ids)))
            taken += len(ids)
            if taken >= n_positions:
                return
        return
    each = min(length, max(1, n_positions // count))
    places = sorted({int(place) for place in np.linspace(length - 1, 0, each, endpoint=False)})
    yield from ((ids, places) for ids in prompts.packed(length, count))


def _questions(prompts: Prompts, count: int) -> list[list[int]]:
    """`count` prompts as the model is given them; where there are not so many, the beginnings of texts."""
    if isinstance(prompts, RowPrompts):
        return [prompts.tokenizer.encode_prompt(row.prompt) for row in prompts.rows[:count]]
    asked = [chat.ids for chat in prompts.chats[:count]] if isinstance(prompts, TextPrompts) else []
    return asked + prompts.packed(32, count - len(asked))


# --- one file ---------------------------------------------------------------------------------------


def _measure_file(kind: GgufType, path: Path, reference: _Reference, plan: _Plan) -> FileParity:
    started = time.monotonic()
    with LlamaCpp(path, context=plan.context) as llamacpp:
        if llamacpp.vocab_size != reference.config.vocab_size:
            raise GgufError(
                f"{path} has {llamacpp.vocab_size} tokens, the checkpoint's model {reference.config.vocab_size}",
                expected="the file that was made of the checkpoint",
                run=_REMAKE,
            )
        measured = [llamacpp.rows(ids, positions) for ids, positions in plan.sequences]
        compared = _compare(measured, plan.log_probs)
        if kind not in _EXACT:
            compared |= _judge_weights(path, measured, reference.checkpoint, plan)
        figures = [_figure(name, value, BOUNDS.get((kind, name))) for name, value in compared.items()]
        differences, said = _greedy_differences(llamacpp, reference, plan) if kind == "f32" else ([], 0)
        if kind == "f32":
            beyond = sum(not difference.near_tie for difference in differences)
            figures.append(_figure("greedy_differences", beyond, _Bound(0, "torch's own greedy tokens")))
        mismatches = list(_mismatches(llamacpp, plan))
        texts = len({mismatch.text for mismatch in mismatches})
        figures.append(_figure("tokenizer_mismatches", texts, _Bound(0, "the tokenizer of the checkpoint")))
        if plan.rows:
            figures.append(_heldout(llamacpp, reference, plan, bounded=kind in _EXACT))
    return FileParity(
        file=path.name,
        size_bytes=path.stat().st_size,
        positions=sum(len(rows) for rows in plan.log_probs),
        greedy_prompts=len(plan.prompts) if kind == "f32" else 0,
        greedy_tokens=said,
        heldout_questions=len(plan.rows),
        figures=tuple(figures),
        differences=tuple(differences),
        mismatches=tuple(mismatches[:LISTED]),
        duration_s=time.monotonic() - started,
    )


def _compare(measured: Sequence[Any], expected: Sequence[Any]) -> dict[Measure, float]:
    """The figures of log probabilities, (P, V) a sequence; KL and top-1 agreement are means over positions."""
    largest, kl, same, total = 0.0, 0.0, 0, 0
    for theirs, ours in zip(measured, expected, strict=True):
        largest = max(largest, float(np.abs(ours - theirs).max()))
        same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        x, y = _normalized(ours), _normalized(theirs)
        kl += float((np.exp(x) * (x - y)).sum())
        total += len(ours)
    return {"max_abs_err": largest, "kl_nats": kl / total, "top1_agreement": same / total}


def _judge_weights(
    path: Path, measured: Sequence[Any], checkpoint: Checkpoint, plan: _Plan
) -> dict[Measure, float]:
    """What tells a defect from the rounding of weights: the weights themselves, and the arithmetic on them."""
    stored = {name: tensor.float() for name, tensor in open_weights(path).read()}
    # GGUF has no place for the halt head.
    ours = {name: tensor for name, tensor in checkpoint.state_dict.items() if name != "halt_head.weight"}
    if stored.keys() != ours.keys():
        odd = sorted(stored.keys() ^ ours.keys())
        raise GgufError(
            f"{path} and the checkpoint do not both have {odd[0]}",
            expected="the file that was made of the checkpoint",
            run=_REMAKE,
        )
    gains = [_gain(ours[name], stored[name]) for name in ours]
    state = {**checkpoint.state_dict, **stored}
    own = _Reference(replace(checkpoint, state_dict=state, where=str(path), run=_REMAKE))
    expected = [own.log_probs(ids)[positions] for ids, positions in plan.sequences]
    return {
        "arithmetic_kl_nats": _compare(measured, expected)["kl_nats"],
        "weights_gain_err": max(abs(gain - 1) for gain in gains),
    }


def _gain(expected: torch.Tensor, stored: torch.Tensor) -> float:
    """⟨expected, stored⟩/⟨expected, expected⟩: 1 for what is but rounded; 1 too where all is 0."""
    x, y = expected.double().flatten(), stored.double().flatten()
    power = float(x @ x)
    return float(x @ y) / power if power else 1.0


def _normalized(log_probs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(P, V) in float64, each row summing to 1 in it: that of a float32 row does to 1e-6, and a KL may be less."""
    x = log_probs.astype(np.float64)
    total: np.ndarray[Any, Any] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return total


def _greedy_differences(
    llamacpp: LlamaCpp, reference: _Reference, plan: _Plan
) -> tuple[list[TokenDifference], int]:
    """Where a greedy token is not torch's choice after the same tokens, and how many tokens there were.

    Without a difference that is what torch's own greedy decoding says, and one run of torch over what was said
    shows it.
    """
    found, said = [], 0
    for number, ids in enumerate(plan.prompts):
        tokens = llamacpp.generate(ids, min(plan.greedy_tokens, plan.context - len(ids)), ())
        log_probs = reference.log_probs([*ids, *tokens[:-1]])[len(ids) - 1 :]
        said += len(tokens)
        best = log_probs.argmax(-1)
        for place in np.flatnonzero(best != tokens):
            row, token = log_probs[place], tokens[place]
            gap = float(row[best[place]] - row[token])
            found.append(
                TokenDifference(
                    prompt=number,
                    place=int(place),
                    torch_token=int(best[place]),
                    token=token,
                    gap_nats=gap,
                    near_tie=gap <= NEAR_TIE_NATS,
                )
            )
    return found, said


def _heldout(llamacpp: LlamaCpp, reference: _Reference, plan: _Plan, *, bounded: bool) -> ParityFigure:
    """The share of held-out questions whose answer is exact; at least the checkpoint's own share, where bounded."""
    assert plan.student_tokenizer is not None  # there are rows
    tokenizer = plan.student_tokenizer
    exact, own = 0, 0
    for row in plan.rows:
        prompt = tokenizer.encode_prompt(row.prompt)
        room = min(MAX_NEW_TOKENS, plan.context - len(prompt))
        answer = llamacpp.generate(prompt, room, {tokenizer.end_id})
        is_exact = judge(row, tokenizer.decode_answer(answer)).exact
        exact += is_exact
        if bounded:
            own += is_exact if _is_own(reference, prompt, answer) else _own_exact(reference, row, tokenizer, room)
    share = exact / len(plan.rows)
    bound = _Bound(own / len(plan.rows), "the checkpoint's own share in torch") if bounded else None
    return _figure("heldout_exact", share, bound)


def _is_own(reference: _Reference, prompt: list[int], answer: list[int]) -> bool:
    """Whether the checkpoint answers the same: each token is its choice after those before."""
    best = reference.log_probs([*prompt, *answer[:-1]])[len(prompt) - 1 :].argmax(-1)
    return bool((best == answer).all())


def _own_exact(reference: _Reference, row: Row, tokenizer: Tokenizer, room: int) -> bool:
    answer = generate(
        reference.next_log_probs,
        tokenizer.encode_prompt(row.prompt),
        stop_ids={tokenizer.end_id},
        max_new_tokens=room,
        sampler=greedy,
    )
    return judge(row, tokenizer.decode_answer(answer)).exact


# --- tokenizers -------------------------------------------------------------------------------------


def _mismatches(llamacpp: LlamaCpp, plan: _Plan) -> Iterator[TokenizerMismatch]:
    for text in plan.texts:
        for allow_special in (False, True):
            ours = plan.tokenizer.encode(text, allow_special=allow_special)
            theirs = llamacpp.tokenize(text, allow_special=allow_special)
            if ours != theirs:
                yield TokenizerMismatch(
                    text=text, allow_special=allow_special, ids=tuple(ours), llamacpp_ids=tuple(theirs)
                )


def _texts(prompts: Prompts) -> Iterator[str]:
    """TEXTS of them: real ones, and random Unicode; the same each time."""
    rng = random.Random(TEXTS)
    real = _real_texts(prompts)
    for number in range(TEXTS // 2):
        yield real[number % len(real)] if number < len(real) else _excerpt(rng, real)
    yield from _random_texts(TEXTS - TEXTS // 2)


def _real_texts(prompts: Prompts) -> list[str]:
    if isinstance(prompts, RowPrompts):
        return [text for row in prompts.rows for text in (row.prompt, row.teacher_text)]
    if isinstance(prompts, TextPrompts):
        return [prompt.text for prompt in prompts.chat_prompts] + [
            text.text[start : start + 200] for text in prompts.texts for start in range(0, len(text.text), 2000)
        ]
    raise TypeError(f"prompts of {type(prompts).__name__}")


def _excerpt(rng: random.Random, texts: Sequence[str]) -> str:
    """A piece of a text, which may begin and end within a word."""
    text = rng.choice(texts)
    start = rng.randrange(len(text))
    return text[start : start + rng.randint(1, 200)]


def _random_texts(count: int) -> Iterator[str]:
    rng = random.Random(count)
    for _ in range(count):
        yield "".join(_run(rng) for _ in range(rng.randint(2, 12)))


_SPACES = (
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    " \n ",
    "\x00",
    "\x7f",
    "\u200d",
    "\ufeff",
)


@functools.cache
def _alphabets() -> tuple[tuple[int, int], ...]:
    """Ranges of code points whose words, digits and marks are cut differently."""
    return (
        (0x20, 0x7F), (0x30, 0x3A), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0x980),
        (0xE00, 0xE80), (0x1100, 0x1200), (0x2000, 0x2070), (0x2150, 0x2190), (0x3040, 0x3100), (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A4), (0xFF00, 0xFFF0), (0x1D7CE, 0x1D800), (0x1F300, 0x1F700), (0xE000, 0xE100), (0, 0xD800),
        (0xE000, 0x110000),
    )  # fmt: skip


def _run(rng: random.Random) -> str:
    """A few characters of one kind."""
    if (kind := rng.random()) < 0.2:
        return rng.choice(_SPACES)
    if kind < 0.25:
        return rng.choice(SPECIAL_TOKENS)
    start, end = rng.choice(_alphabets())
    return "".join(chr(rng.randrange(start, end)) for _ in range(rng.randint(1, 6)))
