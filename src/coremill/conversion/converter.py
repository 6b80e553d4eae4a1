"""coremltools, imported without its chatter reaching the terminal, and the conversion of one graph.

Legend: T sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coremill.conversion.diagnostics import Message, Recorder, kind_of, recording
from coremill.conversion.graph import Program
from coremill.core.config import ConvertConfig
from coremill.core.contract import Contract, DType, ShapeOk, TensorSpec, shape_key
from coremill.core.diagnostics import NoticeKind

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

__all__ = ["IMPORT_MESSAGES", "MLModel", "convert_program", "ct", "working_lengths"]

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


def convert_program(program: Program, contract: Contract, settings: ConvertConfig) -> MLModel:
    """Convert `program` to an ML Program with the names, dtypes and lengths of `contract`.

    Outputs have the contract's dtype, float32, although the package computes in float16: they are what the
    graph returns, samplers compute in float32 anyway, and the cast is one operation an output.

    Raises:
        Exception: whatever coremltools raises; it has no error type of its own.
    """
    return ct.convert(
        program,
        convert_to="mlprogram",
        inputs=[_input_type(spec, contract) for spec in contract.inputs],
        outputs=[ct.TensorType(name=spec.name, dtype=_NUMPY_DTYPES[spec.dtype]) for spec in contract.outputs],
        minimum_deployment_target=getattr(ct.target, settings.deployment_target),
        compute_precision={"float16": ct.precision.FLOAT16, "float32": ct.precision.FLOAT32}[
            settings.compute_precision
        ],
        skip_model_load=True,
    )


def _input_type(spec: TensorSpec, contract: Contract) -> Any:
    lengths: Sequence[int] = working_lengths(contract)
    shape = spec.at(T=contract.shapes.primary)
    if len(lengths) > 1 and any(isinstance(dim, str) for dim in spec.shape):
        # The listed lengths and no others, so that Core ML can plan for each; the primary is the default.
        shape = ct.EnumeratedShapes(shapes=[spec.at(T=seq_len) for seq_len in lengths], default=shape)
    return ct.TensorType(name=spec.name, shape=shape, dtype=_NUMPY_DTYPES[spec.dtype])
