"""Convert a graph, with checks before and after the conversion; the work of the command `convert_coreml`."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from coremill.core import layout
from coremill.core.config import ConvertConfig
from coremill.core.contract import Contract, Frontend, PackageFunction, read_contract
from coremill.core.diagnostics import ConversionDiagnostics, ConversionFailure, Notice, NoticeKind, count_notices
from coremill.core.digest import digest, file_digest
from coremill.core.documents import write_json
from coremill.core.errors import ContractMismatchError, ConversionError, OutputError
from coremill.core.machine import check_disk, check_memory
from coremill.core.outputs import check_writable
from coremill.core.publish import publishing, write_atomic
from coremill.core.toolchain import current_toolchain
from coremill.coreml.converter import IMPORT_MESSAGES, MLModel, convert_function, prepared
from coremill.coreml.diagnostics import Message, Recorder, as_log, recording, sort_messages
from coremill.coreml.graph import Program, check_contract, interface_lengths, load_program, without_weights
from coremill.coreml.interface import differences, package_interfaces
from coremill.coreml.package import read_spec, write_package
from coremill.infra.version_gate import check_export_versions

log = logging.getLogger(__name__)

_SPARE_BYTES = 64 << 20
_COPIES = 4
"""Disk space per byte of the graph: coremltools' temporary package, the new package, the published one, a spare."""
_MEMORY: Mapping[Frontend, tuple[float, int]] = {
    "torchscript": (1.8, 550_000_000),
    "torch-export": (2.95, 460_000_000),
}
"""Memory for each byte of the graph: the program as loaded, and what coremltools holds of its float16 weights; and
that for a tiny graph."""
_TRACEBACK_LINES = 12


class FailedConversionError(ConversionError):
    """A conversion that failed, with the data for a record of it."""

    def __init__(self, failure: Exception, messages: tuple[Message, ...]) -> None:
        cause = (str(failure).strip().splitlines() or [""])[0]
        super().__init__(
            f"coremltools could not convert the graph: {type(failure).__name__}: {cause}",
            expected="a graph of operations that coremltools converts",
            run="python -m coremill.conversion.convert_coreml --allow-placeholder …, which records the failure",
        )
        self.messages = messages
        self.traceback_tail = tuple(
            line.rstrip()
            for part in traceback.format_exception(failure)
            for line in part.splitlines()
            if line.strip()
        )[-_TRACEBACK_LINES:]


def convert(graph: Path, contract: Path, out: Path, settings: ConvertConfig, *, toy: bool) -> ConversionDiagnostics:
    """Convert the program at `graph` to the package `out`.

    Writes `conversion.log` and `diagnostics.json` next to it. The log is written even if the conversion fails.

    Raises:
        TorchScriptError: `graph` is not a program.
        DocumentError, SchemaVersionError: `contract` is not a contract.
        ContractMismatchError: the contract describes another graph, or the saved package differs from it.
        OutputError: `out` cannot be written, or the disk has too little space.
        MachineError: there is too little memory.
        FailedConversionError: coremltools failed.
    """
    program, promised = _checked(graph, contract, out, toy=toy)
    with publishing(out) as fresh:
        messages = _convert_to(
            fresh, program, promised.package_functions, settings, contract_digest=file_digest(contract), log_to=out
        )
        # Check the saved package: changes to an MLModel's specification in memory can be lost when it is saved.
        if wrong := differences(promised.package_functions, package_interfaces(read_spec(fresh))):
            raise ContractMismatchError(
                f"the converted package differs from {contract}: " + "; ".join(wrong),
                expected="the contract's names, dtypes, shapes and lengths",
                run="python -m coremill.conversion.export_pytorch --help",
            )
    notices = sort_messages(messages)
    diagnostics = ConversionDiagnostics(
        package=out.name,
        package_digest=digest(out),
        toolchain=current_toolchain(),
        deployment_target=settings.deployment_target,
        compute_precision=settings.compute_precision,
        notices=notices,
        counts=count_notices(notices),
    )
    write_json(layout.diagnostics_file(out.parent), diagnostics)
    # The record of an earlier failure would fail every gate of the new package.
    layout.placeholder_file(out.parent).unlink(missing_ok=True)
    _report(notices)
    return diagnostics


