"""Convolutions over one, two or three spatial dimensions, accumulated in fp32.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS15.conv`, `iOS17` of the same name for weights
of another float type than `x`, and `_utils.aggregated_pad` in the same package for `same` padding, which is
TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from coremill.mil.ops.registry import Ints, OperationError, op

Padding = tuple[tuple[int, int], ...]
"""Elements before and after, for each spatial dimension."""

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def spatial_rank(x: Tensor) -> int:
    """Number of spatial dimensions of x (N, C, *D).

    Raises:
        OperationError: there are fewer than one or more than three.
    """
    rank: int = x.dim() - 2
    if not 1 <= rank <= 3:
        raise OperationError(f"x is of shape {list(x.shape)}, expected (N, C) and 1 to 3 spatial dimensions")
    return rank


def each_dimension(name: str, values: Ints | None, count: int, default: int) -> Ints:
    """Return one value per dimension; `default` for each if `values` is None.

    Raises:
        OperationError: the number of values is not `count`.
    """
    if values is None:
        return (default,) * count
    if len(values) != count:
        raise OperationError(f"{name} {list(values)}, expected {count} values")
    return values


def window_padding(
    pad_type: str, pad: Ints | None, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> Padding:
    """Return the padding that a pad type gives for windows that slide over spatial dimensions.

    Args:
        pad: before and after each dimension; only used by `custom`.
        sizes: of the spatial dimensions of x.
        windows: sizes of the window, dilation included.

    Raises:
        OperationError: an unknown pad type, or a `pad` without two values per dimension.
    """
    kind = pad_type.lower()
    if kind == "custom":
        values = each_dimension("pad", pad, 2 * len(sizes), 0)
        return tuple(zip(values[::2], values[1::2], strict=True))
    if kind == "valid":
        return ((0, 0),) * len(sizes)
    if kind not in ("same", "same_lower"):
        raise OperationError(f"pad type {pad_type!r}, expected one of valid, same, same_lower, custom")
    padding = []
    for size, window, stride in zip(sizes, windows, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + window - size)
        less, more = total // 2, total - total // 2
        padding.append((less, more) if kind == "same" else (more, less))
    return tuple(padding)


def pad_spatial(x: Tensor, padding: Padding, value: float) -> Tensor:
    """Pad the spatial dimensions of x with `value`; negative padding crops them."""
    if not any(any(each) for each in padding):
        return x
    # torch counts from the last dimension.
    return F.pad(x, [amount for each in reversed(padding) for amount in each], value=value)


@op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """conv: x (N, C_in, *D) correlated with weight (C_out, C_in / groups, *K), + bias (C_out,).

    `pad` only applies to the pad type `custom`. `same` makes ceil(D / stride) windows and puts an odd element of
    padding after x, `same_lower` before it.
    """
    rank = spatial_rank(x)
    strides = each_dimension("strides", strides, rank, 1)
    dilations = each_dimension("dilations", dilations, rank, 1)
    windows = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True)]
    padding = window_padding(pad_type, pad, x.shape[2:], windows, strides)
    symmetric: tuple[int, ...] = (0,) * rank
    if all(before == after >= 0 for before, after in padding):
        symmetric = tuple(before for before, _ in padding)  # torch applies symmetric padding without a copy of x.
    else:
        x = pad_spatial(x, padding, 0)
    return _CONVOLVE[rank](x, weight, bias, strides, symmetric, dilations, groups)


@op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """conv_transpose: the transpose of the conv that would map the result to x; weight (C_in, C_out / groups, *K).

    Without padding a dimension of x of size D gives (D - 1) · stride + (K - 1) · dilation + 1. `custom` crops that
    by `pad`, `same` crops it to D · stride. An `output_shape` keeps the padding before and moves the end:
    elements that no product reaches are 0 (+ bias).
    """
    rank = spatial_rank(x)
    strides = each_dimension("strides", strides, rank, 1)
    dilations = each_dimension("dilations", dilations, rank, 1)
    products = _CONVOLVE_TRANSPOSED[rank](x, weight, None, strides, 0, 0, groups, dilations)
    full = products.shape[2:]
    kept = None if output_shape is None else each_dimension("output_shape", output_shape, rank + 2, 0)[2:]
    if pad_type.lower() == "same":
        kept = kept or tuple(size * stride for size, stride in zip(x.shape[2:], strides, strict=True))
        begins = [max(0, size - keep) // 2 for size, keep in zip(full, kept, strict=True)]
    elif pad_type.lower() in ("valid", "custom"):
        padding = window_padding(pad_type, pad, full, full, strides)
        begins = [before for before, _ in padding]
        kept = kept or tuple(size - sum(each) for size, each in zip(full, padding, strict=True))
    else:
        raise OperationError(f"pad type {pad_type!r}, expected one of valid, same, custom")
    cut = tuple((-begin, begin + keep - size) for begin, keep, size in zip(begins, kept, full, strict=True))
    result = pad_spatial(products, cut, 0)
    return result if bias is None else result + bias.reshape((-1,) + (1,) * rank)


@op("conv_quantized")
def conv_quantized(
    x: Tensor,
    weight: Tensor,
    quant_scale: Tensor,
    quant_bias: Tensor,
    bias: Tensor | None = None,
    *,
    quantization_type: str,
    nbits: int = 8,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """conv_quantized: conv with weight quant_scale · weight + quant_bias; each a scalar or (C_out,).

    weight holds one uint8 an element whatever `nbits`. bias, of uint8 too, is added as the number it is, which is
    what the older neural network format makes of it. A look-up table has no input to come in by: refused.
    """
    if quantization_type != "linear":
        raise OperationError(
            f"quantization type {quantization_type!r}, expected 'linear', as no input gives a table"
        )
    if not 1 <= nbits <= 8:
        raise OperationError(f"weights of {nbits} bits, expected 1 to 8")
    per_channel = (-1,) + (1,) * (weight.dim() - 1)
    dense = weight.to(x.dtype) * quant_scale.reshape(per_channel) + quant_bias.reshape(per_channel)
    return conv(
        x,
        dense,
        None if bias is None else bias.to(x.dtype),
        strides=strides,
        pad_type=pad_type,
        pad=pad,
        dilations=dilations,
        groups=groups,
    )
