"""Export a model: trace it, save it, load it again and check it at every length; the work of `export_pytorch`.

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
from coremill.data.prompts import load_prompts
from coremill.infra.version_gate import check_export_versions
from coremill.model.checkpoint import Checkpoint, build_student, check_vocabulary, load_checkpoint
from coremill.model.memory import check_shape_memory
from coremill.model.student import Student, output_names

log = logging.getLogger(__name__)

_MODELS_IN_MEMORY = 5
"""The checkpoint's tensors, the student, the decoder, the program and its archive."""

_PROMPT_ROWS = 128

_DECODED = 4
"""Tokens decoded one by one after a prompt, to check the stateful functions."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A model to export, and the files to make prompts from, on which it is checked."""

    checkpoint: Path
    tokenizer: Path
    prompts: Path
    """A held-out set, or a directory that contains one or texts.jsonl."""
    toy: bool
    """Whether the version gate may accept Python 3.13."""


def export(source: Source, shapes: ShapeSet, settings: ExportConfig, *, program: Path, contract: Path) -> Contract:
    """Trace the checkpoint's model at the primary shape, check it at every shape, and write program and contract.

    Either both files are written or neither.

    Raises:
        TokenizerError, DatasetError: the tokenizer or the prompts cannot be read.
        CoremillError: the checkpoint cannot be read, has another tokenizer, or may not be exported here.
        ExportError: the primary shape or the cache exceeds the model's context, the model cannot be traced, or the
            program fails or differs from the model at the primary shape.
        OutputError: the program or the contract cannot be written.
    """
    prompts = load_prompts(source.tokenizer, source.prompts, rows=_PROMPT_ROWS)
    ckpt = load_checkpoint(source.checkpoint)
    check_export_versions(toy=source.toy, model_type=ckpt.model_type)
    check_vocabulary(ckpt, prompts.tokenizer)
    _check_context(ckpt, shapes, settings)
    fitting = [seq_len for seq_len in shapes.all if seq_len <= ckpt.config.max_seq_len]
    check_shape_memory(ckpt, max(fitting), models=_MODELS_IN_MEMORY, logits=2, work="export")
    student = build_student(ckpt)
    sequences = {seq_len: prompts.packed(seq_len, prompts.export_count) for seq_len in fitting}
    data = _traced(student, sequences[shapes.primary][0], max(fitting), settings.cache_positions(shapes), settings)
    # Check the saved program, not the one in memory.
    loaded = parse_program(data, where=program.name, frontend=settings.frontend)
    validation: dict[str, ShapeValidation] = {}
    for seq_len in shapes.all:
        key = shape_key(seq_len)
        validation[key] = (
            validate(loaded, student, sequences[seq_len])
            if seq_len in sequences
            else ShapeFailed(error=f"beyond the model's context of {ckpt.config.max_seq_len} tokens")
        )
        _report(key, validation[key], shapes)
    working = [seq_len for seq_len in fitting if isinstance(validation[shape_key(seq_len)], ShapeOk)]
    ids = sequences[max(working)][0]
    samples = [ids[:length] for length in interface_lengths(working)]
    interface = read_interface(loaded, samples)
    described = Contract(
        model_type=ckpt.model_type,
        model_arch=ckpt.model_arch,
        graph=program.name,
        frontend=settings.frontend,
        graph_digest=bytes_digest(data),
        checkpoint_digest=file_digest(source.checkpoint),
        inputs=interface.inputs,
        outputs=interface.outputs,
        states=read_states(loaded),
        functions=_stateful_functions(loaded, student, samples, ids[: min(working)]),
        shapes=shapes,
        shape_validation=validation,
        tokenizer=ckpt.tokenizer,
        toolchain=current_toolchain(),
    )
    write_together({program: data, contract: encode(described)})
    return described


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
    except (RuntimeError, ValueError) as failure:  # of a program, and of a model at a length beyond its context
        return ShapeFailed(error=f"{type(failure).__name__}: {_last_line(failure)}")
    return ShapeOk(max_abs_err=worst)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors (1, T, V), by blocks of rows: all logits may take a gigabyte."""
    rows = zip(found[0].split(256), expected[0].split(256), strict=True)
    # Unlike Python's max, torch's returns NaN if any value is NaN.
    return float(torch.stack([(ours - theirs).abs().max() for ours, theirs in rows]).max())


def _too_far(error: float, expected: Tensor) -> str | None:
    bound = MAX_RELATIVE_ERR * float(torch.maximum(expected.max(), -expected.min()))
    if error <= bound:
        return None
    return f"differs from the model by {error:.3g}, more than {bound:.3g}"


def _check_context(ckpt: Checkpoint, shapes: ShapeSet, settings: ExportConfig) -> None:
    """Check that the primary shape and the cache fit in the model's context."""
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
                run="edit [shapes] and [export] in the run's configuration, or choose other --shapes",
            )


def _traced(student: Student, ids: Sequence[int], longest: int, context: int, settings: ExportConfig) -> bytes:
    """The program for up to `longest` tokens, traced on `ids`; if stateful, with a cache of `context` positions."""
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
    """Describe `prefill` and `decode` of the program, after comparing them with the model.

    Args:
        samples: token ids to read their interface with.
        ids: token ids to compare them on.

    Raises:
        ExportError: one of them differs from the model.
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
    """The largest error of each function: most of `ids` (T,) is the prompt, the rest is decoded token by token."""
    n = max(1, len(ids) - _DECODED)
    padded = [*ids[:n], *[ids[0]] * (len(ids) - n)]
    stateful = StatefulProgram(program)
    with torch.no_grad():
        expected = student(as_input(ids))
    runs = {PREFILL: [(n - 1, stateful.prefill(padded, n))]}
    runs[DECODE] = [(position, stateful.decode(ids[position], position)) for position in range(n, len(ids))]
    errors = {}
    for name, found in runs.items():
        errors[name] = 0.0
        for position, outputs in found:
            for ours, theirs in zip(outputs, expected, strict=True):
                row = theirs[:, position : position + 1]
                error = largest_error(ours, row)
                if problem := _too_far(error, theirs):
                    raise ExportError(
                        f"`{name}` at position {position} {problem}",
                        expected="the model's outputs",
                        run="python -m coremill.training.check_checkpoint --help",
                    )
                errors[name] = max(errors[name], error)
    return errors


def _report(key: str, result: ShapeValidation, shapes: ShapeSet) -> None:
    if isinstance(result, ShapeOk):
        log.info("%s: ok, largest error %.2g", key, result.max_abs_err)
    elif key == shape_key(shapes.primary):
        raise ExportError(
            f"the primary shape {key} failed: {result.error}",
            expected=f"the model's outputs, within {MAX_RELATIVE_ERR:g} of their largest magnitude",
            run="python -m coremill.training.check_checkpoint --help",
        )
    else:
        log.warning("%s failed, which does not stop the export: %s", key, result.error)


def figures(contract: Contract) -> Figures:
    """Figures of the export for the manifest."""
    results = contract.shape_validation.values()
    errors = [result.max_abs_err for result in results if isinstance(result, ShapeOk)]
    errors += [function.max_abs_err for function in contract.functions]
    working = sum(isinstance(result, ShapeOk) for result in results)
    return {"shapes_ok": working, "shapes": len(results), "max_abs_err": max(errors)}


def _last_line(failure: Exception) -> str:
    """The cause of a failure: TorchScript's message starts with a traceback of its own and ends with the cause."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__
