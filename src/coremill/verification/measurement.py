"""Measurements of a running package: `main` at every length, then every other check.

`checklist.py` compares them with bounds.

Legend: T sequence length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from coremill.core.config import ConvertConfig, DistilledVerify, ImportedVerify, VerifyConfig
from coremill.core.contract import Contract, ShapeFailed, shape_key
from coremill.core.errors import CoremillError, PackageError, UnsupportedOperationError
from coremill.core.machine import release_memory
from coremill.core.reports import (
    Answer,
    Backend,
    ShapeError,
    ShapeReport,
    StatefulError,
    StatefulReport,
)
from coremill.data.prompts import Prompts, RowPrompts, TextPrompts
from coremill.measures import sqnr_db
from coremill.model.checkpoint import Checkpoint
from coremill.model.decoding import TemperatureSampler
from coremill.model.reference import Reference
from coremill.verification.backends import (
    Runner,
    core_ml_runner,
    core_ml_stateful_runner,
    has_core_ml,
    reference_runner,
    reference_stateful_runner,
)
from coremill.verification.cached_checks import MainRows, answer_greedily, measure_stateful
from coremill.verification.main_checks import (
    Heldout,
    Outputs,
    ShapeRun,
    ask_heldout,
    ask_sampled,
    causality_leak,
    measure_shape,
    padding_sqnr_db,
)
from coremill.verification.rounding import rounding_aside_db
from coremill.verification.scoring import Scorer

log = logging.getLogger(__name__)

_DECODED_TOKENS = 32
"""The number of a student's tokens that are decoded one by one; an imported model's configuration sets its own."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What running the package showed. A figure is None if the package does not run at the primary shape, or if
    nothing was compared."""

    shapes: dict[str, ShapeReport]
    load_problem: str | None = None
    """Why coremill.mil does not load the package."""
    operations: int | None = None
    """The number of operations that coremill.mil lowered."""
    leak: float | None = None
    """The largest change of an output before a token that changes."""
    padding_sqnr_db: float | None = None
    rounding_db: float | None = None
    """SQNR in float32 arithmetic against the checkpoint with rounded weights; see `rounding.py`."""
    rounding_problem: str | None = None
    """Why the package does not run in float32 arithmetic."""
    stateful: StatefulReport | None = None
    heldout: Heldout | None = None
    sampled: tuple[Answer, ...] = ()
    """The sampled answers of a student; the greedy answers of an imported model."""
    has_core_ml: bool
    """This machine runs Core ML: it is a Mac."""
    core_ml_sqnr_db: float | None = None
    """Core ML's logits against the reference backend's, at the worst length."""
    core_ml_problem: str | None = None


def measure(
    package: Path,
    contract: Contract,
    checkpoint: Checkpoint,
    prompts: Prompts,
    config: VerifyConfig,
    *,
    stateful: bool,
    settings: ConvertConfig,
) -> Measurement:
    """Run the package at every length of the contract and, if it runs at the primary length, every other check.

    Args:
        stateful: whether to run the functions with a cache, if the contract has any.
        settings: those of the conversion.
    """
    try:
        runner = reference_runner(package, contract)
    except (PackageError, UnsupportedOperationError) as failure:
        error = ShapeError(backend=Backend.MIL_REFERENCE, error=f"the package does not load: {failure.found}")
        log.warning("%s", error.error)
        return Measurement(
            shapes={shape_key(seq_len): error for seq_len in contract.shapes.all},
            load_problem=failure.found,
            has_core_ml=has_core_ml(),
        )
    reference = Reference.of(checkpoint)
    _run_ahead(reference, prompts, contract.working_lengths)
    shapes = _Shapes(runner, contract, reference, prompts, config)
    core_ml = _CoreML(package, contract)
    for seq_len in contract.shapes.all:
        shapes.measure(seq_len, core_ml)
        release_memory()
    if contract.shapes.primary not in shapes.running:
        return Measurement(shapes=shapes.reports, operations=runner.operations, has_core_ml=has_core_ml())
    asked = stateful and bool(contract.functions)
    functions, answers = (
        _measure_stateful(package, contract, shapes.main, reference, prompts, config) if asked else (None, ())
    )
    if asked:
        core_ml.compare_stateful(package, contract, shapes.main, prompts.pad_id)
    heldout = None
    if isinstance(prompts, RowPrompts) and isinstance(config, DistilledVerify):
        scorer = Scorer(runner, shapes.running, prompts.pad_id)
        heldout = ask_heldout(scorer, prompts.rows[: config.heldout_answers], prompts.tokenizer, prompts.answer_key)
        sampler = TemperatureSampler(1.0, config.sampling_seed)
        questions = prompts.rows[: config.sampled_answers]
        answers = ask_sampled(scorer, questions, prompts.tokenizer, prompts.answer_key, sampler)
    core_ml_sqnr_db, core_ml_problem = core_ml.result()
    release_memory()
    padding_db = padding_sqnr_db(runner, reference, prompts, shapes.running)
    rounding_db, rounding_problem = _rounding(package, contract, checkpoint, prompts, settings)
    return Measurement(
        shapes=shapes.reports,
        operations=runner.operations,
        leak=shapes.leak,
        padding_sqnr_db=padding_db,
        rounding_db=rounding_db,
        rounding_problem=rounding_problem,
        stateful=functions,
        heldout=heldout,
        sampled=answers,
        has_core_ml=has_core_ml(),
        core_ml_sqnr_db=core_ml_sqnr_db,
        core_ml_problem=core_ml_problem,
    )


def _run_ahead(reference: Reference, prompts: Prompts, lengths: Sequence[int]) -> None:
    """Run all sequences of the checks through the reference at once; it remembers them."""
    sequences = [list(compared.ids) for seq_len in lengths for compared in prompts.compared(seq_len)]
    sequences += [list(ids) for ids in prompts.padded(lengths)]
    reference.score_all(sequences)


def _rounding(
    package: Path, contract: Contract, checkpoint: Checkpoint, prompts: Prompts, settings: ConvertConfig
) -> tuple[float | None, str | None]:
    """Return the result of :func:`rounding_aside_db`, or the reason why it could not be measured."""
    try:
        return rounding_aside_db(package, contract, checkpoint, prompts, settings), None
    except CoremillError as failure:
        return None, f"in float32 arithmetic: {failure.found}"
    except (RuntimeError, ValueError) as failure:  # from the backend, or because outputs are not finite
        return None, f"in float32 arithmetic: {type(failure).__name__}: {failure}"


class _Shapes:
    """The measurements of `main` at each length. Of its outputs, up to 800 MB, only those needed later are kept."""

    def __init__(
        self, runner: Runner, contract: Contract, reference: Reference, prompts: Prompts, config: VerifyConfig
    ) -> None:
        self._runner, self._contract, self._reference, self._prompts = runner, contract, reference, prompts
        self._config = config
        self._leaks: list[float] = []
        self._shorter: ShapeRun | None = None
        self.reports: dict[str, ShapeReport] = {}
        self.running: list[int] = []
        """The lengths at which the package runs."""
        self.main: MainRows
        """At the longest of them: the reference for the functions with a cache."""

    def measure(self, seq_len: int, core_ml: _CoreML) -> None:
        exported = self._contract.shape_validation[shape_key(seq_len)]
        if isinstance(exported, ShapeFailed):
            error = f"skipped, because it failed at export: {exported.error}"
            self.reports[shape_key(seq_len)] = ShapeError(backend=self._runner.backend, error=error)
            log.warning("%s: %s", shape_key(seq_len), error)
            return
        margin = self._config.argmax_margin
        run = measure_shape(self._runner, self._reference, self._prompts, seq_len, margin=margin)
        self.reports[shape_key(seq_len)] = run.report
        _log_shape(shape_key(seq_len), run.report)
        if isinstance(run.report, ShapeError):
            return
        self.running.append(seq_len)
        probes = self._prompts.probes(seq_len)
        if (leak := causality_leak(self._runner, probes, run, self._shorter)) is not None:
            self._leaks.append(leak)
        self._shorter = run
        for ids, _ in probes:
            core_ml.compare(ids, run, self._runner)
        if seq_len == max(self.running):
            decoded = self._config.decoded_tokens if isinstance(self._config, ImportedVerify) else _DECODED_TOKENS
            self.main = MainRows(run.ids, run.outputs, self._contract.working_lengths, decoded)

    @property
    def leak(self) -> float | None:
        """The largest leak at any length; None if nothing was compared."""
        return float(np.max(self._leaks)) if self._leaks else None  # unlike Python's max, NaN if there is one


def _measure_stateful(
    package: Path,
    contract: Contract,
    main: MainRows,
    reference: Reference,
    prompts: Prompts,
    config: VerifyConfig,
) -> tuple[StatefulReport, tuple[Answer, ...]]:
    """Measure the functions with a cache, and answer questions through them if the model is imported."""
    try:
        runner = reference_stateful_runner(package, contract, pad_id=prompts.pad_id)
    except (PackageError, UnsupportedOperationError) as failure:
        error = f"the functions do not load: {failure.found}"
        log.warning("prefill and decode: %s", error)
        return StatefulError(backend=Backend.MIL_REFERENCE, error=error), ()
    report = measure_stateful(runner, main)
    _log_stateful(report)
    if isinstance(report, StatefulError) or not isinstance(prompts, TextPrompts):
        return report, ()
    try:
        return report, answer_greedily(runner, reference, prompts, margin=config.argmax_margin)
    except (RuntimeError, ValueError) as failure:  # from the backend, or because logits have no largest
        error = f"no answer to a question: {type(failure).__name__}: {failure}"
        return StatefulError(backend=runner.backend, error=error), ()


class _CoreML:
    """Core ML's outputs against the reference backend's; does nothing without Core ML."""

    def __init__(self, package: Path, contract: Contract) -> None:
        self._ratios: list[float] = []
        self._problem: str | None = None
        self._runner: Runner | None = None
        if has_core_ml():
            self._trying(lambda: self._load(package, contract))

    def _load(self, package: Path, contract: Contract) -> None:
        self._runner = core_ml_runner(package, contract)

    def compare(self, ids: Sequence[int], known: ShapeRun, reference: Runner) -> None:
        """Run `ids` and compare; `known` holds the reference backend's outputs for one sequence."""
        runner = self._runner
        if runner is None or self._problem is not None:
            return

        def run() -> None:
            expected: Outputs = known.outputs if ids == known.ids else reference.run(ids)
            found = runner.run(ids)
            self._ratios += [sqnr_db(expected[name], found[name]) for name in expected]

        self._trying(run)

    def compare_stateful(self, package: Path, contract: Contract, main: MainRows, pad_id: int) -> None:
        """Run the functions with a cache and compare them with the reference backend's `main`."""
        if self._runner is None or self._problem is not None:
            return

        def run() -> None:
            report = measure_stateful(core_ml_stateful_runner(package, contract, pad_id=pad_id), main)
            if isinstance(report, StatefulError):
                self._problem = f"Core ML: {report.error}"
            else:
                self._ratios += [report.prefill_sqnr_db, report.decode_sqnr_db, report.continued_sqnr_db]

        self._trying(run)

    def _trying(self, run: Callable[[], None]) -> None:
        try:
            run()
        except (CoremillError, RuntimeError) as failure:  # Core ML's binding raises RuntimeError
            self._problem = f"Core ML: {failure}"

    def result(self) -> tuple[float | None, str | None]:
        """Return the worst SQNR, or the problem; (None, None) off macOS."""
        if self._problem is not None or not has_core_ml():
            return None, self._problem
        return (float(np.min(self._ratios)), None) if self._ratios else (None, "Core ML: nothing was compared")


def _log_shape(key: str, shape: ShapeReport) -> None:
    if isinstance(shape, ShapeError):
        log.warning("%s: %s", key, shape.error)
        return
    log.info(
        "%s: ok, SQNR %.1f dB, KL %.2g nats, top-1 %.2f %% of %d positions, %d excluded",
        key,
        shape.sqnr_db,
        shape.kl_nats,
        100 * shape.top1_agreement,
        shape.positions,
        shape.excluded,
    )
    if shape.perplexity is not None:
        found = shape.perplexity
        log.info("%s: perplexity %.4f, the checkpoint's %.4f", key, found.measured, found.reference)


def _log_stateful(report: StatefulReport) -> None:
    if isinstance(report, StatefulError):
        log.warning("prefill and decode: %s", report.error)
        return
    log.info(
        "prefill and decode: SQNR %.1f dB of %d prompts, %.1f dB of %d tokens after them, %.1f dB of %d one by one",
        report.prefill_sqnr_db,
        report.prefills,
        report.continued_sqnr_db,
        report.continued,
        report.decode_sqnr_db,
        report.decoded,
    )
