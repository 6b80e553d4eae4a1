"""Compares GGUF files under llama.cpp with the checkpoint in torch, on real prompts.

Compared are logits, greedy tokens, the ids of texts and, for a distilled model, the answers to held-out questions.
The outputs of a float32 file must match up to rounding; those of a quantised file may differ, and by how much is
reported. The contents of each file are compared as well: :mod:`coremill.formats.gguf.contents`.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from coremill.core.answer_key import AnswerKey
from coremill.core.config import GgufType
from coremill.core.digest import file_digest
from coremill.core.errors import GgufError, ParityError
from coremill.core.gates import Gate, Severity, at_most
from coremill.core.machine import available_memory_bytes
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
from coremill.data.prompts import Prompts, RowPrompts
from coremill.data.rows import Row
from coremill.formats.gguf.contents import (
    prompt_differences,
    setting_differences,
    vocabulary_differences,
    weights_err,
)
from coremill.formats.gguf.reader import GgufWeights
from coremill.formats.llamacpp.process import LlamaCpp
from coremill.formats.parity import greedy_differences, none_of, questions, sequences, texts
from coremill.measures import kl_nats
from coremill.model.checkpoint import Checkpoint
from coremill.model.decoding import generate, greedy
from coremill.model.float32 import Float32Bounds
from coremill.model.reference import Reference, Scores
from coremill.model.student import LOGITS
from coremill.text.model_tokenizer import TextTokenizer
from coremill.text.student_tokenizer import Tokenizer

log = logging.getLogger(__name__)

COPIES = 3
"""Copies of the weights in memory for each file that is measured: as stored, in float32, and in a model."""
LISTED = 8
"""The number of tokenizer mismatches that a report lists."""
_ARITHMETIC_POSITIONS = 512
"""The approximate number of positions for `arithmetic_kl_nats`: torch runs the model again for each file."""
_ROWS = 32
"""Positions whose logits are converted to float64 at a time."""
MAX_NEW_TOKENS = 96
"""No answer of a toy's teacher is longer; an answer that does not end by then is not exact."""

_REMAKE = "python -m coremill.conversion.export_gguf --help"


def require_parity(report: GgufParity) -> None:
    """Check that every figure is within its bound.

    Raises:
        ParityError: names each figure that is not.
    """
    if failures := list(report.failures()):
        raise ParityError(
            "; ".join(failures), expected="outputs and metadata that match the checkpoint within the bounds"
        )


# --- bounds --------------------------------------------------------------------------------


class _Bound(NamedTuple):
    limit: float
    source: str


_FLOAT32 = "float32's rounding, as in the export to Core ML"
_FLOAT16 = "float16's rounding, of weights and of activations: measured 4.4e-6 on SmolLM2-135M"
_CONTRACT = "specified for this type"
_ACTIVATIONS = "llama.cpp rounds activations to 8 bits there: measured 8e-4 on the toy, 2.7e-3 on SmolLM2-135M"
_STORED = "the rounding of the type"
_RUINED = "allows for few bits: a file with Q and K in the wrong order has 1.8 or more"
_QUANTISED: tuple[GgufType, ...] = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
BOUNDS: Mapping[tuple[GgufType, Measure], _Bound] = {
    ("f16", "kl_nats"): _Bound(1e-4, _FLOAT16),
    **{(kind, "kl_nats"): _Bound(1.0, _RUINED) for kind in _QUANTISED},
    ("q8_0", "kl_nats"): _Bound(5e-3, _CONTRACT),
    **{(kind, "arithmetic_kl_nats"): _Bound(1e-2, _ACTIVATIONS) for kind in _QUANTISED},
}
"""The bounds besides that of float32's relative error, which :class:`Float32Bounds` gives. The largest error of
float16 grows with the number of layers; it is only reported, and the mean KL has a bound."""
_EXACT: frozenset[GgufType] = frozenset({"f32", "f16"})
"""The types whose answers must equal the checkpoint's."""
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


# --- inputs, and the checkpoint's outputs
# ----------------------------------------------------------------------------------


class _Scope(NamedTuple):
    """How much of each file is compared."""

    greedy_prompts: int
    greedy_tokens: int
    questions: int


_QUICK = _Scope(4, 64, 64)
_FULL = _Scope(20, 256, 1024)


class _Heldout(NamedTuple):
    """Questions of the dataset, and what judges the answers."""

    rows: Sequence[Row]
    tokenizer: Tokenizer
    key: AnswerKey


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The inputs for every file, and the checkpoint's outputs."""

    sequences: list[list[int]]
    """Token ids."""
    scores: list[Scores]
    """The checkpoint's outputs for each sequence."""
    prompts: list[list[int]]
    greedy_tokens: int
    texts: list[str]
    tokenizer: TextTokenizer
    heldout: _Heldout | None
    """None for an imported model."""
    context: int
    bounds: Float32Bounds
    """Those of float32's error."""


