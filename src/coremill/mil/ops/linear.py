"""Matrix products, accumulated in fp32.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.linear`, and `iOS17.linear` for inputs of
different types, where a constant is converted to the type of the other input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.registry import Tensors, op

_PIECE_ELEMENTS = 1 << 21
"""Elements of a weight that are widened at a time: 8 MiB of fp32. Smaller is slower, larger needs more memory."""

_BLOCK_ROWS = 512
"""Rows of x that are widened and multiplied at a time."""

_FEW_ROWS = 4
"""Up to this many rows, reading the weight dominates, and fp16 is half the size of fp32."""

_onednn_linear = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
"""oneDNN's linear layer, which torch's compiler uses: on some processors a fifth faster than F.linear in fp32."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, D_in) · weight (D_out, D_in) transposed + bias (D_out,), all of one type."""
    if _onednn_linear is None or x.device.type != "cpu" or x.dtype is not torch.float32:
        return F.linear(x, weight, bias)
    product: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
    return product


@op("linear", native=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear: x (..., D_in) · weight (D_out, D_in) transposed + bias (D_out,)."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if not dtype.is_floating_point:  # torch has no F.linear of integers
        product = torch.matmul(x.to(dtype), weight.to(dtype).transpose(0, 1))
        return (product if bias is None else product + bias).to(x.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    if x.dtype is weight.dtype is dtype:
        return F.linear(x, weight, None if bias is None else bias.to(dtype))
    product = _widened_linear(x.reshape(-1, x.shape[-1]), weight, bias, dtype)
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (M, D_in), weight (D_out, D_in), bias (D_out,): (M, D_out) of x's dtype, summed in `dtype`, rounded once.

    The weight is never widened as a whole: that would take twice its size.
    """
    # coremltools adds zeros as the bias of a layer without one.
    unbiased = bias is None or not bias.any()
    is_half = x.dtype is weight.dtype is torch.float16
    if is_half and unbiased and 0 < len(x) <= _FEW_ROWS and x.device.type == "cpu":
        # torch's product of an fp16 matrix and one vector sums in fp32; its products of two matrices are slow here.
        return torch.cat([F.linear(x[row : row + 1], weight) for row in range(len(x))])
    product = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    piece_rows = max(1, _PIECE_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), piece_rows):
        columns = slice(start, start + piece_rows)
        wide_weight, wide_bias = weight[columns].to(dtype), None if bias is None else bias[columns].to(dtype)
        for first in range(0, len(x), _BLOCK_ROWS):
            rows = slice(first, first + _BLOCK_ROWS)
            product[rows, columns] = _product(x[rows].to(dtype), wide_weight, wide_bias)
    return product


@op("matmul")
def matmul(x: Tensor, y: Tensor, *, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """matmul: product of the last two dimensions, the others broadcast; a flag swaps an input's last two first."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.dim() > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x.to(dtype), y.to(dtype))


@op("einsum")
def einsum(values: Tensors, *, equation: str) -> Tensor:
    """einsum: the sum of products that the equation specifies; sizes of 1 broadcast."""
    return torch.einsum(equation, *values)
