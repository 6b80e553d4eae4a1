"""Verification: a package against its contract and its checkpoint, by running it.

The package runs under `coremill.mil` everywhere, and under Core ML as well on macOS. Exit code 0 says that every
must-gate passed, 3 that one did not; the report is written either way.

Legend: T sequence length.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from coremill.conversion.agreement import MOST_DB, sqnr_db
from coremill.conversion.backends import Runner, core_ml_runner, has_core_ml, reference_runner
from coremill.conversion.checklist import Evidence, evaluate, evaluate_failure
from coremill.conversion.checks import (
    Heldout,
    Reference,
    ask_heldout,
    ask_sampled,
    causality_leak,
    measure_shape,
    padding_sqnr_db,
)
from coremill.conversion.interface import differences, package_interface
from coremill.conversion.outputs import check_writable
from coremill.conversion.package import Spec, check_package, read_spec
from coremill.conversion.scoring import Scorer
from coremill.conversion.sequences import find_heldout, packed, read_some
from coremill.core import layout
from coremill.core.command import exit_on_error
from coremill.core.config import VerifyConfig, read_config
from coremill.core.contract import Contract, ShapeFailed, read_contract, shape_key
from coremill.core.diagnostics import ConversionDiagnostics, ConversionFailure
from coremill.core.digest import digest, file_digest, size_bytes
from coremill.core.documents import read_json, write_json
from coremill.core.errors import GATES_FAILED, OK, CoremillError, exit_code_table
from coremill.core.gates import Outcome, gates_ok, must_gates_ok
from coremill.core.reports import Answer, Backend, ShapeError, ShapeMeasured, ShapeReport, VerificationReport
from coremill.core.stage import Figures, StageContext
from coremill.data.rows import Row
from coremill.data.tokenizer import Tokenizer
from coremill.model.checkpoint import build_student, check_vocabulary, load_checkpoint

log = logging.getLogger(__name__)

DEFAULTS = VerifyConfig(
    heldout_answers=64,
    sampled_answers=24,
    sampling_seed=8,
    min_sqnr_db=40.0,
    max_kl_nats=1e-3,
    argmax_margin=0.05,
    max_excluded_share=0.02,
    min_right_mood=0.95,
    max_teacher_kl_nats=0.02,
    min_distinct_sampled=10,
)
"""What a command without --config asks of a package."""

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
    leak: float | None = None
    padding_sqnr_db: float | None = None
    heldout: Heldout | None = None
    sampled: tuple[Answer, ...] = ()
    core_ml_sqnr_db: float | None = None
    core_ml_problem: str | None = None


def verify(subject: Subject, config: VerifyConfig) -> VerificationReport:
    """Verify a package; of the record of a failed conversion, every gate fails.

    Raises:
        DocumentError, SchemaVersionError: the contract is not one.
        PackageError: the package is missing, or a part of it.
        DigestError: a part of it was altered after it was saved.
        UnsupportedOperationError: it has an operation that coremill.mil does not run.
        CoremillError: the checkpoint, the tokenizer or the held-out set does not read, or does not fit.
    """
    contract = read_contract(subject.contract)
    if (record := find_failure(subject.package)) is not None:
        return _report_failure(subject, config, contract, record)
    facts = check_package(subject.package)
    spec = read_spec(subject.package)
    checkpoint = load_checkpoint(subject.checkpoint)
    tokenizer = Tokenizer.load(subject.tokenizer)
    check_vocabulary(checkpoint, tokenizer)
    student = build_student(checkpoint)
    rows = read_some(subject.heldout, max(config.heldout_answers, config.sampled_answers))
    measured = measure(subject.package, contract, Reference(student), rows, tokenizer, config)
    diagnostics, diagnostics_problem = _diagnostics(subject.package)
    gates = evaluate(
        Evidence(
            contract=contract,
            config=config,
            graph_problem=_graph_problem(subject.contract.parent / contract.graph, contract),
            checkpoint_problem=_differs(
                "the checkpoint", file_digest(subject.checkpoint), contract.checkpoint_digest
            ),
            contract_problem=_differs("the contract", file_digest(subject.contract), facts.contract_digest),
            diagnostics=diagnostics,
            diagnostics_problem=diagnostics_problem,
            interface_problems=differences(contract, package_interface(spec)),
            operations=count_operations(spec),
            shapes=measured.shapes,
            leak=measured.leak,
            padding_sqnr_db=measured.padding_sqnr_db,
            heldout=measured.heldout,
            sampled=measured.sampled,
            core_ml_sqnr_db=measured.core_ml_sqnr_db,
            core_ml_problem=measured.core_ml_problem,
            parameters=student.n_parameters,
            package_bytes=size_bytes(subject.package),
        )
    )
    return VerificationReport(
        run=subject.run,
        lane=_lane(contract),
        model_type=contract.model_type,
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


def measure(
    package: Path,
    contract: Contract,
    reference: Reference,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    config: VerifyConfig,
) -> Measured:
    """Run the package at every length of the contract, and, where it runs at the primary one, ask it questions."""
    runner = reference_runner(package, contract)
    shapes: dict[str, ShapeReport] = {}
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
        return Measured(shapes=shapes)
    scorer = Scorer(runner, running, tokenizer.pad_id)
    probes = [ids for seq_len in running for ids in packed(rows, tokenizer, seq_len, _CAUSALITY_SEQUENCES)]
    core_ml_sqnr_db, core_ml_problem = _core_ml(package, contract, runner, probes)
    return Measured(
        shapes=shapes,
        leak=causality_leak(runner, probes, tokenizer),
        padding_sqnr_db=padding_sqnr_db(runner, reference, rows[:_PADDED_CONVERSATIONS], tokenizer, running),
        heldout=ask_heldout(scorer, rows[: config.heldout_answers], tokenizer, contract.tokenizer.vocab_size),
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


def count_operations(spec: Spec) -> int:
    """Operations of the package's functions; constants are not counted."""
    return sum(
        operation.type != "const"
        for function in spec.mlProgram.functions.values()
        for operation in function.block_specializations[function.opset].operations
    )