def measure_gguf(
    files: Mapping[GgufType, Path], checkpoint: Checkpoint, prompts: Prompts, *, checkpoint_digest: str, quick: bool
) -> GgufParity:
    """Run each file in llama.cpp and compare it with the checkpoint's model in torch's float32.

    Args:
        files: by the type of their matrices.
        prompts: of the checkpoint's own tokenizer.
        checkpoint_digest: the digest of the checkpoint's file.
        quick: compare only a few greedy tokens and held-out questions, for a build.

    Raises:
        CheckpointUnreadableError, CheckpointContentError, UnsupportedModelError: a file is broken.
        GgufError: llama.cpp does not load a file, or the file is of another model.
        DatasetError: the texts are too short.
    """
    scope = _QUICK if quick else _FULL
    reference = Reference.of(checkpoint)
    plan = _plan(scope, checkpoint.config.max_seq_len, reference, prompts)
    measured: dict[str, FileParity] = {}
    at_once = files_at_once(len(files), checkpoint)
    threads = max(1, (os.cpu_count() or 1) // at_once)  # for each process of llama.cpp
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        found = pool.map(
            lambda file: _measure_file(file[0], Path(file[1]), checkpoint, reference, plan, threads), files.items()
        )
        for (kind, path), file in zip(files.items(), found, strict=True):
            measured[kind] = file
            figures = ", ".join(f"{figure.name} {figure.measured:.3g}" for figure in file.figures)
            log.info("%s: %s", path.name, figures)
            for prompt in file.prompts:
                log.warning("%s: %s is %s, not %s", path.name, prompt.name, prompt.found, prompt.expected)
    return GgufParity(
        checkpoint_digest=checkpoint_digest,
        model_type=checkpoint.model_type,
        xllamacpp=importlib.metadata.version("xllamacpp"),
        quick=quick,
        files=measured,
        passed=all(figure.outcome != "failed" for file in measured.values() for figure in file.figures),
    )


def files_at_once(count: int, checkpoint: Checkpoint) -> int:
    """Return how many of `count` files are measured at a time, limited by processors and memory."""
    weights = 4 * sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    fitting = available_memory_bytes() // (COPIES * weights)
    return int(max(1, min(count, os.cpu_count() or 1, fitting)))


def _plan(scope: _Scope, context: int, reference: Reference, prompts: Prompts) -> _Plan:
    compared = sequences(prompts, context)
    prompt_ids = questions(prompts, context, scope.greedy_prompts)
    longest = max(*map(len, compared), *(len(ids) + max(scope.greedy_tokens, MAX_NEW_TOKENS) for ids in prompt_ids))
    return _Plan(
        sequences=compared,
        scores=reference.score_all(compared),
        prompts=prompt_ids,
        greedy_tokens=scope.greedy_tokens,
        texts=texts(prompts, prompts.text_tokenizer),
        tokenizer=prompts.text_tokenizer,
        heldout=_Heldout(prompts.rows[: scope.questions], prompts.tokenizer, prompts.answer_key)
        if isinstance(prompts, RowPrompts)
        else None,
        context=min(context, longest),
        bounds=Float32Bounds(reference, compared),
    )


# --- one file ---------------------------------------------------------------------------------------


def _measure_file(
    kind: GgufType, path: Path, checkpoint: Checkpoint, reference: Reference, plan: _Plan, threads: int
) -> FileParity:
    source = GgufWeights(path)
    for name, what in (("vocab_size", "tokens"), ("max_seq_len", "positions")):
        if (found := getattr(source.config, name)) != (expected := getattr(checkpoint.config, name)):
            raise GgufError(
                f"{path} has {found} {what}, the checkpoint's model {expected}",
                expected="a file that was made from the checkpoint",
                run=_REMAKE,
            )
    with LlamaCpp(path, context=plan.context, threads=threads) as llamacpp:
        weights = weights_err(source, checkpoint)
        settings = setting_differences(kind, source, checkpoint, plan.tokenizer, llamacpp)
        prompts = list(prompt_differences(llamacpp, plan.tokenizer))
        own = None if kind in _EXACT else _with_weights(checkpoint, source)
        compared = _compare(llamacpp, own, plan)
        figures = [_figure(name, value, _bound(kind, name, value, plan)) for name, value in compared.items()]
        figures.append(_figure("weights_err", weights, _Bound(1, _STORED)))
        figures.append(_figure("settings", len(settings), _Bound(0, "the checkpoint and its tokenizer")))
        differences, greedy_tokens = _greedy(llamacpp, reference, plan) if kind == "f32" else ([], 0)
        if kind == "f32":
            beyond = sum(not difference.is_tie for difference in differences)
            figures.append(_figure("greedy_differences", beyond, _Bound(0, "torch's own greedy tokens")))
        mismatches = list(_mismatches(llamacpp, plan.tokenizer, plan.texts))
        texts = len({mismatch.text for mismatch in mismatches})
        figures.append(_figure("tokenizer_mismatches", texts, _Bound(0, "the tokenizer of the checkpoint")))
        if plan.heldout:
            figures.append(_heldout(llamacpp, reference, plan.heldout, plan.context, bounded=kind in _EXACT))
    return FileParity(
        file=path.name,
        digest=file_digest(path),
        size_bytes=path.stat().st_size,
        positions=sum(map(len, plan.sequences)),
        greedy_prompts=len(plan.prompts) if kind == "f32" else 0,
        greedy_tokens=greedy_tokens,
        heldout_questions=len(plan.heldout.rows) if plan.heldout else 0,
        figures=tuple(figures),
        differences=tuple(differences),
        mismatches=tuple(mismatches[:LISTED]),
        settings=tuple(settings),
        prompts=tuple(prompts),
    )


def _bound(kind: GgufType, name: Measure, measured: float, plan: _Plan) -> _Bound | None:
    """Return the bound of a figure of the logits, or None if it is only reported."""
    if (kind, name) == ("f32", "relative_err"):
        limit, reason = plan.bounds.bound(LOGITS, measured)
        return _Bound(limit, reason or _FLOAT32)
    return BOUNDS.get((kind, name))


def _with_weights(checkpoint: Checkpoint, source: GgufWeights) -> Reference:
    """The checkpoint's model with the weights of a file, dequantised one at a time, and without a halt head."""
    arch = msgspec.structs.replace(checkpoint.config.arch, use_halt_head=False)
    return Reference(msgspec.structs.replace(checkpoint.config, arch=arch), source.tensors)


def _compare(llamacpp: LlamaCpp, own: Reference | None, plan: _Plan) -> dict[Measure, float]:
    """The figures of the logits; `own` is the model with the file's own weights, if these are rounded."""
    error, largest, kl, same = 0.0, 0.0, 0.0, 0
    own_kl, own_count = 0.0, 0
    repeated = _first(plan.sequences, _ARITHMETIC_POSITIONS) if own is not None else 0
    rounded = own.score_all(plan.sequences[:repeated]) if own is not None else []
    for index, (ids, scores) in enumerate(zip(plan.sequences, plan.scores, strict=True)):
        found = llamacpp.logits(ids)
        for rows, outputs in scores.chunks():
            expected = outputs[LOGITS]
            error = max(error, float(np.abs(found[rows] - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
            kl += float(kl_nats(expected, found[rows]).sum())
            same += int((found[rows].argmax(-1) == expected.argmax(-1)).sum())
        if index < repeated:
            own_kl += sum(
                float(kl_nats(outputs[LOGITS], found[rows]).sum()) for rows, outputs in rounded[index].chunks()
            )
            own_count += len(ids)
    count = sum(map(len, plan.sequences))
    figures: dict[Measure, float] = {
        "max_abs_err": error,
        "relative_err": error / largest if largest else error,
        "kl_nats": kl / count,
        "top1_agreement": same / count,
    }
    if own is not None:
        figures["arithmetic_kl_nats"] = own_kl / own_count
    return figures


def _first(sequences: Sequence[Sequence[int]], positions: int) -> int:
    """Return how many sequences have at least `positions` tokens together."""
    counts = itertools.accumulate(map(len, sequences))
    return next((number for number, count in enumerate(counts, 1) if count >= positions), len(sequences))


def _greedy(llamacpp: LlamaCpp, reference: Reference, plan: _Plan) -> tuple[list[TokenDifference], int]:
    """The greedy tokens that are not torch's choice after the same tokens, and the number of all greedy tokens."""
    found: list[TokenDifference] = []
    count = 0
    for number, ids in enumerate(plan.prompts):
        tokens = llamacpp.generate(ids, min(plan.greedy_tokens, plan.context - len(ids)), ())
        found += greedy_differences(number, tokens, _following(reference, ids, tokens), plan.bounds)
        count += len(tokens)
    return found, count


def _heldout(
    llamacpp: LlamaCpp, reference: Reference, heldout: _Heldout, context: int, *, bounded: bool
) -> ParityFigure:
    """The share of held-out questions whose answer is exact; if `bounded`, at least the checkpoint's own share."""
    rows, tokenizer, key = heldout
    exact, own = 0, 0
    for row in rows:
        prompt = tokenizer.encode_prompt(row.prompt)
        max_new_tokens = min(MAX_NEW_TOKENS, context - len(prompt))
        answer = llamacpp.generate(prompt, max_new_tokens, {tokenizer.end_id})
        is_exact = judge(row, tokenizer.decode_answer(answer), key).exact
        exact += is_exact
        if bounded:
            own += (
                is_exact
                if _is_own(reference, prompt, answer)
                else _own_exact(reference, row, tokenizer, key, max_new_tokens)
            )
    share = exact / len(rows)
    bound = _Bound(own / len(rows), "the checkpoint's own share in torch") if bounded else None
    return _figure("heldout_exact", share, bound)


def _following(reference: Reference, prompt: Sequence[int], answer: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the checkpoint's logits (A, V) before each of the A tokens of an answer."""
    return reference.score([*prompt, *answer[:-1]]).at(slice(len(prompt) - 1, None))[LOGITS]


def _is_own(reference: Reference, prompt: list[int], answer: list[int]) -> bool:
    """Whether the checkpoint gives the same answer: each token is its choice after the ones before."""
    best = _following(reference, prompt, answer).argmax(-1)
    return bool((best == answer).all())


def _own_exact(reference: Reference, row: Row, tokenizer: Tokenizer, key: AnswerKey, max_new_tokens: int) -> bool:
    answer = generate(
        reference.next_logits,
        tokenizer.encode_prompt(row.prompt),
        stop_ids={tokenizer.end_id},
        max_new_tokens=max_new_tokens,
        sampler=greedy,
    )
    return judge(row, tokenizer.decode_answer(answer), key).exact


# --- tokenizers -------------------------------------------------------------------------------------


def _mismatches(llamacpp: LlamaCpp, tokenizer: TextTokenizer, texts: Sequence[str]) -> Iterator[TokenizerMismatch]:
    for given in texts:
        text = tokenizer.normalize(given)  # llama.cpp does not normalise Unicode
        for allow_special in (False, True):
            ours = tokenizer.encode(text, allow_special=allow_special)
            theirs = llamacpp.tokenize(text, allow_special=allow_special)
            if ours != theirs:
                yield TokenizerMismatch(
                    text=text, allow_special=allow_special, ids=tuple(ours), llamacpp_ids=tuple(theirs)
                )


# --- the source of an import ------------------------------------------------------------------------


def compare_source(
    source: GgufWeights, reference: Reference, prompts: Prompts, compared: Sequence[Sequence[int]]
) -> tuple[Gate, ...]:
    """Run a file that coremill did not write in llama.cpp; return the gates on logits, token ids and vocabulary.

    Args:
        reference: the model with the file's dequantised weights.
        prompts: of the file's tokenizer.
        compared: the sequences whose logits are compared.

    Raises:
        GgufError: llama.cpp does not load the file.
    """
    tokenizer = prompts.text_tokenizer
    with LlamaCpp(source.path, context=max(map(len, compared)), threads=os.cpu_count() or 1) as llamacpp:
        logits = _source_logits(source, reference, llamacpp, compared)
        given = texts(prompts, tokenizer)
        wrong = [mismatch.text for mismatch in _mismatches(llamacpp, tokenizer, given)]
        odd = [
            f"{each.name}: {each.found} instead of {each.expected}"
            for each in vocabulary_differences(llamacpp, tokenizer)
        ]
    return (
        logits,
        none_of("texts that are tokenized differently", wrong, len(given)),
        none_of("settings of the vocabulary that differ", odd, len(odd)),
    )


def _source_logits(
    source: GgufWeights, reference: Reference, llamacpp: LlamaCpp, compared: Sequence[Sequence[int]]
) -> Gate:
    """Return the gate on the logits: float32's have the bound of rounding, others that of rounded activations."""
    error, largest, kl = 0.0, 0.0, 0.0
    for ids, scores in zip(compared, reference.score_all(compared), strict=True):
        found = llamacpp.logits(ids)
        for rows, outputs in scores.chunks():
            expected = outputs[LOGITS]
            error = float(np.maximum(error, np.abs(found[rows] - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
            kl += float(kl_nats(expected, found[rows]).sum())
    if source.dtypes[0] == "F32":
        relative = error / largest
        bound = Float32Bounds(reference, compared).bound(LOGITS, relative)
        return bound.finding(relative).gate("relative error of logits", Severity.MUST)
    kind: GgufType = "f16" if source.dtypes[0] == "F16" else "q8_0"
    limit, _ = BOUNDS[(kind, "kl_nats" if kind == "f16" else "arithmetic_kl_nats")]
    return at_most(kl / sum(map(len, compared)), limit).gate("KL divergence of logits", Severity.MUST)
