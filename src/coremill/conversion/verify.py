"""The verification of a package: what is read, measured and reported; see `verify_contract.py`.

Legend: T sequence length.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from packaging.version import InvalidVersion, Version

from coremill.conversion.backends import Runner, core_ml_runner, has_core_ml, reference_runner
from coremill.conversion.checklist import Evidence, Facts, evaluate, evaluate_failure
from coremill.conversion.checks import (
    Heldout,
    Reference,
    ask_heldout,
    ask_sampled,
    causality_leak,
    measure_shape,
    padding_sqnr_db,
)
from coremill.conversion.graph import check_main
from coremill.conversion.interface import differences, package_interface
from coremill.conversion.package import PackageFacts, check_package, read_spec
from coremill.conversion.scoring import Scorer
from coremill.conversion.sequences import packed, read_some
from coremill.core import layout
from coremill.core.config import VerifyConfig
from coremill.core.contract import Contract, ShapeFailed, read_contract, shape_key
from coremill.core.diagnostics import ConversionDiagnostics, ConversionFailure
from coremill.core.digest import digest, file_digest, size_bytes
from coremill.core.documents import read_json, write_json
from coremill.core.errors import ContractMismatchError, CoremillError, PackageError, UnsupportedOperationError
from coremill.core.gates import Outcome, gates_ok
from coremill.core.reports import Answer, Backend, ShapeError, ShapeMeasured, ShapeReport, VerificationReport
from coremill.core.stage import Figures
from coremill.data import magic_8_ball
from coremill.data.rows import Row
from coremill.data.tokenizer import Tokenizer
from coremill.mil.measures import sqnr_db
from coremill.model.checkpoint import Checkpoint, build_student, check_vocabulary, load_checkpoint

log = logging.getLogger(__name__)

_CAUSALITY_SEQUENCES = 2
_PADDED_CONVERSATIONS = 8


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is verified, and with what."""

    run: str
    package: Path
    contract: Path
    checkpoint: Path
    tokenizer: Path
    heldout: Path


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What running the package showed; None and () where it does not run at the primary shape."""

    shapes: dict[str, ShapeReport]
    load_problem: str | None = None
    operations: int | None = None
    leak: float | None = None
    padding_sqnr_db: float | None = None
    heldout: Heldout | None = None
    sampled: tuple[Answer, ...] = ()
    core_ml_sqnr_db: float | None = None
    core_ml_problem: str | None = None


def verify_to(out: Path, subject: Subject, config: VerifyConfig) -> VerificationReport:
    """Verify a package and write the report to `out`, whether or not the gates pass; raises as :func:`verify`."""
    report = verify(subject, config)
    write_json(out, report)
    _log(report)
    return report


def verify(subject: Subject, config: VerifyConfig) -> VerificationReport:
    """Verify a package; of the record of a failed conversion, every gate fails.

    Raises:
        DocumentError, SchemaVersionError: the contract is not one.
        ContractMismatchError: the contract is not that of a graph `main`, or does not say which torch exported it.
        PackageError: the package is missing, or a part of it.
        DigestError: a part of it was altered after it was saved.
        CoremillError: the checkpoint, the tokenizer or the held-out set does not read, or does not fit.
    """
    contract = read_contract(subject.contract)
    check_main(contract)
    lane = lane_of(contract)
    checkpoint = load_checkpoint(subject.checkpoint)
    tokenizer = Tokenizer.load(subject.tokenizer)
    check_vocabulary(checkpoint, tokenizer)
    rows = read_some(subject.heldout, max(config.heldout_answers, config.sampled_answers))
    facts = Facts(
        model_type=checkpoint.model_type,
        has_halt_head=checkpoint.model_arch.use_halt_head,
        asks_moods=any(row.metadata.get("kind") == magic_8_ball.KIND for row in rows),
    )
    if (record := find_failure(subject.package)) is not None:
        return _report_failure(subject, config, contract, record, facts, lane)
    saved = check_package(subject.package)
    student = build_student(checkpoint)
    measured = measure(subject.package, contract, Reference(student), rows, tokenizer, config)
    diagnostics, diagnostics_problem = _diagnostics(subject.package)
    gates = evaluate(
        Evidence(
            subject=facts,
            contract=contract,
            config=config,
            graph_problem=_graph_problem(subject.contract.parent / contract.graph, contract),
            checkpoint_problem=_differs(
                "the checkpoint", file_digest(subject.checkpoint), contract.checkpoint_digest
            ),
            contract_problem=_contract_problem(subject.contract, contract, saved, checkpoint),
            diagnostics=diagnostics,
            diagnostics_problem=diagnostics_problem,
            interface_problems=_interface_problems(subject.package, contract),
            load_problem=measured.load_problem,
            operations=measured.operations,
            shapes=measured.shapes,
            leak=measured.leak,
            padding_sqnr_db=measured.padding_sqnr_db,
            heldout=measured.heldout,
            sampled=measured.sampled,
            has_core_ml=has_core_ml(),
            core_ml_sqnr_db=measured.core_ml_sqnr_db,
            core_ml_problem=measured.core_ml_problem,
            parameters=student.n_parameters,
            package_bytes=size_bytes(subject.package),
        )
    )
    return VerificationReport(
        run=subject.run,
        lane=lane,
        model_type=checkpoint.model_type,
        package_digest=digest(subject.package),
        contract_digest=file_digest(subject.contract),
        primary=shape_key(contract.shapes.primary),
        shapes=measured.shapes,
        heldout=None if measured.heldout is None else measured.heldout.answers,
        sampled_seed=config.sampling_seed,
        sampled=measured.sampled,
        gates=gates,
        gates_ok=gates_ok(gates),
    )


def lane_of(contract: Contract) -> str:
    """The lane of a contract: the release of torch that exported its graph, `2.9.1` for a build `2.9.1+cpu`.

    Raises:
        ContractMismatchError: its toolchain names no version of torch.
    """
    found = contract.toolchain.packages.get("torch")
    try:
        return Version(found or "").public
    except InvalidVersion as failure:
        raise ContractMismatchError(
            f"the contract's toolchain has torch {found!r}",
            expected="the version of torch that exported the graph",
            run="python -m coremill.conversion.export_pytorch --help",
        ) from failure


def measure(
    package: Path,
    contract: Contract,
    reference: Reference,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    config: VerifyConfig,
) -> Measured:
    """Run the package at every length of the contract, and, where it runs at the primary one, ask it questions."""
    shapes: dict[str, ShapeReport]
    try:
        runner = reference_runner(package, contract)
    except (PackageError, UnsupportedOperationError) as failure:
        error = ShapeError(backend=Backend.MIL_REFERENCE, error=f"the package does not load: {failure.found}")
        shapes = {shape_key(seq_len): error for seq_len in contract.shapes.all}
        return Measured(shapes=shapes, load_problem=failure.found)
    shapes = {}
    for seq_len in contract.shapes.all:
        exported = contract.shape_validation[shape_key(seq_len)]
        if isinstance(exported, ShapeFailed):
            shapes[shape_key(seq_len)] = ShapeError(
                backend=runner.backend, error=f"left out, because it failed at export: {exported.error}"
            )
        else:
            shapes[shape_key(seq_len)] = measure_shape(
                runner, reference, rows, tokenizer, seq_len, margin=config.argmax_margin
            )
    running = [seq_len for seq_len in contract.shapes.all if isinstance(shapes[shape_key(seq_len)], ShapeMeasured)]
    if contract.shapes.primary not in running:
        return Measured(shapes=shapes, operations=runner.operations)
    scorer = Scorer(runner, running, tokenizer.pad_id)
    probes = [ids for seq_len in running for ids in packed(rows, tokenizer, seq_len, _CAUSALITY_SEQUENCES)]
    core_ml_sqnr_db, core_ml_problem = _core_ml(package, contract, runner, probes)
    return Measured(
        shapes=shapes,
        operations=runner.operations,
        leak=causality_leak(runner, probes, tokenizer),
        padding_sqnr_db=padding_sqnr_db(runner, reference, rows[:_PADDED_CONVERSATIONS], tokenizer, running),
        heldout=ask_heldout(scorer, rows[: config.heldout_answers], tokenizer),
        sampled=ask_sampled(scorer, rows[: config.sampled_answers], tokenizer, config),
        core_ml_sqnr_db=core_ml_sqnr_db,
        core_ml_problem=core_ml_problem,
    )


def find_failure(package: Path) -> ConversionFailure | None:
    """The record of a failed conversion where `package` should be: given as the package, or lying beside it."""
    record = layout.placeholder_file(package.parent)
    if not record.is_file():
        return None
    failure = read_json(record, ConversionFailure)
    return failure if package.name in (record.name, failure.package) else None


def _core_ml(
    package: Path, contract: Contract, runner: Runner, sequences: Sequence[Sequence[int]]
) -> tuple[float | None, str | None]:
    """The worst SQNR of Core ML's own outputs against the reference backend's, and what went wrong instead."""
    if not has_core_ml():
        return None, None
    ratios = []
    try:
        core_ml = core_ml_runner(package, contract)
        for ids in sequences:
            found, expected = core_ml.run(ids), runner.run(ids)
            ratios += [sqnr_db(expected[name], found[name]) for name in expected]
    except (CoremillError, RuntimeError) as failure:  # Core ML's binding raises RuntimeError
        return None, f"Core ML: {failure}"
    return (float(np.min(ratios)), None) if ratios else (None, "Core ML: nothing was compared")


def _diagnostics(package: Path) -> tuple[ConversionDiagnostics | None, str | None]:
    """The diagnostics of this very package, or why there are none."""
    path = layout.diagnostics_file(package.parent)
    if not path.is_file():
        return None, f"there is no {path.name} beside the package"
    diagnostics = read_json(path, ConversionDiagnostics)
    problem = _differs(f"the package that {path.name} describes", diagnostics.package_digest, digest(package))
    return (None, problem) if problem else (diagnostics, None)


def _graph_problem(graph: Path, contract: Contract) -> str | None:
    if not graph.is_file():
        return f"there is no {graph.name} beside the contract"
    return _differs("the exported program", file_digest(graph), contract.graph_digest)


def _differs(what: str, found: str, recorded: str) -> str | None:
    return None if found == recorded else f"{what} is {found}, not {recorded}"


def _contract_problem(path: Path, contract: Contract, package: PackageFacts, checkpoint: Checkpoint) -> str | None:
    """Why the contract is not the one that the package was made from, or not the checkpoint's."""
    problems = [_differs("the contract", file_digest(path), package.contract_digest)]
    for name in ("model_type", "model_arch", "tokenizer"):
        promised, found = getattr(contract, name), getattr(checkpoint, name)
        if promised != found:
            problems.append(f"{name}: the contract says {promised!r}, the checkpoint {found!r}")
    return "; ".join(problem for problem in problems if problem) or None


