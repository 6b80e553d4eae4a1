"""Compressed weights: operations on constants, evaluated once when a program is lowered.

Source of the semantics: `coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops` and `iOS18.compression`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coremill.mil.ops.axes import axis_of
from coremill.mil.ops.quantization import along_axis
from coremill.mil.ops.registry import Ints, OperationError, Tensors, op
from coremill.mil.values import BY_NAME, ElementType, unpack_bits


@op("constexpr_affine_dequantize", since=16)
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, *, axis: int) -> Tensor:
    """constexpr_affine_dequantize: scale · (quantized_data - zero_point)."""
    rank = quantized_data.dim()
    steps = quantized_data.to(scale.dtype) - along_axis(zero_point, rank, axis).to(scale.dtype)
    return steps * along_axis(scale, rank, axis)


@op("constexpr_cast", since=16, native=True)
def constexpr_cast(source_val: Tensor, *, output_dtype: ElementType) -> Tensor:
    """constexpr_cast: fp16 weights as fp32."""
    return source_val.to(output_dtype.storage)


_INDEX_TYPES = {1 << bits: BY_NAME[f"uint{bits}"] for bits in (1, 2, 4, 6, 8)}
"""The type of an iOS16 index, by the number of entries in its table."""


def _unpacked(packed: Tensor, element: ElementType, shape: Ints) -> Tensor:
    """Unpack the elements of a tensor of `shape` from bytes, as a 1-D tensor.

    Raises:
        OperationError: the shape has a negative size, or the number of bytes does not match it.
    """
    if min(shape, default=0) < 0:
        raise OperationError(f"shape {list(shape)}, expected sizes of at least 0")
    if packed.dtype != torch.uint8:
        raise OperationError(f"packed elements of {packed.dtype}, expected uint8")
    try:
        unpacked = unpack_bits(packed.cpu().numpy(), element, math.prod(shape))
    except ValueError as error:
        raise OperationError(f"shape {list(shape)}: {error}") from error
    return torch.from_numpy(unpacked).to(packed.device)


@op("constexpr_lut_to_dense", since=16, native=True)
def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, *, shape: Ints) -> Tensor:
    """constexpr_lut_to_dense: lut[index] for indices of log2(len(lut)) bits, packed least significant bit first."""
    if lut.dim() != 1 or lut.numel() not in _INDEX_TYPES:
        sizes = ", ".join(map(str, _INDEX_TYPES))
        raise OperationError(f"a table of shape {list(lut.shape)}, expected one axis of {sizes} entries")
    unpacked = _unpacked(indices, _INDEX_TYPES[lut.numel()], shape)
    return lut[unpacked.long()].reshape(shape)


@op("constexpr_sparse_to_dense", since=16, native=True)
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, *, shape: Ints) -> Tensor:
    """constexpr_sparse_to_dense: the data where the packed mask has a 1, else 0."""
    return sparse_to_dense(nonzero_data, _unpacked(mask, BY_NAME["uint1"], shape).reshape(shape))


@op("constexpr_sparse_to_dense", since=18, native=True)
def sparse_to_dense(nonzero_data: Tensor, mask: Tensor) -> Tensor:
    """constexpr_sparse_to_dense of iOS18: the mask has the result's shape."""
    ones = int((mask != 0).sum())
    if nonzero_data.shape != (ones,):
        raise OperationError(f"data of shape {list(nonzero_data.shape)} for a mask with {ones} ones")
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def _spread(per_block: Tensor, shape: torch.Size) -> Tensor:
    """Expand one value per block to one per element: repeat each axis to its size in `shape`."""
    for axis, size in enumerate(shape):
        blocks = per_block.shape[axis]
        if size % blocks:
            raise OperationError(f"{blocks} blocks along axis {axis}, which has {size} elements")
        if 1 < blocks < size:
            per_block = per_block.repeat_interleave(size // blocks, axis)
    return per_block


@op("constexpr_blockwise_shift_scale", since=18)
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """constexpr_blockwise_shift_scale: scale · (data - offset), with one scale and one offset per block."""
    steps = data.to(scale.dtype)
    if offset is not None:
        steps = steps - _spread(offset.to(scale.dtype), data.shape)
    return steps * _spread(scale, data.shape)


@op("constexpr_lut_to_dense", since=18, native=True)
def lut_to_dense(indices: Tensor, lut: Tensor, *, vector_axis: int | None = None) -> Tensor:
    """constexpr_lut_to_dense of iOS18: one table per block of indices; entries may be vectors along vector_axis.

    indices (d0, …), lut (blocks of d0, …, entries, vector size).
    """
    entries, vector_size = lut.shape[-2:]
    blocks = lut.shape[:-2]
    table = torch.arange(math.prod(blocks)).reshape(blocks)
    table = _spread(table, indices.shape).expand(indices.shape)
    picked = lut.reshape(-1, entries, vector_size)[table, indices.long()]  # indices' shape and the vector
    if vector_size == 1:
        return picked.squeeze(-1)
    if vector_axis is None:
        raise OperationError(f"table entries of {vector_size} elements without a vector_axis")
    axis = axis_of(indices.dim(), vector_axis)
    return picked.movedim(-1, axis + 1).flatten(axis, axis + 1)


@op("constexpr_lut_to_sparse", since=18, native=True)
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, *, vector_axis: int | None = None
) -> Tensors:
    """constexpr_lut_to_sparse: lut_to_dense of the indices where the mask has a 1.

    Returns the mask, expanded along vector_axis to the length of the entries' vectors, and its values (N,).
    """
    values = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis)
    mask = _spread(indices_mask, values.shape).expand(values.shape)
    return mask, values[mask != 0]


@op("constexpr_sparse_blockwise_shift_scale", since=18)
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensors:
    """constexpr_sparse_blockwise_shift_scale: blockwise_shift_scale of the data where the mask has a 1.

    Returns the mask and its values (N,).
    """
    values = constexpr_blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, values[data_mask != 0]