def record_failure(failure: FailedConversionError, graph: Path, contract: Path, out: Path) -> Path:
    """Write the record of a failed conversion; verification then fails every gate."""
    record = ConversionFailure(
        package=out.name,
        graph_digest=file_digest(graph),
        contract_digest=file_digest(contract),
        error=failure.found,
        traceback_tail=failure.traceback_tail,
        toolchain=current_toolchain(),
        notices=sort_messages(failure.messages),
    )
    path = layout.placeholder_file(out.parent)
    write_json(path, record)
    return path


def _checked(graph: Path, contract: Path, out: Path, *, toy: bool) -> tuple[Program, Contract]:
    """Return the program and its contract, after all checks that need no conversion."""
    promised = read_contract(contract)
    size = graph.stat().st_size if graph.is_file() else 0  # loading reports a missing file
    copies, base_bytes = _MEMORY[promised.frontend]
    check_memory(base_bytes + int(copies * size), why=f"to convert a program of {size / 1e6:,.0f} MB")
    program = load_program(graph, promised.frontend, widened=False)
    check_export_versions(toy=toy, model_type=promised.model_type)
    # Shapes do not depend on the ids, and this stage has no tokenizer: zeros will do.
    lengths = interface_lengths(promised.working_lengths)
    sequences = [[0] * seq_len for seq_len in lengths]
    with without_weights(program):
        check_contract(promised, program, graph_digest=file_digest(graph), sequences=sequences)
    if out.suffix != ".mlpackage":
        raise OutputError(f"{out} does not end in .mlpackage", expected=f"a name such as {out.stem}.mlpackage")
    if out.exists() and not out.is_dir():
        raise OutputError(
            f"{out} is a file", expected="a package to replace, or a new path", run=f"ls -la {out.parent}"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / "Manifest.json").is_file():
        raise OutputError(
            f"{out} is a directory that is not a package",
            expected="a package to replace, or a new path",
            run=f"ls -la {out}",
        )
    check_writable(out.parent)
    check_disk(
        out.parent,
        _COPIES * graph.stat().st_size + _SPARE_BYTES,
        why="for the package and the temporary copies of a conversion",
    )
    return program, promised


def _convert_to(
    package: Path,
    program: Program,
    functions: tuple[PackageFunction, ...],
    settings: ConvertConfig,
    *,
    contract_digest: str,
    log_to: Path,
) -> tuple[Message, ...]:
    """Convert and save, and write the log, whether or not that succeeds. Returns all messages of the converter."""
    recorder = Recorder()
    try:
        with recording(recorder):
            write_package(_converted(program, functions, settings), package, contract_digest=contract_digest)
    except OSError as failure:
        raise OutputError(
            f"cannot write {package.name}: {failure}", expected="free space on a writable disk"
        ) from failure
    except Exception as failure:  # coremltools has no error type of its own
        failed = FailedConversionError(failure, IMPORT_MESSAGES + recorder.messages)
        # The frames keep coremltools' temporary directories alive; release them before the command prints its
        # error.
        with recording(Recorder()):
            traceback.clear_frames(failure.__traceback__)
            gc.collect()
        raise failed from failure
    finally:
        messages = IMPORT_MESSAGES + recorder.messages
        write_atomic(layout.conversion_log(log_to.parent), as_log(messages).encode())
    return messages


def _converted(
    program: Program, functions: tuple[PackageFunction, ...], settings: ConvertConfig
) -> Iterator[tuple[str, MLModel]]:
    """Convert the functions one at a time, because each model contains all of its weights."""
    ready = prepared(program, settings)
    for number, function in enumerate(functions, start=1):
        log.info("%s: function %d of %d", function.name, number, len(functions))
        yield function.name, convert_function(ready, function, settings)


def _report(notices: tuple[Notice, ...]) -> None:
    """Log warnings and errors; diagnostics.json counts the harmless and compatibility notices."""
    for notice in notices:
        if notice.kind is NoticeKind.WARNING:
            log.warning("coremltools: %s", notice.text)
        elif notice.kind is NoticeKind.ERROR:
            log.error("coremltools: %s", notice.text)
    log.info("notices of coremltools: %s", ", ".join(f"{n} {kind}" for kind, n in count_notices(notices).items()))
