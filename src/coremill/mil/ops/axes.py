"""Axis normalisation: a negative axis counts from the end."""

from __future__ import annotations

from coremill.mil.ops.registry import Ints, OperationError


def axis_of(rank: int, axis: int) -> int:
    """Return the axis as an index in [0, rank).

    Raises:
        OperationError: the axis is outside [-rank, rank).
    """
    if not -rank <= axis < rank:
        raise OperationError(f"axis {axis} of a tensor of rank {rank}, whose axes are {-rank} to {rank - 1}")
    return axis % rank


def axes_of(rank: int, axes: Ints) -> Ints:
    """Return the axes as indices in [0, rank), in ascending order.

    Raises:
        OperationError: an axis is outside [-rank, rank), or two are equal.
    """
    found = tuple(sorted(axis_of(rank, axis) for axis in axes))
    if len(set(found)) != len(found):
        raise OperationError(f"axes {list(axes)} of a tensor of rank {rank}, expected each at most once")
    return found
