"""Verify a package: read the files, measure, evaluate the gates, report; see `verify_contract.py`.

Legend: T sequence length.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
from packaging.version import InvalidVersion, Version

from coremill.core import layout
from coremill.core.config import ConvertConfig, DistilledVerify, VerifyConfig
from coremill.core.contract import Contract, read_contract, shape_key
from coremill.core.diagnostics import ConversionDiagnostics, ConversionFailure
from coremill.core.digest import digest, file_digest, size_bytes
from coremill.core.documents import read_json, write_json
from coremill.core.errors import ConfigError, ContractMismatchError, PackageError
from coremill.core.gates import Outcome, gates_ok, must_gates_ok
from coremill.core.parity import SourceParity
from coremill.core.reports import Backend, ShapeError, VerificationReport
from coremill.core.stage import Figures
from coremill.coreml.graph import check_main
from coremill.coreml.interface import differences, package_interfaces
from coremill.coreml.package import PackageFacts, check_package, read_spec
from coremill.data.prompts import Prompts, RowPrompts, load_prompts
from coremill.model.checkpoint import Checkpoint, check_vocabulary, load_checkpoint
from coremill.model.memory import check_model_memory
from coremill.verification.checklist import evaluate, evaluate_failure
from coremill.verification.evidence import Evidence, Facts, FileChecks
from coremill.verification.measurement import measure
from coremill.verification.stored_weights import compare_stored_weights

log = logging.getLogger(__name__)

_LOGITS = 2.25
"""Sets of logits in memory at a time: those kept of one run in float16, and another's in float16 and in float32."""
_BASE_BYTES = 620_000_000
"""Weights are mapped, and one layer is widened at a time."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is verified, and with what."""

    run: str
    package: Path
    contract: Path
    checkpoint: Path
    tokenizer: Path
    prompts: Path
    """What the model is run on: a directory with texts or with a held-out set, or a held-out set."""
    stateful: bool | None
    """Whether the run exports functions with a key/value cache; None, without a run, leaves it to the contract."""


def verify_to(out: Path, subject: Subject, config: VerifyConfig) -> VerificationReport:
    """Verify a package and write the report to `out`, whether or not the gates pass; raises as :func:`verify`."""
    report = verify(subject, config)
    write_json(out, report)
    _log(report)
    return report


def verify(subject: Subject, config: VerifyConfig) -> VerificationReport:
    """Verify a package. For the record of a failed conversion, every gate fails.

    Raises:
        DocumentError, SchemaVersionError: the contract is not valid.
        ContractMismatchError: the contract describes no graph `main`, or does not name the torch that exported it.
        PackageError: the package, or a part of it, is missing.
        DigestError: a part of the package was changed after it was saved.
        CoremillError: the checkpoint, the tokenizer, the texts or the held-out set is unreadable or does not fit.
        ConfigError: the settings and the prompts are of different kinds of run.
    """
    contract = read_contract(subject.contract)
    check_main(contract)
    lane = lane_of(contract)
    checkpoint = load_checkpoint(subject.checkpoint)
    prompts = _prompts(subject, config)
    check_vocabulary(checkpoint, prompts.tokenizer)
    facts = Facts(
        model_type=checkpoint.model_type,
        imported=prompts.imported,
        stateful=bool(contract.functions) if subject.stateful is None else subject.stateful,
        has_halt_head=checkpoint.model_arch.use_halt_head,
        asks_moods=isinstance(prompts, RowPrompts) and prompts.answer_key.has_moods,
    )
    if (record := find_failure(subject.package)) is not None:
        return _report_failure(subject, config, contract, record, facts, lane)
    saved = check_package(subject.package)
    check_model_memory(
        checkpoint,
        base_bytes=_BASE_BYTES,
        seq_len=max(contract.working_lengths),
        logits=_LOGITS,
        work="verify",
    )
    files = _check_files(subject, contract, saved, checkpoint)
    precision = files.diagnostics.compute_precision if files.diagnostics else None
    settings = ConvertConfig(compute_precision=precision) if precision else ConvertConfig()
    measured = measure(
        subject.package, contract, checkpoint, prompts, config, stateful=facts.stateful, settings=settings
    )
    evidence = Evidence(subject=facts, contract=contract, config=config, files=files, measured=measured)
    gates = evaluate(evidence)
    return VerificationReport(
        run=subject.run,
        lane=lane,
        model_type=checkpoint.model_type,
        package_digest=digest(subject.package),
        contract_digest=file_digest(subject.contract),
        primary=evidence.primary,
        shapes=measured.shapes,
        stateful=measured.stateful,
        heldout=None if measured.heldout is None else measured.heldout.answers,
        sampled_seed=_seed(config),
        sampled=measured.sampled,
        gates=gates,
        gates_ok=gates_ok(gates),
    )


