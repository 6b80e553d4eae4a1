"""The export of a model: traced, saved, loaded again, and checked at every length; see `export_pytorch.py`.

Legend: T sequence length, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from coremill.core.config import ExportConfig
from coremill.core.contract import (
    Contract,
    ShapeFailed,
    ShapeOk,
    ShapeSet,
    ShapeValidation,
    StatefulFunction,
    shape_key,
)
from coremill.core.digest import bytes_digest, file_digest
from coremill.core.documents import encode
from coremill.core.errors import ExportError
from coremill.core.outputs import write_together
from coremill.core.parity import MAX_RELATIVE_ERR
from coremill.core.stage import Figures
from coremill.core.toolchain import current_toolchain
from coremill.coreml.decoder import Decode, Decoder, Main, Prefill
from coremill.coreml.exported import export_main
from coremill.coreml.graph import (
    DECODE,
    PREFILL,
    Program,
    StatefulProgram,
    as_input,
    interface_lengths,
    parse_program,
    program_bytes,
    read_interface,
    read_stateful,
    read_states,
    run_program,
    trace,
)
from coremill.data.prompts import Prompts
from coremill.infra.version_gate import check_export_versions
from coremill.model.checkpoint import Checkpoint, build_student, check_vocabulary, load_checkpoint
from coremill.model.memory import check_shape_memory
from coremill.model.student import Student, output_names

log = logging.getLogger(__name__)

_MODELS_IN_MEMORY = 5
"""The checkpoint's tensors, the student, the decoder, the program and its archive."""

_DECODED = 4
"""Tokens decoded one by one after a prompt, when the stateful functions are checked."""


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A program and its contract, not yet written."""

    program: bytes
    contract: Contract


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A model to export, and real token ids to check it on."""

    checkpoint: Path
    prompts: Prompts
    toy: bool
    """Whether the version gate may admit Python 3.13."""


def export(source: Source, shapes: ShapeSet, settings: ExportConfig, *, graph_name: str) -> Export:
    """Trace the checkpoint's model at the primary shape and check it at every one.

    Args:
        graph_name: file name that the contract gives the program.

    Raises:
        CoremillError: the checkpoint does not read, is not for this tokenizer, or may not be exported here.
        ExportError: the primary shape or the cache is beyond the model's context, or the model cannot be traced, or
            the program does not run or agree at the primary shape.
    """
    ckpt = load_checkpoint(source.checkpoint)
    check_export_versions(toy=source.toy, model_type=ckpt.model_type)
    check_vocabulary(ckpt, source.prompts.tokenizer)
    _check_context(ckpt, shapes, settings)
    fitting = [seq_len for seq_len in shapes.all if seq_len <= ckpt.config.max_seq_len]
    check_shape_memory(ckpt, max(fitting), models=_MODELS_IN_MEMORY, logits=2, work="export")
    student = build_student(ckpt)
    sequences = {seq_len: source.prompts.packed(seq_len, source.prompts.export_count) for seq_len in fitting}
    data = _traced(student, sequences[shapes.primary][0], max(fitting), settings.cache_positions(shapes), settings)
    # What was saved is what is checked, not what is in memory.
    program = parse_program(data, where=graph_name, frontend=settings.frontend)
    validation: dict[str, ShapeValidation] = {}
    for seq_len in shapes.all:
        key = shape_key(seq_len)
        validation[key] = (
            validate(program, student, sequences[seq_len])
            if seq_len in sequences
            else ShapeFailed(error=f"beyond the model's context of {ckpt.config.max_seq_len} tokens")
        )
        _judge(key, validation[key], shapes)
    working = [seq_len for seq_len in fitting if isinstance(validation[shape_key(seq_len)], ShapeOk)]
    ids = sequences[max(working)][0]
    samples = [ids[:length] for length in interface_lengths(working)]
    interface = read_interface(program, samples)
    contract = Contract(
        model_type=ckpt.model_type,
        model_arch=ckpt.model_arch,
        graph=graph_name,
        frontend=settings.frontend,
        graph_digest=bytes_digest(data),
        checkpoint_digest=file_digest(source.checkpoint),
        inputs=interface.inputs,
        outputs=interface.outputs,
        states=read_states(program),
        functions=_stateful_functions(program, student, samples, ids[: min(working)]),
        shapes=shapes,
        shape_validation=validation,
        tokenizer=ckpt.tokenizer,
        toolchain=current_toolchain(),
    )
    return Export(program=data, contract=contract)


