"""Reductions; without `axes`, over all of them.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.reduction`, and `iOS17` of the same name for
`output_dtype`. Of integers, a result that is declared an integer loses its fraction, as value inference does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.axes import axes_of
from coremill.mil.ops.registry import Ints, op
from coremill.mil.values import INT32, ElementType


def _axes(x: Tensor, axes: Ints | None) -> Ints:
    return tuple(range(x.dim())) if axes is None else axes_of(x.dim(), axes)


def _float(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.double()


@op("reduce_sum")
def reduce_sum(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_sum: the sum."""
    return torch.sum(x, _axes(x, axes), keep_dims, dtype=x.dtype)


@op("reduce_mean")
def reduce_mean(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_mean: the mean."""
    return torch.mean(_float(x), _axes(x, axes), keep_dims).to(x.dtype)


@op("reduce_max", native=True)
def reduce_max(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_max: the largest."""
    return torch.amax(x, _axes(x, axes), keep_dims)


@op("reduce_min", native=True)
def reduce_min(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_min: the smallest."""
    return torch.amin(x, _axes(x, axes), keep_dims)


@op("reduce_prod")
def reduce_prod(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_prod: the product."""
    # From the last axis to the first, so that removing one does not renumber the others.
    for axis in reversed(_axes(x, axes)):
        x = torch.prod(x, axis, keep_dims, dtype=x.dtype)
    return x


@op("reduce_sum_square")
def reduce_sum_square(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_sum_square: the sum of squares."""
    return reduce_sum(x * x, axes=axes, keep_dims=keep_dims)


@op("reduce_l1_norm")
def reduce_l1_norm(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_l1_norm: the sum of absolute values."""
    return reduce_sum(torch.abs(x), axes=axes, keep_dims=keep_dims)


@op("reduce_l2_norm")
def reduce_l2_norm(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_l2_norm: the square root of the sum of squares."""
    return torch.sqrt(_float(reduce_sum_square(x, axes=axes, keep_dims=keep_dims))).to(x.dtype)


@op("reduce_log_sum")
def reduce_log_sum(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_log_sum: the natural logarithm of the sum."""
    return torch.log(_float(reduce_sum(x, axes=axes, keep_dims=keep_dims))).to(x.dtype)


@op("reduce_log_sum_exp")
def reduce_log_sum_exp(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """reduce_log_sum_exp: log(sum(exp(x))), shifted by the largest value to avoid overflow."""
    return torch.logsumexp(_float(x), _axes(x, axes), keep_dims).to(x.dtype)


@op("reduce_argmax", native=True, fixed={"output_dtype": INT32})
@op("reduce_argmax", since=17, native=True)
def reduce_argmax(
    x: Tensor, *, axis: int = -1, keep_dims: bool = False, output_dtype: ElementType = INT32
) -> Tensor:
    """reduce_argmax: index of the largest; the first one in a tie, which the documentation leaves open."""
    return torch.argmax(x, axis, keep_dims).to(output_dtype.storage)


@op("reduce_argmin", native=True, fixed={"output_dtype": INT32})
@op("reduce_argmin", since=17, native=True)
def reduce_argmin(
    x: Tensor, *, axis: int = -1, keep_dims: bool = False, output_dtype: ElementType = INT32
) -> Tensor:
    """reduce_argmin: index of the smallest; the first one in a tie, which the documentation leaves open."""
    return torch.argmin(x, axis, keep_dims).to(output_dtype.storage)
