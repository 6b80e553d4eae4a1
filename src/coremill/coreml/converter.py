"""coremltools, imported with its messages captured, and the conversion of one function of a program.

Legend: T sequence length.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from coremill.core.config import ConvertConfig
from coremill.core.contract import PackageFunction, TensorSpec
from coremill.core.diagnostics import NoticeKind
from coremill.coreml.diagnostics import Message, Recorder, kind_of, recording
from coremill.coreml.exported import ExportedMain
from coremill.coreml.graph import Program, find_function

_at_import = Recorder()
with recording(_at_import):
    import coremltools as ct
    import torch
    from coremltools import _deps

_of_torch = Recorder()
with recording(_of_torch):
    # No public function repeats this notice: this one is private to coremltools 9.0. A version without it fails
    # here with an AttributeError; it must not leave the notice uncounted. See docs/private-dependencies.md.
    _deps._warn_if_above_max_supported_version("Torch", torch.__version__, _deps._TORCH_MAX_VERSION)

__all__ = ["IMPORT_MESSAGES", "MLModel", "Spec", "convert_function", "ct", "decoder_passes", "prepared"]

IMPORT_MESSAGES: tuple[Message, ...] = (
    *(message for message in _at_import.messages if kind_of(message) in (NoticeKind.WARNING, NoticeKind.ERROR)),
    *_of_torch.messages,
)
"""What coremltools reports when it is imported, and about torch's version; part of the log of every conversion.

coremltools prints these messages once per process, to whatever imports it first. To give the same record in every
process, harmless ones are dropped and the notice about torch is requested again.
"""

MLModel: TypeAlias = ct.models.MLModel
Spec: TypeAlias = ct.proto.Model_pb2.Model
"""A model's specification, or a message inside it (protobuf). coremltools ships no types, so mypy sees Any."""


_PASSES = tuple(
    f"common::{name}"
    for name in (
        # Remove what is unused, and merge what is duplicated.
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
        # Whatever is still float32, above all a state, becomes float16; then indices become 16 bits wide.
        "add_fp16_cast",
        "add_int16_cast",
        "update_output_dtypes",
        "guard_negative_gather_indices",
        "const_elimination",
        "dead_code_elimination",
        "cast_optimization",
        "dead_code_elimination",
        "add_int16_cast",
        # Update states in place.
        "canonicalize_inplace_pattern",
        "prefer_state_in_downstream",
        # Clean up after the casts, and sort the operations, which the saved program requires.
        "const_elimination",
        "const_deduplication",
        "topological_reorder",
        "dead_code_elimination",
    )
)
"""The passes of coremltools' default pipeline that change a decoder's graph, in the pipeline's order.

Every pass costs time, because coremltools validates the whole program after each one. The passes that are excluded
rewrite convolutions, images, recurrent cells, lookup tables and composed activations, or repeat a clean-up; none
finds a match here. A test converts the same graphs with both pipelines and compares the results.
"""


def prepared(program: Program, settings: ConvertConfig) -> Program:
    """Cast the program, in place, to the dtype that it is converted in, and return it.

    For float16, the weights are cast here, so that coremltools does not scan and cast them again for each function.
    If float16 cannot represent one of them, none is: coremltools then keeps the affected operation in float32.
    """
    largest = torch.finfo(torch.float16).max
    if settings.compute_precision == "float32" or any(
        float(tensor.abs().max()) > largest for tensor in program.parameters() if tensor.numel()
    ):
        return program.float()
    return program.half()


def convert_function(program: Program, function: PackageFunction, settings: ConvertConfig) -> MLModel:
    """Convert one graph of a prepared program to an ML Program with the names, dtypes and lengths of `function`.

    Outputs keep the contract's dtype, float32, although the package computes in float16: the graph returns float32,
    samplers compute in float32 anyway, and the cast is one operation per output.

    Raises:
        Exception: whatever coremltools raises; it has no error type of its own.
    """
    graph = find_function(program, function.graph)
    return ct.convert(
        graph.decomposed() if isinstance(graph, ExportedMain) else graph,
        convert_to="mlprogram",
        inputs=[_input_type(spec, function) for spec in function.inputs],
        outputs=[ct.TensorType(name=spec.name, dtype=_numpy_type(spec)) for spec in function.outputs],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=spec.shape, dtype=_numpy_type(spec)), name=spec.name)
            for spec in function.states
        ]
        or None,
        minimum_deployment_target=getattr(ct.target, settings.deployment_target),
        compute_precision=getattr(ct.precision, settings.compute_precision.upper()),
        pass_pipeline=decoder_passes(),
        skip_model_load=True,
    )


def decoder_passes() -> ct.PassPipeline:
    """coremltools' default pipeline without the passes that change nothing in a decoder's graph."""
    return ct.PassPipeline(pass_names=list(_PASSES), pipeline_name="coremill decoder")


def _input_type(spec: TensorSpec, function: PackageFunction) -> ct.TensorType:
    if function.default is None or not any(isinstance(dim, str) for dim in spec.shape):
        shape = spec.at()
    elif len(function.lengths) == 1:
        shape = spec.at(T=function.default)
    else:
        # Enumerated rather than a range, so that Core ML can plan for each length; the primary is the default.
        shape = ct.EnumeratedShapes(
            shapes=[spec.at(T=each) for each in function.lengths], default=spec.at(T=function.default)
        )
    return ct.TensorType(name=spec.name, shape=shape, dtype=_numpy_type(spec))


def _numpy_type(spec: TensorSpec) -> type[np.generic]:
    return np.dtype(spec.dtype.value).type
