"""Gathers and scatters.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.scatter_gather` and of the same name `iOS16`
(`batch_dims`) and `iOS17` (`validate_indices`; an index below 0 is out of bounds).

An index out of bounds is always an error here. iOS17's `validate_indices` tells whether Core ML checks; without it
the behavior "is undefined but memory safe". A reference that gave some value there would hide what fails on a
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.axes import axis_of
from coremill.mil.ops.registry import OperationError, op

EITHER_END = {"negative": True, "validate_indices": False}
"""Before iOS17 a negative index counts from the end."""

FROM_ZERO = {"negative": False}


def _in_bounds(indices: Tensor, size: int, axis: int, *, negative: bool) -> Tensor:
    """Return the indices as non-negative int64.

    Raises:
        OperationError: one is outside [0, size), or [-size, size) where negative ones count from the end.
    """
    if indices.numel() == 0:
        return indices.long()
    low, high = (int(bound) for bound in torch.aminmax(indices))
    lowest = -size if negative else 0
    if low < lowest or high >= size:
        found = low if low < lowest else high
        raise OperationError(
            f"index {found} is out of bounds: axis {axis} has {size} elements, indices are {lowest} to {size - 1}"
        )
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices) if low < 0 else indices


def _check_batch(x: Tensor, indices: Tensor, batch_dims: int, limit: int) -> None:
    """Check that both shapes begin with the batch dimensions, at most `limit` of them."""
    if not 0 <= batch_dims <= min(limit, indices.dim()):
        raise OperationError(f"batch_dims {batch_dims}, expected 0 to {min(limit, indices.dim())}")
    if x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise OperationError(
            f"x of shape {list(x.shape)} and indices of shape {list(indices.shape)}, expected {batch_dims} equal "
            "first sizes"
        )


def _check_along_axis(data: Tensor, indices: Tensor, axis: int) -> None:
    """Check the shapes: torch silently ignores elements that smaller indices do not reach."""
    expected = (*data.shape[:axis], -1, *data.shape[axis + 1 :])
    if (*indices.shape[:axis], -1, *indices.shape[axis + 1 :]) != expected or indices.dim() != data.dim():
        raise OperationError(
            f"indices of shape {list(indices.shape)}, which must be {list(data.shape)} but along axis {axis}"
        )


def _check_updates(updates: Tensor, expected: tuple[int, ...]) -> None:
    if updates.shape != expected:
        raise OperationError(f"updates of shape {list(updates.shape)}, which must be {list(expected)}")


def _gather(x: Tensor, indices: Tensor, axis: int, batch_dims: int, *, negative: bool) -> Tensor:
    axis = axis_of(x.dim(), axis)
    _check_batch(x, indices, batch_dims, axis)
    flat = _in_bounds(indices, x.shape[axis], axis, negative=negative)
    if batch_dims == 0:
        if indices.dim() == 0:
            return x.select(axis, int(flat))
        picked = x.index_select(axis, flat.reshape(-1))
        return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])
    batch = x.shape[:batch_dims]
    rows = x.reshape((-1, *x.shape[batch_dims:]))
    lists = flat.reshape((-1, *indices.shape[batch_dims:]))
    gathered = [
        _gather(row, each, axis - batch_dims, 0, negative=negative) for row, each in zip(rows, lists, strict=True)
    ]
    result = torch.stack(gathered)
    return result.reshape(batch + result.shape[1:])


@op("gather", native=True, fixed={**EITHER_END, "batch_dims": 0})
@op("gather", since=16, native=True, fixed=EITHER_END)
@op("gather", since=17, native=True, fixed=FROM_ZERO)
def gather(
    x: Tensor,
    indices: Tensor,
    *,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
    negative: bool,
) -> Tensor:
    """gather: slices of x along the axis, which the shape of `indices` replaces."""
    return _gather(x, indices, axis, batch_dims, negative=negative)


@op("gather_along_axis", native=True, fixed=EITHER_END)
@op("gather_along_axis", since=17, native=True, fixed=FROM_ZERO)
def gather_along_axis(
    x: Tensor, indices: Tensor, *, axis: int = 0, validate_indices: bool = False, negative: bool
) -> Tensor:
    """gather_along_axis: at each position, the element of x at the index that `indices` holds along the axis."""
    axis = axis_of(x.dim(), axis)
    _check_along_axis(x, indices, axis)
    return torch.gather(x, axis, _in_bounds(indices, x.shape[axis], axis, negative=negative))


def _nd_index(indices: Tensor, sizes: torch.Size, *, negative: bool) -> tuple[Tensor, ...]:
    """The columns of (…, K) indices, each checked against its axis."""
    if indices.dim() == 0 or indices.shape[-1] > len(sizes):
        raise OperationError(f"indices of shape {list(indices.shape)} into the sizes {list(sizes)}")
    return tuple(
        _in_bounds(column, sizes[axis], axis, negative=negative) for axis, column in enumerate(indices.unbind(-1))
    )


def _gather_nd(x: Tensor, indices: Tensor, batch_dims: int, *, negative: bool) -> Tensor:
    _check_batch(x, indices, batch_dims, x.dim())
    if batch_dims == 0:
        return x[_nd_index(indices, x.shape, negative=negative)]
    batch = x.shape[:batch_dims]
    rows = x.reshape((-1, *x.shape[batch_dims:]))
    lists = indices.reshape((-1, *indices.shape[batch_dims:]))
    result = torch.stack(
        [_gather_nd(row, each, 0, negative=negative) for row, each in zip(rows, lists, strict=True)]
    )
    return result.reshape(batch + result.shape[1:])


@op("gather_nd", native=True, fixed={**EITHER_END, "batch_dims": 0})
@op("gather_nd", since=16, native=True, fixed=EITHER_END)
@op("gather_nd", since=17, native=True, fixed=FROM_ZERO)
def gather_nd(
    x: Tensor, indices: Tensor, *, batch_dims: int = 0, validate_indices: bool = False, negative: bool
) -> Tensor:
    """gather_nd: slices of x at the positions that the last axis of `indices` holds."""
    return _gather_nd(x, indices, batch_dims, negative=negative)


_REDUCTIONS = {"mul": "prod", "max": "amax", "min": "amin"}


def _combine(data: Tensor, axis: int, index: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Combine `updates` into a copy of `data` at `index`, of the same shape, along the axis."""
    if mode == "update":
        return data.scatter(axis, index, updates)
    if mode in ("add", "sub"):
        return data.scatter_add(axis, index, updates if mode == "add" else -updates)
    if mode in _REDUCTIONS:
        return data.scatter_reduce(axis, index, updates, _REDUCTIONS[mode])
    if mode == "div":
        divisors = torch.ones_like(data).scatter_reduce(axis, index, updates, "prod")
        return data / divisors if data.is_floating_point() else torch.div(data, divisors, rounding_mode="trunc")
    raise OperationError(f"mode {mode!r}, expected one of update, add, sub, mul, div, max, min")