def run_stage(context: StageContext) -> Figures:
    """Verify the run's package of one lane; the report is written whether or not the gates pass."""
    config, inputs = context.config, context.inputs
    subject = Subject(
        run=config.name,
        package=layout.package_dir(inputs["convert"], config.name),
        contract=layout.contract_file(inputs["export"], config.name),
        checkpoint=layout.checkpoint_file(inputs["training"], config.name),
        tokenizer=layout.tokenizer_file(inputs["dataset"]),
        heldout=layout.heldout_file(inputs["dataset"]),
    )
    report = verify(subject, config.verify)
    write_json(layout.verification_report(context.out), report)
    _log(report)
    return _figures(report)


def _core_ml(
    package: Path, contract: Contract, runner: Runner, sequences: Sequence[Sequence[int]]
) -> tuple[float | None, str | None]:
    """The worst SQNR of Core ML's own outputs against the reference backend's, and what went wrong instead."""
    if not has_core_ml():
        return None, None
    ratios = [MOST_DB]
    try:
        core_ml = core_ml_runner(package, contract)
        for ids in sequences:
            found, expected = core_ml.run(ids), runner.run(ids)
            ratios += [sqnr_db(expected[name], found[name]) for name in expected]
    except (CoremillError, RuntimeError) as failure:  # Core ML's binding raises RuntimeError
        return None, f"Core ML: {failure}"
    return float(np.min(ratios)), None


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


def _lane(contract: Contract) -> str:
    return contract.toolchain.packages.get("torch", "unknown")


def _report_failure(
    subject: Subject, config: VerifyConfig, contract: Contract, failure: ConversionFailure
) -> VerificationReport:
    reason = f"the conversion made no package: {failure.error}"
    gates = evaluate_failure(reason)
    return VerificationReport(
        run=subject.run,
        lane=_lane(contract),
        model_type=contract.model_type,
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


def _figures(report: VerificationReport) -> Figures:
    outcomes = [gate.outcome for gate in report.gates]
    return {
        "gates_ok": str(report.gates_ok).lower(),
        **{f"gates.{outcome.value}": outcomes.count(outcome) for outcome in Outcome},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m coremill.conversion.verify_contract",
        description=__doc__,
        epilog="exit codes:\n" + exit_code_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--contract", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dataset-dir", type=Path, required=True, help="holds tokenizer.json and the held-out set")
    parser.add_argument("--out", type=Path, required=True, help="the report to write, verification_report.json")
    parser.add_argument("--config", type=Path, help="a run's configuration; its [verify] part counts")
    parser.add_argument("--heldout", type=int, metavar="N", help="answer N held-out questions")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    run_config = read_config(options.config) if options.config else None
    config = run_config.verify if run_config else DEFAULTS
    if options.heldout is not None:
        if options.heldout < 1:
            parser.error("--heldout must be at least 1")
        config = msgspec.structs.replace(config, heldout_answers=options.heldout)
    check_writable(options.out.parent)
    report = verify(
        Subject(
            run=run_config.name if run_config else options.package.stem.replace("_", "-"),
            package=options.package,
            contract=options.contract,
            checkpoint=options.checkpoint,
            tokenizer=layout.tokenizer_file(options.dataset_dir),
            heldout=find_heldout(options.dataset_dir),
        ),
        config,
    )
    write_json(options.out, report)
    _log(report)
    log.info("wrote %s: gates_ok is %s", options.out, str(report.gates_ok).lower())
    return OK if must_gates_ok(report.gates) else GATES_FAILED


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
