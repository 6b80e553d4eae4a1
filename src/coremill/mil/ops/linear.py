"""Matrix products, accumulated in fp32.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.registry import Tensors, op


@op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear: x (..., D_in) · weight (D_out, D_in) transposed + bias (D_out,)."""
    if x.is_floating_point():
        return F.linear(x, weight, bias)
    product = torch.matmul(x, weight.transpose(0, 1))
    return product if bias is None else product + bias


@op("matmul")
def matmul(x: Tensor, y: Tensor, *, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """matmul: product of the last two dimensions, the others broadcast; a flag swaps an input's last two first."""
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.dim() > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


@op("einsum")
def einsum(values: Tensors, *, equation: str) -> Tensor:
    """einsum: the sum of products that the equation spells; sizes of 1 broadcast."""
    return torch.einsum(equation, *values)
