"""Axes of tensors as programs give them: below 0 they count from the end."""

from __future__ import annotations

from coremill.mil.ops.registry import Ints, OperationError


def axis_of(rank: int, axis: int) -> int:
    """The axis counted from the first.

    Raises:
        OperationError: it lies outside [-rank, rank).
    """
    if not -rank <= axis < rank:
        raise OperationError(f"axis {axis} of a tensor of rank {rank}, whose axes are {-rank} to {rank - 1}")
    return axis % rank


def axes_of(rank: int, axes: Ints) -> Ints:
    """The axes counted from the first, in ascending order.

    Raises:
        OperationError: one lies outside [-rank, rank), or two are the same.
    """
    found = tuple(sorted(axis_of(rank, axis) for axis in axes))
    if len(set(found)) != len(found):
        raise OperationError(f"axes {list(axes)} of a tensor of rank {rank}, expected each at most once")
    return found