def _check_files(subject: Subject, contract: Contract, saved: PackageFacts, checkpoint: Checkpoint) -> FileChecks:
    """Compare the files with one another; nothing is run."""
    diagnostics, diagnostics_problem = _diagnostics(subject.package)
    return FileChecks(
        graph_problem=_graph_problem(subject.contract.parent / contract.graph, contract),
        checkpoint_problem=_differs("the checkpoint", file_digest(subject.checkpoint), contract.checkpoint_digest),
        source_problem=_source_problem(subject.checkpoint),
        contract_problem=_contract_problem(subject, contract, saved, checkpoint),
        diagnostics=diagnostics,
        diagnostics_problem=diagnostics_problem,
        interface_problems=_interface_problems(subject.package, contract),
        weights=compare_stored_weights(subject.package, checkpoint),
        parameters=sum(tensor.numel() for tensor in checkpoint.state_dict.values()),
        package_bytes=size_bytes(subject.package),
    )


def lane_of(contract: Contract) -> str:
    """Return the lane of a contract: the release of torch that exported its graph, `2.9.1` for a build `2.9.1+cpu`.

    Raises:
        ContractMismatchError: its toolchain has no valid version of torch.
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


def _prompts(subject: Subject, config: VerifyConfig) -> Prompts:
    prompts = load_prompts(subject.tokenizer, subject.prompts, rows=config.rows)
    if prompts.imported != (not isinstance(config, DistilledVerify)):
        found = "texts" if prompts.imported else "a held-out set"
        expected = (
            "a held-out set: the configuration checks answers"
            if prompts.imported
            else "texts: the configuration is of a run that imports its model"
        )
        raise ConfigError(f"{subject.prompts} has {found}", expected=expected)
    return prompts


def _seed(config: VerifyConfig) -> int | None:
    """The seed of the sampled answers; an imported model's answers are greedy."""
    return config.sampling_seed if isinstance(config, DistilledVerify) else None


def find_failure(package: Path) -> ConversionFailure | None:
    """Return the record of a failed conversion, given as the package or next to where it should be; else None."""
    record = layout.placeholder_file(package.parent)
    if not record.is_file():
        return None
    failure = read_json(record, ConversionFailure)
    return failure if package.name in (record.name, failure.package) else None


def _diagnostics(package: Path) -> tuple[ConversionDiagnostics | None, str | None]:
    """Return the diagnostics of this package, or the reason why there are none."""
    path = layout.diagnostics_file(package.parent)
    if not path.is_file():
        return None, f"there is no {path.name} next to the package"
    diagnostics = read_json(path, ConversionDiagnostics)
    problem = _differs(f"the package that {path.name} describes", diagnostics.package_digest, digest(package))
    return (None, problem) if problem else (diagnostics, None)


def _source_problem(checkpoint: Path) -> str | None:
    """Return why the checkpoint is not known to compute what its source does; None if the comparison passed."""
    path = layout.source_parity(checkpoint.parent)
    if not path.is_file():
        return f"there is no {path.name} next to the checkpoint: import it again with `coremill import`"
    parity = read_json(path, SourceParity)
    failed = [f"{gate.name}: {gate.reason}" for gate in parity.gates if gate.outcome is not Outcome.PASSED]
    problems = [
        _differs(f"the checkpoint of {path.name}", parity.checkpoint_digest, file_digest(checkpoint)),
        f"in {parity.program}: {'; '.join(failed)}" if failed and not must_gates_ok(parity.gates) else None,
    ]
    return "; ".join(problem for problem in problems if problem) or None


def _graph_problem(graph: Path, contract: Contract) -> str | None:
    if not graph.is_file():
        return f"there is no {graph.name} next to the contract"
    return _differs("the exported program", file_digest(graph), contract.graph_digest)


def _differs(what: str, found: str, recorded: str) -> str | None:
    return None if found == recorded else f"{what} is {found}, not {recorded}"


def _contract_problem(
    subject: Subject, contract: Contract, package: PackageFacts, checkpoint: Checkpoint
) -> str | None:
    """Return why the contract is not the package's, the checkpoint's or the run's; None if it is."""
    problems = [_differs("the contract", file_digest(subject.contract), package.contract_digest)]
    if subject.stateful is not None and subject.stateful != bool(contract.functions):
        functions = ", ".join(function.name for function in contract.functions) or "no functions"
        problems.append(
            f"export.stateful is {str(subject.stateful).lower()}, the contract has {functions} with a cache"
        )
    for name in ("model_type", "model_arch", "tokenizer"):
        promised, found = getattr(contract, name), getattr(checkpoint, name)
        if promised != found:
            problems.append(f"{name}: the contract has {promised!r}, the checkpoint {found!r}")
    return "; ".join(problem for problem in problems if problem) or None


def _interface_problems(package: Path, contract: Contract) -> tuple[str, ...]:
    try:
        return differences(contract.package_functions, package_interfaces(read_spec(package)))
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
    reason = f"the conversion failed: {failure.error}"
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
        sampled_seed=_seed(config),
        sampled=(),
        gates=gates,
        gates_ok=gates_ok(gates),
    )


def _log(report: VerificationReport) -> None:
    for gate in report.gates:
        if gate.outcome is not Outcome.PASSED:
            log.warning("gate %s: %s (%s): %s", gate.outcome.value, gate.name, gate.severity.value, gate.reason)


def figures(report: VerificationReport) -> Figures:
    """Return the number of gates by outcome, for the manifest."""
    outcomes = [gate.outcome for gate in report.gates]
    return {
        "gates_ok": str(report.gates_ok).lower(),
        **{f"gates.{outcome.value}": outcomes.count(outcome) for outcome in Outcome},
    }
