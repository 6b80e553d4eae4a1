"""coremltools, imported without its chatter reaching the terminal, and the conversion of a program's functions.

Legend: T sequence length.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from coremill.core.config import ConvertConfig
from coremill.core.contract import Contract, DType, ShapeOk, TensorSpec, shape_key
from coremill.core.diagnostics import NoticeKind
from coremill.coreml.diagnostics import Message, Recorder, kind_of, recording
from coremill.coreml.exported import ExportedMain
from coremill.coreml.graph import MAIN, Program, find_function

_recorder = Recorder()
with recording(_recorder):
    import coremltools as ct
    import torch
    from coremltools import _deps

_asked = Recorder()
with recording(_asked):
    # There is no public way to ask again: the function is private, of the pinned coremltools 9.0. In a version
    # without it this fails with an AttributeError that names it, rather than leave the notice uncounted.
    _deps._warn_if_above_max_supported_version("Torch", torch.__version__, _deps._TORCH_MAX_VERSION)

__all__ = [
    "IMPORT_MESSAGES",
    "MLModel",
    "PackageFunction",
    "convert_function",
    "ct",
    "decoder_passes",
    "package_functions",
    "prepared",
    "working_lengths",
]

IMPORT_MESSAGES: tuple[Message, ...] = (
    *(message for message in _recorder.messages if kind_of(message) in (NoticeKind.WARNING, NoticeKind.ERROR)),
    *_asked.messages,
)
"""What coremltools said when it was imported, and of torch's version; it belongs to every conversion.

Whoever imports coremltools first is told all of it, and the next is told nothing. So what is harmless is left
out and its notice about torch is asked for again: one input gives one record, in whichever process it is made.
"""

MLModel = Any
"""A coremltools.models.MLModel; coremltools has no types where this is checked."""

_NUMPY_DTYPES = {DType.INT32: np.int32, DType.FLOAT16: np.float16, DType.FLOAT32: np.float32}


def working_lengths(contract: Contract) -> tuple[int, ...]:
    """The sequence lengths at which the exported graph was found to compute what the model computes."""
    return tuple(
        seq_len
        for seq_len in contract.shapes.all
        if isinstance(contract.shape_validation[shape_key(seq_len)], ShapeOk)
    )


_PASSES = tuple(
    f"common::{name}"
    for name in (
        # Constants and operations that nothing or everything asks for.
        "update_output_dtypes",
        "cast_optimization",
        "noop_elimination",
        "const_elimination",
        "sanitize_input_output_names",
        "const_deduplication",
        "remove_symbolic_reshape",
        "fuse_matmul_weight_bias",
        "fuse_linear_bias",
        "merge_consecutive_reshapes",
        "merge_consecutive_transposes",
        "remove_redundant_ops",
        "dedup_op_and_var_names",
        # What is float32 still, a state above all, becomes float16, and then indices 16 bits wide.
        "add_fp16_cast",
        "add_int16_cast",
        "update_output_dtypes",
        "guard_negative_gather_indices",
        "const_elimination",
        "dead_code_elimination",
        "cast_optimization",
        "dead_code_elimination",
        "add_int16_cast",
        # States are written where they are.
        "canonicalize_inplace_pattern",
        "prefer_state_in_downstream",
        # What the casts left, and the order that the saved program rests on.
        "const_elimination",
        "const_deduplication",
        "topological_reorder",
        "dead_code_elimination",
    )
)
"""Of coremltools' default pipeline, in its order, what has something to do in a decoder's graph.

The whole program is checked after every pass. What is left out is about convolutions, images, recurrent cells,
lookup tables and activations that are spelled out, or cleans again what is clean; it finds nothing here. A test
compares what both pipelines make of a graph.
"""


class PackageFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function of a package, and the graph of the program that it comes from."""

    name: str
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    lengths: tuple[int, ...]
    """The values of T that it admits; () where its inputs have none."""
    default: int | None
    """The value of T where a caller does not choose."""


