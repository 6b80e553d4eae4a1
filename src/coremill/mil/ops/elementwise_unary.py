"""Elementwise operations of one input.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.elementwise_unary`, and `iOS17` of the same
name for more integer types and the stricter `clip`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coremill.mil.ops.registry import OperationError, op
from coremill.mil.values import ElementType


@op("abs", native=True)
def absolute(x: Tensor) -> Tensor:
    """abs: |x|."""
    return torch.abs(x)


@op("acos")
def acos(x: Tensor) -> Tensor:
    """acos: inverse cosine, NaN outside [-1, 1]."""
    return torch.acos(x)


@op("asin")
def asin(x: Tensor) -> Tensor:
    """asin: inverse sine, NaN outside [-1, 1]."""
    return torch.asin(x)


@op("atan")
def atan(x: Tensor) -> Tensor:
    """atan: inverse tangent."""
    return torch.atan(x)


@op("atanh")
def atanh(x: Tensor) -> Tensor:
    """atanh: inverse hyperbolic tangent."""
    return torch.atanh(x)


@op("ceil", native=True)
def ceil(x: Tensor) -> Tensor:
    """ceil: the least integer that is not below x."""
    return torch.ceil(x)


@op("clip", native=True, fixed={"is_strict": False})
@op("clip", since=17, native=True, fixed={"is_strict": True})
def clip(x: Tensor, *, alpha: float, beta: float, is_strict: bool) -> Tensor:
    """clip: x clamped to [alpha, beta]; NaN stays NaN. From iOS17 on, alpha must be below beta."""
    if is_strict and not alpha < beta:
        raise OperationError(f"alpha {alpha} and beta {beta}; alpha must be below beta")
    return torch.clamp(x, alpha, beta)


@op("cos", native=True)
def cos(x: Tensor) -> Tensor:
    """cos: cosine."""
    return torch.cos(x)


@op("cosh")
def cosh(x: Tensor) -> Tensor:
    """cosh: hyperbolic cosine."""
    return torch.cosh(x)


@op("erf")
def erf(x: Tensor) -> Tensor:
    """erf: the Gauss error function."""
    return torch.erf(x)


@op("exp", native=True)
def exp(x: Tensor) -> Tensor:
    """exp: e^x."""
    return torch.exp(x)


@op("exp2")
def exp2(x: Tensor) -> Tensor:
    """exp2: 2^x, in the dtype of x."""
    return torch.exp2(x if x.is_floating_point() else x.double()).to(x.dtype)


@op("floor", native=True)
def floor(x: Tensor) -> Tensor:
    """floor: the greatest integer that is not above x."""
    return torch.floor(x)


@op("inverse")
def inverse(x: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """inverse: 1 / (x + epsilon)."""
    return torch.reciprocal(x + epsilon)


@op("log")
def log(x: Tensor, *, epsilon: float = 1e-45) -> Tensor:
    """log: natural logarithm of x + epsilon."""
    return torch.log(x + epsilon)


@op("logical_not", native=True)
def logical_not(x: Tensor) -> Tensor:
    """logical_not: true where x is 0 or false."""
    return torch.logical_not(x)


@op("round", native=True)
def round_half_even(x: Tensor) -> Tensor:
    """round: to the nearest integer, halves to the even one, as its value inference (numpy.round) does."""
    return torch.round(x)


@op("rsqrt")
def rsqrt(x: Tensor, *, epsilon: float = 1e-12) -> Tensor:
    """rsqrt: 1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + epsilon)


@op("sign", native=True)
def sign(x: Tensor) -> Tensor:
    """sign: -1, 0 or 1."""
    return torch.sign(x)


@op("sin")
def sin(x: Tensor) -> Tensor:
    """sin: sine."""
    return torch.sin(x)


@op("sinh")
def sinh(x: Tensor) -> Tensor:
    """sinh: hyperbolic sine."""
    return torch.sinh(x)


@op("sqrt", native=True)
def sqrt(x: Tensor) -> Tensor:
    """sqrt: square root, NaN below 0."""
    return torch.sqrt(x)


@op("square", native=True)
def square(x: Tensor) -> Tensor:
    """square: x²."""
    return x * x


@op("tan")
def tan(x: Tensor) -> Tensor:
    """tan: tangent."""
    return torch.tan(x)


@op("tanh", native=True)
def tanh(x: Tensor) -> Tensor:
    """tanh: hyperbolic tangent."""
    return torch.tanh(x)


@op("threshold", native=True)
def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    """threshold: the larger of x and alpha."""
    return torch.maximum(x, alpha)


@op("cast", native=True)
def cast(x: Tensor, *, dtype: ElementType) -> Tensor:
    """cast: convert x to another type.

    What the documentation leaves open: fractions are truncated; a number outside an integer type's range saturates
    and NaN becomes 0, as on the ARM processors that Core ML runs on. An integer that does not fit a narrower
    integer type is an error: converters narrow token ids this way (int32 to uint16 before a `gather`), and a
    wrapped id would select another token.
    """
    if x.dtype == dtype.storage and not dtype.is_integer:
        return x
    if not dtype.is_integer:
        return x != 0 if dtype.storage is torch.bool else x.to(dtype.storage)
    if x.is_floating_point():
        return _float_to_integer(x, dtype)
    if x.dtype is not torch.bool and x.numel() and not _fits(x.dtype, dtype):
        low, high = (int(bound) for bound in torch.aminmax(x))
        if low < dtype.low or high > dtype.high:
            found = low if low < dtype.low else high
            raise OperationError(f"the value {found} does not fit {dtype.name} ({dtype.low} to {dtype.high})")
    return x.to(dtype.storage)


def _fits(source: torch.dtype, target: ElementType) -> bool:
    info = torch.iinfo(source)
    return bool(target.low <= info.min and info.max <= target.high)


def _float_to_integer(x: Tensor, dtype: ElementType) -> Tensor:
    # In float64 both ends of every integer type up to 32 bits are exact.
    whole = torch.nan_to_num(x.double().trunc(), nan=0.0)
    return whole.clamp(float(dtype.low), float(dtype.high)).to(dtype.storage)
