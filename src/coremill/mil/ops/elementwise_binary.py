"""Elementwise operations of two inputs, broadcast as numpy does.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.elementwise_binary`. Its value inference
names the numpy function that each stands for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.registry import OperationError, op


def _refuse_zero(divisor: Tensor) -> None:
    if not divisor.is_floating_point() and bool((divisor == 0).any()):
        raise OperationError("integer division by zero")


@op("add", native=True)
def add(x: Tensor, y: Tensor) -> Tensor:
    """add: x + y."""
    return x + y


@op("sub", native=True)
def sub(x: Tensor, y: Tensor) -> Tensor:
    """sub: x - y."""
    return x - y


@op("mul", native=True)
def mul(x: Tensor, y: Tensor) -> Tensor:
    """mul: x * y."""
    return x * y


@op("real_div", native=True)
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """real_div: x / y. Of integers, whose result is declared an integer, the quotient without its fraction."""
    if x.is_floating_point():
        return x / y
    _refuse_zero(y)
    return torch.div(x, y, rounding_mode="trunc")


@op("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    """floor_div: x / y rounded down."""
    _refuse_zero(y)
    return torch.floor_divide(x, y)


@op("mod")
def mod(x: Tensor, y: Tensor) -> Tensor:
    """mod: what remains of x after floor_div by y; it has y's sign, as numpy.mod."""
    _refuse_zero(y)
    return torch.remainder(x, y)


@op("pow", native=True)
def power(x: Tensor, y: Tensor) -> Tensor:
    """pow: x^y."""
    # torch squares, cubes and roots by a number directly, and by a tensor through exp and log.
    return torch.pow(x, y.item() if y.dim() == 0 and x.is_floating_point() else y)


@op("maximum", native=True)
def maximum(x: Tensor, y: Tensor) -> Tensor:
    """maximum: the larger one, NaN where either is NaN."""
    return torch.maximum(x, y)


@op("minimum", native=True)
def minimum(x: Tensor, y: Tensor) -> Tensor:
    """minimum: the smaller value, NaN where either is NaN."""
    return torch.minimum(x, y)


@op("equal", native=True)
def equal(x: Tensor, y: Tensor) -> Tensor:
    """equal: x = y, a bool."""
    return torch.eq(x, y)


@op("not_equal", native=True)
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    """not_equal: x ≠ y, a bool."""
    return torch.ne(x, y)


@op("greater", native=True)
def greater(x: Tensor, y: Tensor) -> Tensor:
    """greater: x > y, a bool."""
    return torch.gt(x, y)


@op("greater_equal", native=True)
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    """greater_equal: x ≥ y, a bool."""
    return torch.ge(x, y)


@op("less", native=True)
def less(x: Tensor, y: Tensor) -> Tensor:
    """less: x < y, a bool."""
    return torch.lt(x, y)


@op("less_equal", native=True)
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    """less_equal: x ≤ y, a bool."""
    return torch.le(x, y)


@op("logical_and", native=True)
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    """logical_and: whether both are true."""
    return torch.logical_and(x, y)


@op("logical_or", native=True)
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    """logical_or: whether either is true."""
    return torch.logical_or(x, y)


@op("logical_xor", native=True)
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    """logical_xor: whether exactly one is true."""
    return torch.logical_xor(x, y)