def validate(program: Program, student: Student, sequences: Sequence[Sequence[int]]) -> ShapeValidation:
    """Run `program` and `student` on `sequences`, all of one length, and compare every output."""
    worst = 0.0
    try:
        with torch.no_grad():
            for ids in sequences:
                for found, expected in zip(run_program(program, ids), student(as_input(ids)), strict=True):
                    if found.shape != expected.shape:
                        return ShapeFailed(
                            error=f"the program returns {list(found.shape)}, the model {list(expected.shape)}"
                        )
                    error = largest_error(found, expected)
                    if problem := _too_far(error, expected):
                        return ShapeFailed(error=problem)
                    worst = max(worst, error)
    except (RuntimeError, ValueError) as failure:  # what a program raises, and a model for a length beyond its own
        return ShapeFailed(error=f"{type(failure).__name__}: {_last_line(failure)}")
    return ShapeOk(max_abs_err=worst)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors (1, T, V), row by row: a copy of all logits may be a gigabyte."""
    rows = zip(found[0].split(256), expected[0].split(256), strict=True)
    return float(
        torch.stack([(ours - theirs).abs().max() for ours, theirs in rows]).max()
    )  # NaN where there is one


def _too_far(error: float, expected: Tensor) -> str | None:
    bound = MAX_RELATIVE_ERR * float(torch.maximum(expected.max(), -expected.min()))
    if error <= bound:
        return None
    return f"differs from the model by {error:.3g}, more than {bound:.3g}"


def export_to(
    source: Source, shapes: ShapeSet, settings: ExportConfig, *, program: Path, contract: Path
) -> Contract:
    """Export to files, both of them or neither; raises as :func:`export` does.

    Raises:
        OutputError: the program or the contract cannot be written.
    """
    result = export(source, shapes, settings, graph_name=program.name)
    write_together({program: result.program, contract: encode(result.contract)})
    return result.contract


def _check_context(ckpt: Checkpoint, shapes: ShapeSet, settings: ExportConfig) -> None:
    """Refuse, before any work, what must work and the model has no positions for."""
    context = ckpt.config.max_seq_len
    wanted = {f"the primary shape {shape_key(shapes.primary)}": shapes.primary}
    if settings.stateful:
        positions = settings.cache_positions(shapes)
        wanted[f"a key/value cache of {positions} positions"] = positions
    for what, length in wanted.items():
        if length > context:
            raise ExportError(
                f"{what} is beyond the model's context of {context} tokens",
                expected=f"at most {context}",
                run="edit [shapes] and [export] of the run's configuration, or choose other --shapes",
            )


def _traced(student: Student, ids: Sequence[int], longest: int, context: int, settings: ExportConfig) -> bytes:
    """The program, traced on `ids`: for up to `longest` tokens, and a cache of `context` positions if stateful."""
    decoder = Decoder(student, max(longest, context) if settings.stateful else longest)
    stateful = {PREFILL: Prefill(decoder, context), DECODE: Decode(decoder, context)} if settings.stateful else None
    try:
        if settings.frontend == "torch-export":
            return export_main(Main(decoder), as_input(ids), longest, output_names(student.config))
        return program_bytes(trace(Main(decoder), ids, output_names(student.config), stateful))
    except (RuntimeError, ValueError) as failure:
        raise ExportError(
            f"the model cannot be traced at T = {len(ids)}: {_last_line(failure)}",
            expected=f"a model that runs at {len(ids)} tokens",
            run="python -m coremill.training.check_checkpoint --help",
        ) from failure


def _stateful_functions(
    program: Program, student: Student, samples: Sequence[Sequence[int]], ids: Sequence[int]
) -> tuple[StatefulFunction, ...]:
    """`prefill` and `decode` of the program, each found to compute what the model computes.

    Args:
        samples: what their interface is read with.
        ids: what they are compared on.

    Raises:
        ExportError: one of them does not.
    """
    interfaces = read_stateful(program, samples)
    errors = _stateful_errors(program, student, ids) if interfaces else {}
    return tuple(
        StatefulFunction(
            name=interface.name,
            inputs=interface.inputs,
            outputs=interface.outputs,
            max_abs_err=errors[interface.name],
        )
        for interface in interfaces
    )


def _stateful_errors(program: Program, student: Student, ids: Sequence[int]) -> dict[str, float]:
    """The largest error of each function: a prompt of most of `ids` (T,), and the tokens after it one by one."""
    n = max(1, len(ids) - _DECODED)
    padded = [*ids[:n], *[ids[0]] * (len(ids) - n)]
    stateful = StatefulProgram(program)
    with torch.no_grad():
        expected = student(as_input(ids))
    runs = {PREFILL: [(n - 1, stateful.prefill(padded, n))]}
    runs[DECODE] = [(place, stateful.decode(ids[place], place)) for place in range(n, len(ids))]
    errors = {}
    for name, found in runs.items():
        errors[name] = 0.0
        for place, outputs in found:
            for ours, theirs in zip(outputs, expected, strict=True):
                row = theirs[:, place : place + 1]
                error = largest_error(ours, row)
                if problem := _too_far(error, theirs):
                    raise ExportError(
                        f"`{name}` at position {place} {problem}",
                        expected="the model's own logits",
                        run="python -m coremill.training.check_checkpoint --help",
                    )
                errors[name] = max(errors[name], error)
    return errors


def _judge(key: str, result: ShapeValidation, shapes: ShapeSet) -> None:
    if isinstance(result, ShapeOk):
        log.info("%s: ok, largest error %.2g", key, result.max_abs_err)
    elif key == shape_key(shapes.primary):
        raise ExportError(
            f"the primary shape {key} failed: {result.error}",
            expected=f"the model's own outputs, to {MAX_RELATIVE_ERR:g} of their size",
            run="python -m coremill.training.check_checkpoint --help",
        )
    else:
        log.warning("%s failed, which does not block the export: %s", key, result.error)


def figures(contract: Contract) -> Figures:
    """What the export measured, for the manifest."""
    results = contract.shape_validation.values()
    errors = [result.max_abs_err for result in results if isinstance(result, ShapeOk)]
    errors += [function.max_abs_err for function in contract.functions]
    working = sum(isinstance(result, ShapeOk) for result in results)
    return {"shapes_ok": working, "shapes": len(results), "max_abs_err": max(errors)}


def _last_line(failure: Exception) -> str:
    """TorchScript's message ends in the cause; what precedes is its own traceback."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__
