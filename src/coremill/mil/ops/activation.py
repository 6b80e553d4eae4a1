"""Activations, computed in fp32 and rounded once; where torch's own kernel for fp16 does that, by it.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.activation`, and `iOS17` of the same name
for parameters of another float type than `x`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.axes import axis_of
from coremill.mil.ops.registry import OperationError, op

_SQRT_HALF = math.sqrt(0.5)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, …) of x's rank; C is x's second axis."""
    return values.reshape((1, -1) + (1,) * (x.dim() - 2))


@op("clamped_relu")
def clamped_relu(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    """clamped_relu: min(beta, x) where x ≥ 0, else min(beta, alpha · x)."""
    return torch.clamp(torch.where(x >= 0, x, alpha * x), max=beta)


@op("elu")
def elu(x: Tensor, *, alpha: float) -> Tensor:
    """elu: x where x > 0, else alpha · (e^x - 1)."""
    return F.elu(x, alpha)


@op("gelu")
def gelu(x: Tensor, *, mode: str = "EXACT") -> Tensor:
    """gelu: x · Φ(x), exactly or by the tanh or the sigmoid approximation."""
    if mode == "EXACT":
        return 0.5 * x * (1.0 + torch.erf(x * _SQRT_HALF))
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise OperationError(f"mode {mode!r}; EXACT, TANH_APPROXIMATION and SIGMOID_APPROXIMATION are the modes")


@op("leaky_relu")
def leaky_relu(x: Tensor, *, alpha: float) -> Tensor:
    """leaky_relu: x where x ≥ 0, else alpha · x."""
    return F.leaky_relu(x, alpha)


@op("linear_activation")
def linear_activation(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    """linear_activation: alpha · x + beta."""
    return x * alpha + beta


@op("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """prelu: x where x > 0, else alpha · x, one alpha a channel."""
    return torch.where(x > 0, x, _per_channel(alpha, x) * x)


@op("relu", native=True)
def relu(x: Tensor) -> Tensor:
    """relu: max(x, 0)."""
    return torch.relu(x)


@op("relu6", native=True)
def relu6(x: Tensor) -> Tensor:
    """relu6: min(max(x, 0), 6)."""
    return torch.clamp(x, 0, 6)


@op("scaled_tanh")
def scaled_tanh(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    """scaled_tanh: alpha · tanh(beta · x)."""
    return alpha * torch.tanh(beta * x)


@op("sigmoid", native=True)
def sigmoid(x: Tensor) -> Tensor:
    """sigmoid: 1 / (1 + e^-x)."""
    return torch.sigmoid(x)


@op("sigmoid_hard")
def sigmoid_hard(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    """sigmoid_hard: alpha · x + beta held within [0, 1]."""
    return torch.clamp(alpha * x + beta, 0, 1)


@op("silu", native=True)
def silu(x: Tensor) -> Tensor:
    """silu: x · sigmoid(x)."""
    return F.silu(x)


@op("softmax", native=True)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """softmax: e^x / sum of e^x along the axis."""
    return torch.softmax(x, axis_of(x.dim(), axis))


@op("softplus")
def softplus(x: Tensor) -> Tensor:
    """softplus: log(1 + e^x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


@op("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """softplus_parametric: alpha · log(1 + e^(beta · x)), one alpha and beta a channel."""
    return _per_channel(alpha, x) * softplus(_per_channel(beta, x) * x)


@op("softsign")
def softsign(x: Tensor) -> Tensor:
    """softsign: x / (1 + |x|)."""
    return x / (1 + torch.abs(x))


@op("thresholded_relu")
def thresholded_relu(x: Tensor, *, alpha: float) -> Tensor:
    """thresholded_relu: x where x ≥ alpha, else 0."""
    return torch.where(x >= alpha, x, torch.zeros_like(x))