def _interface_problems(package: Path, contract: Contract) -> tuple[str, ...]:
    try:
        return differences(contract, package_interface(read_spec(package)))
    except PackageError as failure:
        return (failure.found,)


def _report_failure(
    subject: Subject,
    config: VerifyConfig,
    contract: Contract,
    failure: ConversionFailure,
    facts: Facts,
    lane: str,
) -> VerificationReport:
    reason = f"the conversion made no package: {failure.error}"
    gates = evaluate_failure(reason, facts)
    return VerificationReport(
        run=subject.run,
        lane=lane,
        model_type=facts.model_type,
        package_digest=file_digest(layout.placeholder_file(subject.package.parent)),
        contract_digest=file_digest(subject.contract),
        primary=shape_key(contract.shapes.primary),
        shapes={
            shape_key(seq_len): ShapeError(backend=Backend.MIL_REFERENCE, error=reason)
            for seq_len in contract.shapes.all
        },
        heldout=None,
        sampled_seed=config.sampling_seed,
        sampled=(),
        gates=gates,
        gates_ok=gates_ok(gates),
    )


def _log(report: VerificationReport) -> None:
    for key, shape in report.shapes.items():
        if isinstance(shape, ShapeError):
            log.warning("%s: %s", key, shape.error)
        else:
            log.info(
                "%s: ok, SQNR %.1f dB, KL %.2g nats, top-1 %.2f %% of %d positions, %d left out",
                key,
                shape.sqnr_db,
                shape.kl_nats,
                100 * shape.top1_agreement,
                shape.positions,
                shape.excluded,
            )
    for gate in report.gates:
        if gate.outcome is not Outcome.PASSED:
            log.warning("gate %s: %s (%s): %s", gate.outcome.value, gate.name, gate.severity.value, gate.reason)


def figures(report: VerificationReport) -> Figures:
    """What the gates came to, for the manifest."""
    outcomes = [gate.outcome for gate in report.gates]
    return {
        "gates_ok": str(report.gates_ok).lower(),
        **{f"gates.{outcome.value}": outcomes.count(outcome) for outcome in Outcome},
    }
