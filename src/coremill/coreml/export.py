"""Export a model: trace it, save it, load it again and check it at every length; the work of `export_pytorch`.

Legend: T sequence length, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import numpy as np
import torch

from coremill.core.config import ExportConfig
from coremill.core.contract import (
    Contract,
    Frontend,
    ShapeFailed,
    ShapeOk,
    ShapeSet,
    ShapeValidation,
    StatefulFunction,
    shape_key,
)
from coremill.core.digest import file_digest
from coremill.core.documents import encode
from coremill.core.errors import ExportError
from coremill.core.machine import release_memory
from coremill.core.parity import MAX_RELATIVE_ERR
from coremill.core.publish import replacing
from coremill.core.stage import Figures
from coremill.core.toolchain import current_toolchain
from coremill.coreml.decoder import Decode, Decoder, Main, Prefill, decoder_weights
from coremill.coreml.exported import capture_main, write_exported
from coremill.coreml.graph import (
    DECODE,
    PREFILL,
    Program,
    StatefulProgram,
    as_input,
    interface_lengths,
    load_program,
    read_interface,
    read_stateful,
    read_states,
    run_program,
    stand_ins,
    trace,
    without_weights,
    write_traced,
)
from coremill.data.prompts import load_prompts
from coremill.infra.version_gate import check_export_versions
from coremill.measures import Floats
from coremill.model.checkpoint import Checkpoint, check_vocabulary, load_checkpoint
from coremill.model.float32 import Float32Bounds
from coremill.model.memory import check_model_memory
from coremill.model.reference import Reference, Scores
from coremill.model.student import output_names

log = logging.getLogger(__name__)

_MEMORY: Mapping[Frontend, tuple[float, int]] = {
    "torchscript": (4.15, 880_000_000),
    "torch-export": (5.6, 560_000_000),
}
"""Bytes for each parameter, of the program in float32, which is run at every length; and those of a tiny model."""
_LOGITS = 1.05
"""Sets of logits of the longest length: the program's, and a part of the reference's."""

_PROMPT_ROWS = 128

_TRACED = 16
"""Tokens that a graph is captured on. The graph does not depend on them, nor on their number."""

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
    bytes_per_parameter, base_bytes = _MEMORY[settings.frontend]
    check_model_memory(
        ckpt,
        bytes_per_parameter=bytes_per_parameter,
        base_bytes=base_bytes,
        seq_len=max(fitting),
        logits=_LOGITS,
        work="export",
    )
    sequences = {seq_len: prompts.packed(seq_len, prompts.export_count) for seq_len in fitting}
    reference = Reference.of(ckpt)
    scores = _reference_scores(reference, sequences)
    # The program has the reference's own rotary tables.
    every = [ids for each in sequences.values() for ids in each]
    bounds = Float32Bounds(reference, every, angles=torch.float64)
    with replacing(program) as file:
        capture(ckpt, shapes, settings, file)
        file.flush()
        release_memory()
        # Check the saved program, not the one in memory.
        saved = Path(file.name)
        loaded = load_program(saved, settings.frontend, where=program.name)
        validation: dict[str, ShapeValidation] = {}
        for seq_len in shapes.all:
            key = shape_key(seq_len)
            validation[key] = (
                validate(loaded, scores[seq_len], sequences[seq_len], bounds)
                if seq_len in sequences
                else ShapeFailed(error=f"beyond the model's context of {ckpt.config.max_seq_len} tokens")
            )
            _report(key, validation[key], shapes)
            release_memory()
        working = [seq_len for seq_len in fitting if isinstance(validation[shape_key(seq_len)], ShapeOk)]
        shortest = min(working)
        functions = _stateful_functions(loaded, working, scores[shortest][0], sequences[shortest][0], bounds)
        with without_weights(loaded):
            interface = read_interface(loaded, [[0] * length for length in interface_lengths(working)])
        described = Contract(
            model_type=ckpt.model_type,
            model_arch=ckpt.model_arch,
            graph=program.name,
            frontend=settings.frontend,
            graph_digest=file_digest(saved),
            checkpoint_digest=file_digest(source.checkpoint),
            inputs=interface.inputs,
            outputs=interface.outputs,
            states=read_states(loaded),
            functions=functions,
            shapes=shapes,
            shape_validation=validation,
            tokenizer=ckpt.tokenizer,
            toolchain=current_toolchain(),
        )
        with replacing(contract) as other:
            other.write(encode(described))
    return described


def _reference_scores(reference: Reference, sequences: Mapping[int, list[list[int]]]) -> dict[int, list[Scores]]:
    """Return the reference's outputs for the sequences of each length."""
    found = iter(reference.score_all([ids for each in sequences.values() for ids in each]))
    return {seq_len: [next(found) for _ in each] for seq_len, each in sequences.items()}


def validate(
    program: Program, scores: Sequence[Scores], sequences: Sequence[Sequence[int]], bounds: Float32Bounds
) -> ShapeValidation:
    """Run `program` on `sequences`, all of one length, and compare every output with the reference's."""
    worst = 0.0
    try:
        for ids, expected in zip(sequences, scores, strict=True):
            found = run_program(program, ids)
            widths = {name: array.shape[-1] for name, array in expected.at(slice(0, 1)).items()}
            for name, output in zip(expected.names, found, strict=True):
                if list(output.shape) != (wanted := [1, len(expected), widths[name]]):
                    return ShapeFailed(error=f"the program returns {list(output.shape)}, the model {wanted}")
                error = _largest_error(output[0].numpy(), name, expected)
                if problem := _too_far(name, error, bounds):
                    return ShapeFailed(error=problem)
                worst = max(worst, error.largest)
            del found, output  # logits of a long sequence may take 800 MB
    except (RuntimeError, ValueError) as failure:  # of a program, and of a model at a length beyond its context
        return ShapeFailed(error=f"{type(failure).__name__}: {_last_line(failure)}")
    return ShapeOk(max_abs_err=worst)