def package_functions(contract: Contract) -> tuple[PackageFunction, ...]:
    """The functions of the package that the contract's program becomes, `main` first.

    `main` admits every length that passed. `prefill` is one function a length, `prefill_T512`: a program with a
    state and an input of flexible length converts, and Core ML does not load it (apple/coremltools issues 2500 and
    2548).
    """
    lengths = working_lengths(contract)
    primary = contract.shapes.primary
    found = [
        PackageFunction(
            name=MAIN,
            graph=MAIN,
            inputs=contract.inputs,
            outputs=contract.outputs,
            lengths=lengths,
            default=primary,
        )
    ]
    for function in contract.functions:
        follows_t = any(isinstance(dim, str) for spec in function.inputs for dim in spec.shape)
        for seq_len in lengths if follows_t else (None,):
            found.append(
                PackageFunction(
                    name=function.name if seq_len is None else f"{function.name}_{shape_key(seq_len)}",
                    graph=function.name,
                    inputs=function.inputs,
                    outputs=function.outputs,
                    states=contract.states,
                    lengths=() if seq_len is None else (seq_len,),
                    default=seq_len,
                )
            )
    return tuple(found)


def prepared(program: Program, settings: ConvertConfig) -> Program:
    """The program with the dtype that it is converted in; the one given is changed.

    In float16 its weights are cast here, so that coremltools neither scans nor casts them once a function. A weight
    that float16 does not hold leaves all of them as they are: coremltools then keeps the operation in float32.
    """
    if settings.compute_precision == "float32" or isinstance(program, ExportedMain):
        return program  # an exported program's dtypes are part of it: coremltools casts them
    largest = torch.finfo(torch.float16).max
    weights = [tensor for tensor in program.state_dict().values() if tensor.is_floating_point()]
    if any(float(tensor.abs().max()) > largest for tensor in weights if tensor.numel()):
        return program
    return program.half()


def convert_function(program: Program, function: PackageFunction, settings: ConvertConfig) -> MLModel:
    """Convert one graph of a prepared program to an ML Program with the names, dtypes and lengths of `function`.

    Outputs have the contract's dtype, float32, although the package computes in float16: they are what the
    graph returns, samplers compute in float32 anyway, and the cast is one operation an output.

    Raises:
        Exception: whatever coremltools raises; it has no error type of its own.
    """
    graph = find_function(program, function.graph)
    return ct.convert(
        graph.converted_form() if isinstance(graph, ExportedMain) else graph,
        convert_to="mlprogram",
        inputs=[_input_type(spec, function) for spec in function.inputs],
        outputs=[ct.TensorType(name=spec.name, dtype=_NUMPY_DTYPES[spec.dtype]) for spec in function.outputs],
        states=[
            ct.StateType(
                wrapped_type=ct.TensorType(shape=spec.shape, dtype=_NUMPY_DTYPES[spec.dtype]), name=spec.name
            )
            for spec in function.states
        ]
        or None,
        minimum_deployment_target=getattr(ct.target, settings.deployment_target),
        compute_precision={"float16": ct.precision.FLOAT16, "float32": ct.precision.FLOAT32}[
            settings.compute_precision
        ],
        pass_pipeline=decoder_passes(),
        skip_model_load=True,
    )


def decoder_passes() -> Any:
    """coremltools' default pipeline, less the passes that find nothing in a decoder's graph."""
    return ct.PassPipeline(pass_names=list(_PASSES), pipeline_name="coremill decoder")


def _input_type(spec: TensorSpec, function: PackageFunction) -> Any:
    if function.default is None or not any(isinstance(dim, str) for dim in spec.shape):
        return ct.TensorType(name=spec.name, shape=spec.at(), dtype=_NUMPY_DTYPES[spec.dtype])
    shape = spec.at(T=function.default)
    if len(function.lengths) > 1:
        # The listed lengths and no others, so that Core ML can plan for each; the primary is the default.
        shape = ct.EnumeratedShapes(shapes=[spec.at(T=each) for each in function.lengths], default=shape)
    return ct.TensorType(name=spec.name, shape=shape, dtype=_NUMPY_DTYPES[spec.dtype])
