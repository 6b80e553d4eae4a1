"""The export of a graph: traced, saved, loaded again, and checked at every length; see `export_pytorch.py`.

Legend: T sequence length, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from coremill.conversion.graph import (
    Program,
    as_input,
    parse_program,
    program_bytes,
    read_interface,
    run_program,
    trace,
)
from coremill.conversion.outputs import write_together
from coremill.conversion.sequences import packed, read_some
from coremill.core.contract import Contract, ShapeFailed, ShapeOk, ShapeSet, ShapeValidation, shape_key
from coremill.core.digest import bytes_digest, file_digest
from coremill.core.documents import encode
from coremill.core.errors import ExportError
from coremill.core.stage import Figures
from coremill.core.toolchain import current_toolchain
from coremill.data.rows import Row
from coremill.data.tokenizer import Tokenizer
from coremill.infra.version_gate import check_export_versions
from coremill.model.checkpoint import Checkpoint, build_student, check_vocabulary, load_checkpoint
from coremill.model.student import Student, output_names

log = logging.getLogger(__name__)

MAX_ABS_ERR = 1e-4
"""Largest difference of logits between the program and the model: both compute in float32, and the program's
executor may only order sums differently."""

_SEQUENCES = 4
_PROMPT_ROWS = 128


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A program and its contract, not yet written."""

    program: bytes
    contract: Contract


def export(
    checkpoint: Path, tokenizer: Tokenizer, rows: Sequence[Row], shapes: ShapeSet, *, toy: bool, graph_name: str
) -> Export:
    """Trace the checkpoint's model at the primary shape and check it at every one.

    Args:
        rows: held-out questions with answers, for the token ids.
        toy: whether the version gate may admit Python 3.13.
        graph_name: file name that the contract gives the program.

    Raises:
        CoremillError: the checkpoint does not read, is not for this tokenizer, or may not be exported here.
        ExportError: the model cannot be traced, or the program does not run or agree at the primary shape.
    """
    ckpt = load_checkpoint(checkpoint)
    check_export_versions(toy=toy, model_type=ckpt.model_type)
    check_vocabulary(ckpt, tokenizer)
    student = build_student(ckpt)
    sequences = {seq_len: packed(rows, tokenizer, seq_len, _SEQUENCES) for seq_len in shapes.all}
    data = _traced(student, sequences[shapes.primary][0])
    # What was saved is what is checked, not what is in memory.
    program = parse_program(data, where=graph_name)
    validation = {shape_key(seq_len): validate(program, student, ids) for seq_len, ids in sequences.items()}
    _judge(validation, shapes)
    working = [ids[0] for seq_len, ids in sequences.items() if isinstance(validation[shape_key(seq_len)], ShapeOk)]
    return Export(
        program=data,
        contract=_contract(ckpt, file_digest(checkpoint), program, data, working, shapes, validation, graph_name),
    )


def validate(program: Program, student: Student, sequences: Sequence[Sequence[int]]) -> ShapeValidation:
    """Run `program` and `student` on `sequences`, all of one length, and compare every output."""
    errors = []
    try:
        with torch.no_grad():
            for ids in sequences:
                for found, expected in zip(run_program(program, ids), student(as_input(ids)), strict=True):
                    if found.shape != expected.shape:
                        return ShapeFailed(
                            error=f"the program returns {list(found.shape)}, the model {list(expected.shape)}"
                        )
                    errors.append((found - expected).abs().max())
    except (RuntimeError, ValueError) as failure:  # what a program raises, and a model for a length beyond its own
        return ShapeFailed(error=f"{type(failure).__name__}: {_last_line(failure)}")
    worst = float(torch.stack(errors).max())  # unlike Python's max, NaN where there is one
    if not worst <= MAX_ABS_ERR:
        return ShapeFailed(error=f"differs from the model by {worst:.3g}, more than {MAX_ABS_ERR:g}")
    return ShapeOk(max_abs_err=worst)


def export_to(
    checkpoint: Path,
    tokenizer: Path,
    heldout: Path,
    shapes: ShapeSet,
    *,
    toy: bool,
    program: Path,
    contract: Path,
) -> Contract:
    """Export from files to files, both of them or neither; raises as :func:`export` does.

    Raises:
        TokenizerError, DatasetError: `tokenizer` or `heldout` does not read.
        OutputError: the program or the contract cannot be written.
    """
    rows = read_some(heldout, _PROMPT_ROWS)
    result = export(checkpoint, Tokenizer.load(tokenizer), rows, shapes, toy=toy, graph_name=program.name)
    write_together({program: result.program, contract: encode(result.contract)})
    return result.contract


def _traced(student: Student, ids: Sequence[int]) -> bytes:
    try:
        return program_bytes(trace(student, ids, output_names(student.config)))
    except (RuntimeError, ValueError) as failure:
        raise ExportError(
            f"the model cannot be traced at T = {len(ids)}: {_last_line(failure)}",
            expected=f"a model that runs at {len(ids)} tokens",
            run="python -m coremill.training.check_checkpoint --help",
        ) from failure


def _judge(validation: dict[str, ShapeValidation], shapes: ShapeSet) -> None:
    for key, result in validation.items():
        if isinstance(result, ShapeOk):
            log.info("%s: ok, largest error %.2g", key, result.max_abs_err)
        elif key == shape_key(shapes.primary):
            raise ExportError(
                f"the primary shape {key} failed: {result.error}",
                expected=f"the model's own logits, to {MAX_ABS_ERR:g}",
                run="python -m coremill.training.check_checkpoint --help",
            )
        else:
            log.warning("%s failed, which does not block the export: %s", key, result.error)


def _contract(
    ckpt: Checkpoint,
    checkpoint_digest: str,
    program: Program,
    data: bytes,
    working: Sequence[Sequence[int]],
    shapes: ShapeSet,
    validation: dict[str, ShapeValidation],
    graph_name: str,
) -> Contract:
    interface = read_interface(program, working)
    return Contract(
        model_type=ckpt.model_type,
        model_arch=ckpt.model_arch,
        graph=graph_name,
        graph_digest=bytes_digest(data),
        checkpoint_digest=checkpoint_digest,
        inputs=interface.inputs,
        outputs=interface.outputs,
        shapes=shapes,
        shape_validation=validation,
        tokenizer=ckpt.tokenizer,
        toolchain=current_toolchain(),
    )


def figures(contract: Contract) -> Figures:
    """What the export measured, for the manifest."""
    results = contract.shape_validation.values()
    errors = [result.max_abs_err for result in results if isinstance(result, ShapeOk)]
    return {"shapes_ok": len(errors), "shapes": len(results), "max_abs_err": max(errors)}


def _last_line(failure: Exception) -> str:
    """TorchScript's message ends in the cause; what precedes is its own traceback."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__