class _Error(NamedTuple):
    """The largest difference of an output from the reference's."""

    largest: float
    """NaN if a value is."""
    magnitude: float
    """The largest magnitude of the reference's output."""


def _largest_error(found: Floats, name: str, expected: Scores) -> _Error:
    """Compare an output (N, …) with the reference's, of the same shape."""
    largest, magnitude = [0.0], [0.0]
    for rows, outputs in expected.chunks():
        magnitude += [float(outputs[name].max()), -float(outputs[name].min())]
        difference = np.subtract(found[rows], outputs[name], out=outputs[name])
        largest.append(float(np.abs(difference, out=difference).max()))
        del outputs, difference  # before the next are computed
    # Unlike Python's max, numpy's returns NaN if any value is NaN.
    return _Error(float(np.max(largest)), float(np.max(magnitude)))


def _too_far(name: str, error: _Error, bounds: Float32Bounds) -> str | None:
    """Describe an error of the output `name` that exceeds its bound."""
    relative = error.largest / error.magnitude if error.magnitude else error.largest
    limit, reason = bounds.bound(name, relative)
    bound = limit * error.magnitude
    if error.largest <= bound:
        return None
    why = f": {reason}" if reason else ""
    return f"differs from the model by {error.largest:.3g}, more than {bound:.3g}{why}"


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


def capture(ckpt: Checkpoint, shapes: ShapeSet, settings: ExportConfig, file: BinaryIO) -> None:
    """Capture the checkpoint's model for all lengths of `shapes` that it has, and write the program to `file`.

    The graph is captured without the weights, which are copied from the checkpoint into the file.

    Raises:
        ExportError: the model cannot be captured.
    """
    longest = max(seq_len for seq_len in shapes.all if seq_len <= ckpt.config.max_seq_len)
    context = settings.cache_positions(shapes)
    decoder = Decoder(ckpt.config, max(longest, context) if settings.stateful else longest)
    parameters = dict(decoder.named_parameters())
    decoder.set_weights(zip(parameters, stand_ins(list(parameters.values())), strict=True))
    weights = decoder_weights(ckpt.config, ckpt.state_dict)
    names = output_names(ckpt.config)
    ids = [0] * min(_TRACED, longest)
    try:
        if settings.frontend == "torch-export":
            write_exported(capture_main(Main(decoder), as_input(ids), longest, names), weights, file)
            return
        stateful = {PREFILL: Prefill(decoder, context), DECODE: Decode(decoder, context)}
        write_traced(trace(Main(decoder), ids, names, stateful if settings.stateful else None), weights, file)
    except (RuntimeError, ValueError) as failure:
        raise ExportError(
            f"the model cannot be captured: {_last_line(failure)}",
            expected="a model that the front end can capture",
            run="python -m coremill.training.check_checkpoint --help",
        ) from failure


def _stateful_functions(
    program: Program, working: Sequence[int], expected: Scores, ids: Sequence[int], bounds: Float32Bounds
) -> tuple[StatefulFunction, ...]:
    """Describe `prefill` and `decode` of the program, after comparing them with the model.

    Args:
        working: the lengths at which `main` works.
        expected: the reference's outputs for `ids`, on which they are compared.

    Raises:
        ExportError: one of them differs from the model.
    """
    with without_weights(program):
        interfaces = read_stateful(program, [[0] * length for length in interface_lengths(working)])
    errors = _stateful_errors(program, expected, ids, bounds) if interfaces else {}
    return tuple(
        StatefulFunction(
            name=interface.name,
            inputs=interface.inputs,
            outputs=interface.outputs,
            max_abs_err=errors[interface.name],
        )
        for interface in interfaces
    )


def _stateful_errors(
    program: Program, scores: Scores, ids: Sequence[int], bounds: Float32Bounds
) -> dict[str, float]:
    """The largest error of each function: most of `ids` (T,) is the prompt, the rest is decoded token by token."""
    n = max(1, len(ids) - _DECODED)
    padded = [*ids[:n], *[ids[0]] * (len(ids) - n)]
    stateful = StatefulProgram(program)
    magnitudes = _magnitudes(scores)
    runs = {PREFILL: [(n - 1, stateful.prefill(padded, n))]}
    runs[DECODE] = [(position, stateful.decode(ids[position], position)) for position in range(n, len(ids))]
    errors = {}
    for function, found in runs.items():
        errors[function] = 0.0
        for position, outputs in found:
            expected = scores.at(slice(position, position + 1))
            for name, output in zip(scores.names, outputs, strict=True):
                largest = float(np.abs(output[0].numpy() - expected[name]).max())
                if problem := _too_far(name, _Error(largest, magnitudes[name]), bounds):
                    raise ExportError(
                        f"`{function}` at position {position} {problem}",
                        expected="the model's outputs",
                        run="python -m coremill.training.check_checkpoint --help",
                    )
                errors[function] = max(errors[function], largest)
    return errors


def _magnitudes(scores: Scores) -> dict[str, float]:
    """Return the largest magnitude of each output."""
    found = dict.fromkeys(scores.names, 0.0)
    for _, outputs in scores.chunks():
        found = {name: max(found[name], float(np.abs(outputs[name]).max())) for name in found}
    return found


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
