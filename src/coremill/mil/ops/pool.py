"""Pooling over one, two or three spatial dimensions.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.pool`; number of windows:
`_utils.spatial_dimensions_out_shape` in the same package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.conv import Padding, each_dimension, pad_spatial, spatial_rank, window_padding
from coremill.mil.ops.registry import Ints, OperationError, op


@dataclass(frozen=True, slots=True)
class _Windows:
    """The positions of pooling windows, for each spatial dimension."""

    sizes: Ints
    strides: Ints
    padding: Padding
    counts: Ints
    """Number of windows."""

    def pool(self, x: Tensor, pad_value: float, torch_pool: dict[int, Callable[..., Tensor]]) -> Tensor:
        """Pool x (N, C, *D) to (N, C, *counts)."""
        around = []
        for size, (before, after), stride, window, count in zip(
            x.shape[2:], self.padding, self.strides, self.sizes, self.counts, strict=True
        ):
            # With ceil_mode the last window may extend past the padding.
            end = max(after, (count - 1) * stride + window - before - size)
            around.append((before, end))
        padded = pad_spatial(x, tuple(around), pad_value)
        if len(self.sizes) == 1:  # torch sums windows only in two and three dimensions.
            return torch_pool[2](padded.unsqueeze(2), (1, *self.sizes), (1, *self.strides)).squeeze(2)
        return torch_pool[len(self.sizes)](padded, self.sizes, self.strides)

    def elements(self, x: Tensor, *, with_padding: bool) -> Tensor:
        """The number of elements in each window, (*counts,): of x, or of x and its padding."""
        total = torch.ones((), dtype=x.dtype)
        for size, (before, after), stride, window, count in zip(
            x.shape[2:], self.padding, self.strides, self.sizes, self.counts, strict=True
        ):
            first, last = (0, before + size + after) if with_padding else (before, before + size)
            held = [max(0, min(each * stride + window, last) - max(each * stride, first)) for each in range(count)]
            total = total.unsqueeze(-1) * torch.tensor(held, dtype=x.dtype)
        return total


def _windows(
    x: Tensor, kernel_sizes: Ints, strides: Ints | None, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> _Windows:
    rank = spatial_rank(x)
    sizes = each_dimension("kernel_sizes", kernel_sizes, rank, 1)
    strides = each_dimension("strides", strides, rank, 1)
    padding = window_padding(pad_type, pad, x.shape[2:], sizes, strides)
    if ceil_mode and any(before != after for before, after in padding):
        raise OperationError(
            f"padding {[list(each) for each in padding]}, expected the same on both sides in ceil_mode"
        )
    counts = tuple(map(_count, x.shape[2:], padding, sizes, strides, [ceil_mode] * rank))
    return _Windows(sizes, strides, padding, counts)


def _count(size: int, padding: tuple[int, int], window: int, stride: int, ceil_mode: bool) -> int:
    """Number of windows along one dimension.

    Raises:
        OperationError: there is no room for one.
    """
    room = size + sum(padding) - window
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    # A window that begins after x contains none of it. Without padding the documentation keeps it, unlike torch.
    if ceil_mode and any(padding) and (count - 1) * stride >= size + padding[0]:
        count -= 1
    if count <= 0:
        raise OperationError(f"a window of {window} for {size} elements with padding {list(padding)}")
    return count


def _sum_pool(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sums(x: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
        return pool(x, sizes, strides, divisor_override=1)

    return sums


_SUMS = {2: _sum_pool(F.avg_pool2d), 3: _sum_pool(F.avg_pool3d)}
_MAXIMA: dict[int, Callable[..., Tensor]] = {2: F.max_pool2d, 3: F.max_pool3d}


@op("max_pool", native=True)
def max_pool(
    x: Tensor,
    *,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """max_pool: the greatest element of each window; padding is ignored."""
    return _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode).pool(x, -math.inf, _MAXIMA)


@op("avg_pool")
def avg_pool(
    x: Tensor,
    *,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """avg_pool: the mean of each window; padding counts as zeros or, if excluded, not at all.

    What a window reaches beyond the padding in `ceil_mode` never counts, as in torch.nn.AvgPool2d.
    """
    windows = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return windows.pool(x, 0, _SUMS) / windows.elements(x, with_padding=not exclude_padding_from_average)


@op("l2_pool")
def l2_pool(
    x: Tensor,
    *,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """l2_pool: the square root of each window's sum of squares."""
    return torch.sqrt(_windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode).pool(x.square(), 0, _SUMS))
