"""Quantization of activations.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS17.quantization_ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.axes import axis_of
from coremill.mil.ops.registry import op
from coremill.mil.values import ElementType


def along_axis(values: Tensor, rank: int, axis: int | None) -> Tensor:
    """Return a scalar unchanged, and a vector (N,) as (1, …, N, …, 1) of the given rank."""
    if values.dim() == 0 or axis is None:
        return values
    position = axis_of(rank, axis)
    return values.reshape(tuple(-1 if each == position else 1 for each in range(rank)))


@op("quantize", since=17)
def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    output_dtype: ElementType,
    axis: int | None = None,
) -> Tensor:
    """quantize: round(input / scale) + zero_point, clamped to the output type's range."""
    steps = torch.round(input / along_axis(scale, input.dim(), axis))
    if zero_point is not None:
        steps = steps + along_axis(zero_point, input.dim(), axis)
    return steps.clamp(output_dtype.low, output_dtype.high).to(output_dtype.storage)


@op("dequantize", since=17)
def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
) -> Tensor:
    """dequantize: scale · (input - zero_point)."""
    steps = input.to(scale.dtype)
    if zero_point is not None:
        steps = steps - along_axis(zero_point, input.dim(), axis).to(scale.dtype)
    return steps * along_axis(scale, input.dim(), axis)