@op("scatter", fixed=EITHER_END)
@op("scatter", since=17, fixed=FROM_ZERO)
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    *,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
    negative: bool,
) -> Tensor:
    """scatter: combine slices of `updates` into a copy of `data` at `indices` along the axis."""
    axis = axis_of(data.dim(), axis)
    flat = _in_bounds(indices, data.shape[axis], axis, negative=negative)
    expected = data.shape[:axis] + indices.shape + data.shape[axis + 1 :]
    _check_updates(updates, expected)
    along = [1] * data.dim()
    along[axis] = -1
    updates = updates.reshape((*data.shape[:axis], -1, *data.shape[axis + 1 :]))
    return _combine(data, axis, flat.reshape(along).expand_as(updates), updates, mode)


@op("scatter_along_axis", fixed=EITHER_END)
@op("scatter_along_axis", since=17, fixed=FROM_ZERO)
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    *,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
    negative: bool,
) -> Tensor:
    """scatter_along_axis: combine each update into a copy of `data` at its index along the axis."""
    axis = axis_of(data.dim(), axis)
    _check_along_axis(data, indices, axis)
    _check_updates(updates, indices.shape)
    return _combine(data, axis, _in_bounds(indices, data.shape[axis], axis, negative=negative), updates, mode)


@op("scatter_nd", fixed=EITHER_END)
@op("scatter_nd", since=17, fixed=FROM_ZERO)
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    *,
    mode: str = "add",
    validate_indices: bool = False,
    negative: bool,
) -> Tensor:
    """scatter_nd: combine slices of `updates` into a copy of `data` where the last axis of `indices` points."""
    columns = _nd_index(indices, data.shape, negative=negative)
    depth = indices.shape[-1]
    slice_shape = data.shape[depth:]
    _check_updates(updates, indices.shape[:-1] + slice_shape)
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
    for column, size in zip(columns, data.shape[:depth], strict=True):
        row = row * size + column
    rows = data.reshape((-1, *slice_shape))
    updates = updates.reshape((-1, *slice_shape))
    index = row.reshape((-1,) + (1,) * len(slice_shape)).expand_as(updates)
    return _combine(rows, 0, index, updates, mode).reshape(data.shape)
