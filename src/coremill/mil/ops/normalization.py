"""Normalizations, computed in fp32 throughout and rounded at the end.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.normalization`, and `iOS17` of the same name
for a `gamma`, `beta` or `epsilon` of another float type than `x`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.axes import axes_of
from coremill.mil.ops.registry import Ints, op


def _per_channel(values: Tensor, rank: int) -> Tensor:
    """(C,) as (1, C, 1, …) of the given rank."""
    return values.reshape((1, -1) + (1,) * (rank - 2))


def _scale_and_shift(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is not None:
        x = x * gamma
    return x if beta is None else x + beta


@op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
) -> Tensor:
    """batch_norm: gamma · (x - mean) / sqrt(variance + epsilon) + beta, each (C,) along x's second axis."""
    rank = x.dim()
    normed = (x - _per_channel(mean, rank)) * torch.rsqrt(_per_channel(variance, rank) + epsilon)
    return _scale_and_shift(
        normed,
        None if gamma is None else _per_channel(gamma, rank),
        None if beta is None else _per_channel(beta, rank),
    )


@op("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, epsilon: float = 1e-5
) -> Tensor:
    """instance_norm: normalise each channel of each sample by its own mean and variance over the spatial axes."""
    rank = x.dim()
    axes = tuple(range(2, rank))
    mean = x.mean(axes, keepdim=True)
    normed = (x - mean) * torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    return _scale_and_shift(
        normed,
        None if gamma is None else _per_channel(gamma, rank),
        None if beta is None else _per_channel(beta, rank),
    )


@op("layer_norm")
def layer_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    axes: Ints | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """layer_norm: normalise over `axes` (by default all); gamma and beta have the shape of x at those axes."""
    rank = x.dim()
    over = tuple(range(rank)) if axes is None else axes_of(rank, axes)
    # If gamma's axes are not adjacent in x, insert dimensions of 1 between them.
    affine_shape = tuple(size if axis in over else 1 for axis, size in enumerate(x.shape))
    mean = x.mean(over, keepdim=True)
    centered = x - mean
    normed = centered * torch.rsqrt(centered.square().mean(over, keepdim=True) + epsilon)
    return _scale_and_shift(
        normed,
        None if gamma is None else gamma.reshape(affine_shape),
        None if beta is None else beta.reshape(affine_shape),
    )


@op("l2_norm")
def l2_norm(x: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """l2_norm: x / sqrt(sum of squares over the last three axes + epsilon)."""
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


@op("local_response_norm")
def local_response_norm(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """local_response_norm: x / (k + alpha / size · sum of squares of `size` neighbouring channels)^beta."""
    return torch.nn.functional.local_response_norm(x, size, alpha, beta, k)
